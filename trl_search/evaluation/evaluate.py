"""Evaluates how well a policy answers questions: as a search agent, without search, or from one search (RAG).

| mode     | the prompt holds                                       | turns                                   |
|----------|--------------------------------------------------------|-----------------------------------------|
| `search` | the question                                           | until it answers or its budget is spent |
| `direct` | the question, no tool                                  | one                                     |
| `cot`    | the question and the request to reason, no tool        | one                                     |
| `rag`    | the question and the passages found for it, no tool    | one                                     |

The steps, which can also be used alone:

    rows ─► answer_questions ─► Outcome, one per question ─► summarize          ─► Evaluation   of one set
                                                         └─► by_dataset ─► macro ─► Evaluation   averaged over sets

"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from trl_search.common.errors import UserError
from trl_search.common.event_loop import run_sync
from trl_search.config.agent import AgentSettings, protocol_of
from trl_search.environment import AnswerOnly, Environment, SearchEnvironment
from trl_search.evaluation.outcomes import Outcome, score
from trl_search.policies.base import Policy
from trl_search.protocols import Protocol
from trl_search.protocols.prompt_length import too_long_prompts
from trl_search.rollout import Job, run_batch
from trl_search.types import Passage, Sampling, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GREEDY = Sampling(temperature=0.0)
MODES = ("search", "direct", "cot", "rag")
ANSWER_INSTRUCTION = (
    "Answer the given question. Give the answer inside <answer> and </answer>, without explanation. For example, "
    "<answer> Beijing </answer>. Question: "
)
REASON_INSTRUCTION = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first. After reasoning, give "
    "the answer inside <answer> and </answer>, without detailed illustrations. For example, <answer> Beijing "
    "</answer>. Question: "
)
# The mode `search` uses the agent's own instruction.
INSTRUCTIONS = {"direct": ANSWER_INSTRUCTION, "cot": REASON_INSTRUCTION, "rag": ANSWER_INSTRUCTION}


def answer_questions(
    mode: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    environment: Environment,
    agent: AgentSettings,
    sampling: Sampling = GREEDY,
    concurrency: int | None = None,
    on_outcome: Callable[[int, Outcome], None] | None = None,
    progress: bool = True,
) -> list[Outcome]:
    """Asks the policy every question once, and scores its answers, in the order of the rows. `rag` needs a
    `SearchEnvironment`, and uses its retriever, `passages_per_query`, timeout and passage template. The agent's
    instruction is for `search`; the other modes have their own. `on_outcome` is called with the row's index and its
    outcome when a question finishes.

    Raises:
        UserError: if questions are too long for the model.
    """
    protocol = mode_protocol(mode, tokenizer, environment, agent)
    check_room(mode, rows, protocol, agent, policy.positions)
    world = environment if mode == "search" else AnswerOnly()
    if mode == "rag":
        assert isinstance(environment, SearchEnvironment)  # mode_protocol has rejected others
        world = SearchedOnce(environment)
    outcomes: dict[int, Outcome] = {}

    def job(index: int, row: Mapping[str, Any]) -> Job:
        question, key = row["question"], f"{row.get('id', index)}/{row['question']}"
        if isinstance(world, SearchedOnce):
            return Job(partial(world.prompt, protocol, question), row, key)
        return Job(protocol.prompt_ids(_asked(mode, row, protocol)), row, key)

    def finish(index: int, trajectory: Trajectory) -> None:
        outcomes[index] = score(trajectory, rows[index], str(rows[index].get("id", index)))
        if on_outcome is not None:
            on_outcome(index, outcomes[index])

    run_sync(
        run_batch(
            (job(index, row) for index, row in enumerate(rows)),
            count=len(rows),
            policy=policy,
            environment=world,
            protocol=protocol,
            limits=agent.limits,
            sampling=sampling,
            on_finish=finish,
            concurrency=concurrency,
            progress=f"Evaluation, {mode}" if progress else None,
        )
    )
    return [outcomes[index] for index in range(len(rows))]


def check_room(
    mode: str, rows: Sequence[Mapping[str, Any]], protocol: Protocol, agent: AgentSettings, positions: int | None
) -> None:
    """Checks that all questions leave room for an answer. The passages of `rag` are not known before the search.

    Raises:
        UserError: names the rows that leave too little room.
    """
    if positions is None or mode == "rag":
        return
    budget = agent.max_completion_length
    if mode != "search":  # one turn
        budget = min(budget, agent.max_turn_length)
    too_long = too_long_prompts([_asked(mode, row, protocol) for row in rows], protocol, positions - budget)
    if too_long:
        longest = max(too_long, key=lambda row: too_long[row])
        raise UserError(
            f"{len(too_long)} of {len(rows)} questions are too long for mode {mode!r}: the prompt of row {longest} "
            f"has {too_long[longest]} tokens and an answer may have {budget}, but the model has {positions} "
            "positions. "
            f"Lower {'max_completion_length' if mode == 'search' else 'max_turn_length'}, or leave such questions out"
        )


def _asked(mode: str, row: Mapping[str, Any], protocol: Protocol) -> list[dict[str, Any]]:
    # A dataset's own prompt is for the agent; the baselines use their own instruction.
    return protocol.conversation(row) if mode == "search" else list(protocol.messages(row["question"]))


def mode_protocol(
    mode: str, tokenizer: PreTrainedTokenizerBase, environment: Environment, agent: AgentSettings
) -> Protocol:
    """The protocol of a mode, with its instruction.

    Raises:
        UserError: for an unknown mode, or for `rag` without a retriever.
    """
    if mode not in MODES:
        raise UserError(f"unknown evaluation mode {mode!r}; there are {', '.join(MODES)}")
    if mode == "rag" and not isinstance(environment, SearchEnvironment):
        raise UserError(
            f"mode 'rag' searches once before it asks, but {type(environment).__name__} has no retriever: give a "
            "SearchEnvironment"
        )
    if mode == "search":
        return protocol_of(agent, tokenizer, environment.tools, environment.instruction)
    return protocol_of(replace(agent, instruction=INSTRUCTIONS[mode]), tokenizer, tools=())


class SearchedOnce(AnswerOnly):
    """The environment of one-shot RAG: it searches for the prompt, and the policy has one turn to answer."""

    def __init__(self, environment: SearchEnvironment) -> None:
        self.environment = environment

    async def open(self) -> None:
        await self.environment.open()

    async def close(self) -> None:
        await self.environment.close()

    async def prompt(self, protocol: Protocol, question: str) -> tuple[int, ...]:
        """The token ids of a prompt with the passages found for the question."""
        assert self.environment.batcher is not None, "the environment is open while a batch runs"
        passages = await self.environment.batcher.search(question, self.environment.passages_per_query)
        # In a thread, so that other trajectories do not wait for the tokenizer.
        messages = await asyncio.to_thread(rag_messages, protocol, self.environment, question, passages)
        return protocol.prompt_ids(messages)


def rag_messages(
    protocol: Protocol, environment: SearchEnvironment, question: str, passages: Sequence[Passage]
) -> list[dict[str, str]]:
    """The one-shot RAG prompt: the passages, a blank line, the question."""
    documents = "\n".join(map(protocol.escape, environment.show(passages)))
    *system, user = protocol.messages(question)
    return [*system, {"role": "user", "content": f"{documents}\n\n{user['content']}"}]
