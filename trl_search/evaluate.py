"""How well a policy answers held-out questions: as a search agent, from what it knows, or from one search (RAG).

| mode     | the prompt holds                                  | turns                                     |
|----------|---------------------------------------------------|-------------------------------------------|
| `search` | the question                                      | until it answers or its budget is spent   |
| `direct` | the question, no tool                             | one                                       |
| `rag`    | the question and the passages it finds, no tool   | one                                       |
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_search.environment import AnswerOnly, Environment, SearchEnvironment
from trl_search.policies.base import Policy
from trl_search.protocols import Protocol, load_protocol
from trl_search.reflection import count_reflections
from trl_search.rollout import Limits, rollout
from trl_search.text import exact_match, f1_score, last_answer
from trl_search.types import Passage, Sampling, Trajectory

GREEDY = Sampling(temperature=0.0)
MODES = ("search", "direct", "rag")
ANSWER_INSTRUCTION = (
    "Answer the given question. Give the answer inside <answer> and </answer>, without explanation. For example, "
    "<answer> Beijing </answer>. Question: "
)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over the questions; `em` with the half-width of its 95 % bootstrap interval."""

    mode: str
    questions: int
    em: float
    em_ci95: float
    f1: float
    searches: float
    model_tokens: float
    reflective_ratio: float


def evaluate(
    mode: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    environment: SearchEnvironment,
    limits: Limits,
    protocol: str = "qwen_tools",
    instruction: str | None = None,
    system_prompt: str | None = None,
    sampling: Sampling = GREEDY,
    gather: Callable[[list[Any]], list[Any]] = lambda local: local,
) -> Evaluation:
    """Asks the policy every question once, greedily unless `sampling` says otherwise.

    Args:
        mode (`str`): One of `MODES`.
        rows (`Sequence[Mapping]`): Questions: `question`, `golden_answers`.
        environment (`SearchEnvironment`): What the agent searches; `rag` uses its retriever and passage template.
        instruction (`str`, *optional*): Put before the question; the mode's own by default, `""` for none.
        gather (`Callable`, *optional*): Joins the records of all ranks, each of which has its own `rows`.
    """
    if mode not in MODES:
        raise ValueError(f"unknown evaluation mode {mode!r}; there are {', '.join(MODES)}")
    world: Environment = environment if mode == "search" else AnswerOnly()
    if mode != "search" and instruction is None:
        instruction = ANSWER_INSTRUCTION
    written = load_protocol(
        protocol, tokenizer, instruction=instruction, system_prompt=system_prompt, tools=world.tools
    )
    if mode == "rag":
        found = environment.retriever.search([row["question"] for row in rows], environment.top_k)
        pairs = zip(rows, found, strict=True)
        conversations = [rag_messages(written, environment, row["question"], passages) for row, passages in pairs]
    else:
        conversations = [written.messages(row["question"]) for row in rows]
    trajectories = rollout(
        [written.prompt_ids(messages) for messages in conversations],
        rows,
        policy=policy,
        environment=world,
        protocol=written,
        limits=limits,
        sampling=sampling,
        description=f"Evaluation, {mode}",
    )
    records = gather([_record(trajectory, row) for trajectory, row in zip(trajectories, rows, strict=True)])
    return _summary(mode, records)


def rag_messages(
    protocol: Protocol, environment: SearchEnvironment, question: str, passages: Sequence[Passage]
) -> list[dict[str, str]]:
    """The one-shot RAG prompt: the passages, a blank line, the question."""
    documents = "\n".join(map(protocol.escape, environment.show(passages)))
    *system, user = protocol.messages(question)
    return [*system, {"role": "user", "content": f"{documents}\n\n{user['content']}"}]


def bootstrap_ci95(values: Sequence[float], *, resamples: int = 1000, seed: int = 0) -> float:
    """Half the width of the 95 % bootstrap interval of the mean."""
    if not values:
        return 0.0
    draw = random.Random(seed)
    means = sorted(sum(draw.choices(values, k=len(values))) / len(values) for _ in range(resamples))
    return (means[int(0.975 * resamples)] - means[int(0.025 * resamples)]) / 2


def _record(trajectory: Trajectory, row: Mapping[str, Any]) -> dict[str, float]:
    answer, golden = last_answer(trajectory.spoken), list(row["golden_answers"])
    phrases = sum(map(count_reflections, trajectory.spoken))
    return {
        "em": 0.0 if answer is None else float(exact_match(answer, golden)),
        "f1": 0.0 if answer is None else float(f1_score(answer, golden)),
        "searches": float(trajectory.searches),
        "model_tokens": float(trajectory.model_tokens),
        "reflective": float(phrases > 0),
    }


def _summary(mode: str, records: Sequence[Mapping[str, float]]) -> Evaluation:
    def mean(key: str) -> float:
        return sum(record[key] for record in records) / max(1, len(records))

    return Evaluation(
        mode=mode,
        questions=len(records),
        em=mean("em"),
        em_ci95=bootstrap_ci95([record["em"] for record in records]),
        f1=mean("f1"),
        searches=mean("searches"),
        model_tokens=mean("model_tokens"),
        reflective_ratio=mean("reflective"),
    )
