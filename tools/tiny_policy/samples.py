"""The training data of the tiny policy: scripted conversations about a world, and answers without a search.

Each call of `samples_of_world` generates a new world, so facts repeat only by chance. The conversations come from the
rollout engine, with every protocol and real BM25 results; `pack` packs them into rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from trl_search.data.scripted_players import Script, good, guess, play_scripts, read
from trl_search.data.world import Question, World, generate_world
from trl_search.environment import AnswerOnly, SearchEnvironment
from trl_search.evaluation.evaluate import ANSWER_INSTRUCTION, rag_messages
from trl_search.protocols import Protocol, load_protocol
from trl_search.retrieval.bm25.retriever import BM25Retriever
from trl_search.types import Trajectory

# Kinds of samples and their shares. The first three are searches with the protocol of that name.
KINDS: dict[str, float] = {"qwen_tools": 0.56, "qwen_inline": 0.07, "search_r1": 0.07, "rag": 0.22, "direct": 0.08}
ROW = 768  # tokens

# The role of a token, which decides whether it is trained on.
PADDING, WORLD, POLICY, ANSWER = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation: its ids, and for each its role: world, policy, or the policy's answer."""

    kind: str
    ids: npt.NDArray[np.uint16]
    roles: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Rows:
    """Samples packed into rows of `ROW` tokens: ids, roles, and positions within the samples, all (rows, ROW).
    Position 0 begins a sample; padding continues the last one."""

    ids: npt.NDArray[np.uint16]
    roles: npt.NDArray[np.uint8]
    positions: npt.NDArray[np.uint16]


def samples_of_world(seed: int, tokenizer: PreTrainedTokenizerBase, n: int = 512) -> list[Sample]:
    """Generates a world and `n` conversations about it."""
    rng = random.Random(f"{seed}/samples")
    # Most worlds have names of two words, like small worlds; some have the longer names of large worlds.
    name_words = rng.choices((2, 3, 4), (0.8, 0.12, 0.08))[0]
    world = generate_world(rng.randint(150, 900), seed=rng.getrandbits(48), name_words=name_words)
    # For a retriever that exists for a second, compiling is not worthwhile.
    retriever = BM25Retriever.from_passages(world.passages, backend="numpy")
    questions = [*world.questions("train", limit=n), *world.questions("test", limit=n // 4)]
    samples: list[Sample] = []
    for kind, share in KINDS.items():
        asked = rng.choices(questions, k=max(1, round(n * share)))
        samples += _play(kind, world, retriever, asked, tokenizer, rng)
    rng.shuffle(samples)
    return samples


def _play(
    kind: str,
    world: World,
    retriever: BM25Retriever,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
) -> list[Sample]:
    scripts: list[Script]
    if kind in ("rag", "direct"):
        instruction = ANSWER_INSTRUCTION if rng.random() < 0.6 else ""
        protocol = load_protocol("qwen_tools", tokenizer, instruction=instruction, tools=())
        if kind == "direct":
            scripts = [guess(world, question, rng) for question in questions]
            conversations = [protocol.messages(question.question) for question in questions]
        else:
            found = retriever.search([question.question for question in questions], 3)
            shelf = SearchEnvironment(retriever)
            pairs = list(zip(questions, found, strict=True))
            scripts = [read(world, question, passages, rng) for question, passages in pairs]
            conversations = [
                rag_messages(protocol, shelf, question.question, passages) for question, passages in pairs
            ]
        trajectories = play_scripts(
            scripts, [protocol.prompt_ids(messages) for messages in conversations], protocol, AnswerOnly()
        )
    else:
        # The policy is used without an instruction, but must also work with the protocol's own.
        protocol = load_protocol(kind, tokenizer, instruction=None if rng.random() < 0.06 else "")
        environment = SearchEnvironment(retriever, max_searches=rng.choices((1, 2, 3, 4), (0.04, 0.06, 0.1, 0.8))[0])
        scripts = [good(world, question, rng) for question in questions]
        prompts = [protocol.prompt_ids(protocol.messages(question.question)) for question in questions]
        trajectories = play_scripts(scripts, prompts, protocol, environment)
    return [_sample(kind, trajectory, protocol) for trajectory in trajectories]


def _sample(kind: str, trajectory: Trajectory, protocol: Protocol) -> Sample:
    ids = np.array([*trajectory.prompt_ids, *trajectory.ids], dtype=np.uint16)
    roles = np.array(
        [*[WORLD] * len(trajectory.prompt_ids), *(WORLD + bit for bit in trajectory.mask)], dtype=np.uint8
    )
    opening = np.flatnonzero(ids == protocol.encode("<answer>")[0])
    if len(opening) and roles[opening[-1]] == POLICY:
        answer = roles[opening[-1] + 1 :]
        answer[answer == POLICY] = ANSWER
    return Sample(kind, ids, roles)


def pack(samples: Iterable[Sample]) -> Rows:
    """Packs each sample into the first open row with enough room; samples longer than a row are dropped."""
    rows: list[list[Sample]] = []
    open_rows: list[tuple[int, int]] = []  # (tokens left, row)
    for sample in samples:
        if len(sample.ids) > ROW:
            continue
        for at, (left, row) in enumerate(open_rows):
            if len(sample.ids) <= left:
                rows[row].append(sample)
                open_rows[at] = (left - len(sample.ids), row)
                break
        else:
            rows.append([sample])
            open_rows = [*open_rows[-7:], (ROW - len(sample.ids), len(rows) - 1)]
    ids = np.zeros((len(rows), ROW), dtype=np.uint16)
    roles = np.full((len(rows), ROW), PADDING, dtype=np.uint8)
    positions = np.zeros((len(rows), ROW), dtype=np.uint16)
    for row, packed in enumerate(rows):
        start = 0
        for sample in packed:
            end = start + len(sample.ids)
            ids[row, start:end], roles[row, start:end] = sample.ids, sample.roles
            positions[row, start:] = np.arange(
                ROW - start
            )  # to the end of the row, because padding belongs to the last sample
            start = end
    return Rows(ids, roles, positions)
