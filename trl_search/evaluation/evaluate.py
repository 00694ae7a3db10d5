"""How well a policy answers held-out questions: as a search agent, from what it knows, or from one search (RAG).

| mode     | the prompt holds                                  | turns                                     |
|----------|---------------------------------------------------|-------------------------------------------|
| `search` | the question                                      | until it answers or its budget is spent   |
| `direct` | the question, no tool                             | one                                       |
| `cot`    | the question and the request to reason, no tool   | one                                       |
| `rag`    | the question and the passages it finds, no tool   | one                                       |

In steps, each of which can be had alone:

    rows ─► answer_questions ─► Outcome, one a question ─► summarize          ─► Evaluation   of one set
                                                       └─► by_dataset ─► macro ─► Evaluation   averaged over sets

Outcomes and means are in outcomes.py.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from trl_search.common.errors import UserError
from trl_search.config.agent import AgentSettings, protocol_of
from trl_search.environment import AnswerOnly, Environment, SearchEnvironment
from trl_search.evaluation.outcomes import Outcome, score
from trl_search.policies.base import Policy
from trl_search.protocols import Protocol
from trl_search.retrieval.base import RetrievalError
from trl_search.rollout import run_sync, run_together, run_trajectory
from trl_search.types import Passage, Sampling, StopReason, Trajectory

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
# The instruction that a policy was trained with is the search agent's: the other modes have their own.
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
    """Asks the policy every question once, and scores what it answers.

    Args:
        mode (`str`): One of `MODES`.
        rows (`Sequence[Mapping]`): Questions: `question`, `golden_answers`, and where they have them `id` and
            `data_source`.
        environment (`Environment`): What the agent acts in; `rag` needs a `SearchEnvironment`, and uses its retriever,
            `top_k`, timeout and passage template.
        agent (`AgentSettings`): How the policy is asked: protocol, prompts and token budgets. Its instruction is that
            of `search`; the other modes have their own. How it searches, the environment says.
        sampling (`Sampling`, *optional*): Its seed and a question's id and words make that question repeatable,
            whatever is asked beside it.
        concurrency (`int`, *optional*): Questions under way at once. Default: all.
        on_outcome (`Callable`, *optional*): Called with a row's place and its outcome as it ends, on the event loop.
        progress (`bool`, *optional*): Shows a bar on a terminal.

    Returns:
        `list[Outcome]`: One a row, in their order.
    """
    written = mode_protocol(mode, tokenizer, environment, agent)
    world = environment if mode == "search" else AnswerOnly()
    bar = tqdm(
        total=len(rows),
        desc=f"Evaluation, {mode}",
        unit="question",
        delay=2,
        leave=False,
        disable=None if progress else True,
    )

    async def ask(index: int, row: Mapping[str, Any]) -> Outcome:
        identifier = str(row.get("id", index))
        seed = random.Random(f"{sampling.seed}/{identifier}/{row['question']}").getrandbits(63)
        messages, found_s = written.messages(row["question"]), 0.0
        if mode == "rag":
            assert isinstance(environment, SearchEnvironment) and environment.batcher is not None
            started = time.perf_counter()
            try:
                passages = await environment.batcher.search(row["question"], environment.top_k)
            except RetrievalError as error:
                trajectory = Trajectory(prompt_ids=())
                trajectory.finish(StopReason.RETRIEVAL_FAILED, error=str(error))
                return record(index, trajectory, identifier)
            found_s = time.perf_counter() - started
            messages = rag_messages(written, environment, row["question"], passages)
        trajectory = await run_trajectory(
            written.prompt_ids(messages),
            world.start(row),
            policy=policy,
            protocol=written,
            limits=agent.limits,
            sampling=replace(sampling, seed=seed),
        )
        trajectory.search_s += found_s
        return record(index, trajectory, identifier)

    def record(index: int, trajectory: Trajectory, identifier: str) -> Outcome:
        outcome = score(trajectory, rows[index], identifier)
        bar.update()
        if on_outcome is not None:
            on_outcome(index, outcome)
        return outcome

    # The environment of `rag` answers no action, but its batcher finds the passages.
    opened = environment if mode in ("search", "rag") else world
    jobs = [partial(ask, index, row) for index, row in enumerate(rows)]
    try:
        return run_sync(run_together(jobs, policy=policy, environment=opened, concurrency=concurrency))
    finally:
        bar.close()


def mode_protocol(
    mode: str, tokenizer: PreTrainedTokenizerBase, environment: Environment, agent: AgentSettings
) -> Protocol:
    """What writes a mode's prompts and reads its turns; refuses a mode that does not exist or cannot be run."""
    if mode not in MODES:
        raise UserError(f"unknown evaluation mode {mode!r}; there are {', '.join(MODES)}")
    if mode == "rag" and not isinstance(environment, SearchEnvironment):
        raise UserError(
            f"mode 'rag' searches once before it asks, and {type(environment).__name__} has no retriever: give a "
            "SearchEnvironment"
        )
    if mode == "search":
        return protocol_of(agent, tokenizer, environment.tools)
    return protocol_of(replace(agent, instruction=INSTRUCTIONS[mode]), tokenizer, tools=())


def rag_messages(
    protocol: Protocol, environment: SearchEnvironment, question: str, passages: Sequence[Passage]
) -> list[dict[str, str]]:
    """The one-shot RAG prompt: the passages, a blank line, the question."""
    documents = "\n".join(map(protocol.escape, environment.show(passages)))
    *system, user = protocol.messages(question)
    return [*system, {"role": "user", "content": f"{documents}\n\n{user['content']}"}]
