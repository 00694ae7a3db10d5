"""`Plan`: what one call of `trl-search eval` measures, and what its modes search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_search.common.errors import UserError
from trl_search.config.agent import AgentSettings
from trl_search.config.searched import WORLD, Searched, resolve_searched, run_record
from trl_search.data import QuestionFields
from trl_search.environment.registry import takes_retriever
from trl_search.evaluation.backends import Backend
from trl_search.types import Sampling

SEARCHING = ("search", "rag")  # the modes that use the environment


@dataclass(frozen=True)
class Plan:
    """The options of `trl-search eval`."""

    model: str
    modes: Sequence[str]
    datasets: Sequence[str]
    output: Path
    agent: AgentSettings
    backend: Backend
    sampling: Sampling
    retriever: str | None  # a kind of retriever, an index folder, or the address of a server
    retriever_options: Mapping[str, Any]
    world_passages: int
    world_seed: int
    limit: int | None
    seed: int  # seed of the sample of questions
    max_failed_share: float
    published: str  # published rows to show: `auto`, `3B`, `7B`, `all`, `none`
    command: str  # the command line, without its secrets
    fields: QuestionFields | None = None  # the columns of question files with an unknown schema

    @property
    def acts(self) -> bool:
        """Whether some mode uses the environment."""
        return bool(set(self.modes) & set(SEARCHING))


def what_is_searched(plan: Plan) -> Searched:
    """What the modes of a plan search: its `retriever`, else the world of its questions, else what the run searched.

    Raises:
        UserError: if none of these is known.
    """
    in_world, size = WORLD in plan.datasets, (plan.world_passages, plan.world_seed)
    word = plan.retriever or ("bm25" if in_world else None)
    if word is None and run_record(plan.model) is not None:
        word = plan.model
    if word is None:
        raise UserError(
            f"--modes {next(mode for mode in plan.modes if mode in SEARCHING)} needs something to search: give "
            "--retriever, an index folder, the address of a server, or a kind of retriever with its "
            "--retriever_options"
        )
    return resolve_searched(word, plan.retriever_options, world_size=size, in_world=in_world)


def searches(plan: Plan) -> bool:
    """Whether the environment of the plan's agent takes a retriever.

    Raises:
        UserError: if there is no such environment, or if the mode `rag` has no retriever.
    """
    takes = takes_retriever(plan.agent.environment)
    if "rag" in plan.modes and not takes:
        raise UserError(
            f"mode 'rag' searches, but the environment {plan.agent.environment} takes no retriever: leave rag out of "
            "--modes"
        )
    return takes
