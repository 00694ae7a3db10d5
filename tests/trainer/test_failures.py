"""Too many failures stop a run, and the message says what failed: the retriever or the user's environment."""

from __future__ import annotations

import pytest

from trl_search.common.errors import UserError
from trl_search.retrieval.base import RetrievalError
from trl_search.trainer.batch import check_failures
from trl_search.types import StopReason, Trajectory


def trajectories(*reasons: StopReason) -> list[Trajectory]:
    made = [Trajectory(prompt_ids=(1,)) for _ in reasons]
    for trajectory, reason in zip(made, reasons, strict=True):
        trajectory.finish(reason, error=f"{reason.value} it")
    return made


ANSWER, SEARCH, WORLD = StopReason.ANSWER, StopReason.RETRIEVAL_FAILED, StopReason.ENVIRONMENT_FAILED


def test_few_failures_do_not_stop_a_run_but_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    check_failures(trajectories(ANSWER, ANSWER), 0.5)
    assert not caplog.text
    check_failures(trajectories(ANSWER, ANSWER, SEARCH, WORLD), 0.5)
    assert (
        "2 of 4 trajectories failed and are left out of the loss; the first error: retrieval_failed it" in caplog.text
    )


def test_failed_searches_are_attributed_to_the_retriever() -> None:
    said = r"^retrieval failed for 2 of 4 trajectories and the environment for 1, together more than .*: retrieval_f"
    with pytest.raises(RetrievalError, match=said):
        check_failures(trajectories(ANSWER, SEARCH, SEARCH, WORLD), 0.5)


def test_other_failures_are_attributed_to_the_users_environment() -> None:
    with pytest.raises(UserError, match=r"^the environment failed for 3 of 4 .*first error: environment_failed it"):
        check_failures(trajectories(WORLD, WORLD, WORLD, ANSWER), 0.5)
