"""What a reward logs has one value per completion, or is a number, and replaces nothing."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

from tests.support.scripted_trainer import later_is_better, real_trainer, steps
from trl_search.common.errors import UserError
from trl_search.rewards.scores import checked


def score(log: Any) -> dict[str, Any]:
    """Calls a reward that logs, with two completions, and returns what reached TRL."""
    reached: dict[str, Any] = {}

    def mine(completions, log_extra, log_metric, **kwargs):
        log(log_extra, log_metric)
        return [0.0] * len(completions)

    checked(mine)(completions=["a", "b"], log_extra=reached.__setitem__, log_metric=reached.__setitem__)
    return reached


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (lambda extra, metric: extra("judge", ["good"]), r"logs \['good'\] as the column 'judge': .*, 2 here"),
        (lambda extra, metric: extra("judge", ["good"] * 3), "one value per completion, 2 here"),
        (lambda extra, metric: extra("judge", "ab"), "logs 'ab' as the column 'judge': give a list"),
        (lambda extra, metric: extra("searches", [1, 2]), "logs the column 'searches', which exists"),
        (lambda extra, metric: metric("length", "12"), "logs '12' as the metric 'length': give a number"),
        (lambda extra, metric: metric("length", None), "logs None as the metric 'length'"),
        (lambda extra, metric: metric("reward", 1.0), "logs the metric 'reward', which exists"),
        (lambda extra, metric: metric("rewards/em/mean", 1.0), "logs the metric 'rewards/em/mean', which exists"),
    ],
    ids=["short", "long", "text", "column", "word", "none", "reward", "mean"],
)
def test_other_logs_are_named(log: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^reward 'mine' .*{message}"):
        score(log)


def test_arrays_and_tensors_are_logged_as_numbers() -> None:
    def log(extra: Any, metric: Any) -> None:
        extra("tensor", torch.tensor([1, 2]))
        extra("mixed", [numpy.float32(0.5), "word"])
        metric("length", torch.tensor(3))

    assert repr(score(log)) == "{'tensor': [1, 2], 'mixed': [0.5, 'word'], 'length': 3.0}"


def test_the_trainer_logs_what_a_reward_logs(tmp_path: Any, random_model: Any, tokenizer: Any) -> None:
    def mine(completions, log_extra, log_metric, **kwargs):
        log_extra("length", torch.arange(len(completions)))
        log_metric("longest", numpy.int64(7))
        return later_is_better(completions)

    trainer = real_trainer(tmp_path, random_model, tokenizer, rewards=mine, max_steps=1, log_completions=True)
    trainer.train()
    assert steps(trainer)[0]["longest"] == 7.0 and list(trainer._logs["extra"]["length"]) == [0, 1, 2, 3]
