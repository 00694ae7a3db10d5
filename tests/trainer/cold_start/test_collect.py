"""A collection contains the sampled tokens exactly, can be resumed, and is filtered by the given rules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerBase

from tests.support.fakes import FixedRetriever
from trl_search.common.errors import UserError
from trl_search.config.task import QuestionArguments, searched_of
from trl_search.environment import SearchEnvironment
from trl_search.policies.base import Policy
from trl_search.protocols import load_protocol
from trl_search.retrieval.index.folder import build_index
from trl_search.rollout import Limits
from trl_search.trainer.cold_start.collect import (
    ATTEMPTS,
    SETTINGS,
    Attempt,
    Collected,
    claim,
    collect,
    missing,
    read_attempts,
)
from trl_search.trainer.cold_start.select import Rules, describe, select, write_kept
from trl_search.types import Completion, FinishReason, Passage, Sampling

GOLD = "Mira Talvane"
PASSAGES = [Passage(str(i), f"Title {i}", f"Quiet Raven is a novel by {GOLD}.") for i in range(3)]
ROWS = [{"id": f"q{i}", "question": f"Who wrote book {i}?", "golden_answers": [GOLD]} for i in range(6)]
LIMITS = Limits(completion_tokens=400, turn_tokens=120, observation_tokens=100)


class Teacher(Policy):
    """Searches once and answers, wrongly for every third seed. Fails permanently after `turns` turns."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, turns: int = 10_000) -> None:
        self.tokenizer, self.turns, self.said = tokenizer, turns, 0
        self.open_now = False

    async def open(self) -> None:
        self.open_now = True

    async def close(self) -> None:
        self.open_now = False

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> Completion:
        assert self.open_now
        if self.said == self.turns:
            raise RuntimeError("the engine broke")
        self.said += 1
        ids = self.tokenizer.encode(said(self.tokenizer.decode(list(prompt_ids)), sampling.seed))
        ids.append(int(self.tokenizer.eos_token_id))
        return Completion(tuple(ids), (-0.5,) * len(ids), FinishReason.EOS)


def said(prompt: str, seed: int) -> str:
    if "<tool_response>" not in prompt.split("Who wrote")[-1]:
        call = '{"name": "search", "arguments": {"query_list": ["author of the book"]}}'
        return f"<think> {seed % 97} </think>\n<tool_call>\n{call}\n</tool_call>"
    return f"<think> {seed % 89} </think>\n<answer> {GOLD if seed % 3 else 'nobody'} </answer>"


def run(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    policy: Policy | None = None,
    rows: Sequence[dict[str, Any]] = ROWS,
    samples: int = 3,
    retriever: FixedRetriever | None = None,
    **settings: Any,
) -> Collected:
    return collect(
        folder,
        rows,
        policy=lambda: policy or Teacher(tokenizer),
        environment=SearchEnvironment(retriever or FixedRetriever(PASSAGES)),
        protocol=load_protocol("qwen_tools", tokenizer, instruction=""),
        limits=LIMITS,
        sampling=Sampling(seed=7),
        samples=samples,
        concurrency=4,
        settings={"temperature": 1.0, **settings},
    )


def test_an_attempt_equals_its_rollout_token_for_token(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert run(tmp_path, tokenizer) == Collected(new=18, before=0, failed=0)
    attempts = read_attempts(tmp_path)
    assert {(a.index, a.sample) for a in attempts} == {(i, j) for i in range(6) for j in range(3)}
    protocol = load_protocol("qwen_tools", tokenizer, instruction="")
    for attempt in attempts:
        assert attempt.prompt_ids == list(protocol.prompt_ids(protocol.messages(ROWS[attempt.index]["question"])))
        assert len(attempt.ids) == len(attempt.mask) and attempt.id == f"q{attempt.index}"
        own = "".join(m["content"] for m in attempt.messages if m["role"] == "assistant")
        decoded = tokenizer.decode([one for one, ours in zip(attempt.ids, attempt.mask, strict=True) if ours])
        assert decoded.replace("<|im_end|>", "").split() == own.replace("<|im_end|>", "").split()
        assert (attempt.searches, attempt.malformed, attempt.format, attempt.stop_reason) == (1, 0, 1.0, "answer")
        assert attempt.em == attempt.f1 == float(attempt.answer == GOLD)
    assert 0 < sum(attempt.em for attempt in attempts) < 18
    assert len({tuple(attempt.ids) for attempt in attempts}) > 12  # every attempt has its own seed


def test_a_resumed_collection_equals_an_uninterrupted_one(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    run(tmp_path / "whole", tokenizer)
    with pytest.raises(RuntimeError, match="the engine broke"):
        run(tmp_path / "cut", tokenizer, policy=Teacher(tokenizer, turns=15))
    path = tmp_path / "cut" / ATTEMPTS
    before = path.read_bytes()
    finished = before.count(b"\n")
    assert 0 < finished < 18
    path.write_bytes(before + b'{"index": 3, "sam')  # killed while writing
    assert len(missing(tmp_path / "cut", 6, 3)) == 18 - finished
    assert run(tmp_path / "cut", tokenizer) == Collected(new=18 - finished, before=finished, failed=0)
    assert path.read_bytes().startswith(before)

    def key(attempt: Attempt) -> tuple[int, int]:
        return attempt.index, attempt.sample

    whole, cut = (sorted(read_attempts(tmp_path / name), key=key) for name in ("whole", "cut"))
    assert whole == cut


def test_a_complete_collection_samples_nothing_and_can_be_extended(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    run(tmp_path, tokenizer, samples=2)
    first = (tmp_path / ATTEMPTS).read_bytes()
    silent = Teacher(tokenizer, turns=0)
    assert run(tmp_path, tokenizer, samples=2, policy=silent) == Collected(0, 12, 0)
    assert run(tmp_path, tokenizer, samples=3) == Collected(6, 12, 0)
    assert (tmp_path / ATTEMPTS).read_bytes().startswith(first)


def test_other_settings_or_questions_are_refused_and_nothing_is_changed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    run(tmp_path, tokenizer, samples=1)
    held = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"other settings \(temperature was 1.0, and is 0.7\): give another"):
        run(tmp_path, tokenizer, temperature=0.7)
    with pytest.raises(UserError, match="questions_hash was"):
        run(tmp_path, tokenizer, rows=ROWS[:5])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == held
    settings = json.loads((tmp_path / SETTINGS).read_text())
    (tmp_path / SETTINGS).write_text(json.dumps({**settings, "format": 1}))
    with pytest.raises(UserError, match=r"other settings \(format was 1, and is 2\): give another `collection`"):
        run(tmp_path, tokenizer, samples=1)
    (tmp_path / SETTINGS).unlink()
    with pytest.raises(UserError, match="so the settings of its attempts are unknown"):
        run(tmp_path, tokenizer)


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One corpus in two folders, another corpus, and the first one with another option."""
    folder = tmp_path_factory.mktemp("indexes")
    for name, passages, options in (
        ("here", PASSAGES, {}),
        ("there", PASSAGES, {}),
        ("other", PASSAGES[:2], {}),
        ("sharper", PASSAGES, {"k1": 0.9}),
    ):
        build_index(passages, folder / name, **options)
    return folder


def keys(word: str | Path, **options: Any) -> dict[str, str]:
    return {"retriever": str(word), "retriever_options": json.dumps(options)}


def claimed(folder: Path, searched: dict[str, str]) -> None:
    """Claims a collection with these recipe keys, as `trl-search sft` does."""
    claim(folder, {"format": 2, "searched": searched_of(QuestionArguments(**searched)).content()})


@pytest.mark.parametrize(
    "searched",
    [
        lambda index: keys(index),
        lambda index: keys("bm25", index=str(index)),
        lambda index: keys("hybrid", retrievers=[{"kind": "bm25", "index": str(index)}, {"kind": "http", "url": "u"}]),
        lambda index: keys("rerank", retriever={"kind": "bm25", "index": str(index)}, url="http://host/rerank"),
    ],
    ids=["a folder", "an option", "hybrid", "rerank"],
)
def test_indexes_are_compared_by_content(tmp_path: Path, indexes: Path, searched: Any) -> None:
    claimed(tmp_path, searched(indexes / "here"))
    claimed(tmp_path, searched(indexes / "there"))
    with pytest.raises(UserError, match=r"other settings \(searched[\w.]*index.corpus_sha256 was '\w{64}', and is"):
        claimed(tmp_path, searched(indexes / "other"))
    with pytest.raises(UserError, match=r"\(searched[\w.]*index.options.k1 was None, and is 0.9\): give another"):
        claimed(tmp_path, searched(indexes / "sharper"))


def test_other_options_of_a_retriever_are_compared_and_secrets_are_not(tmp_path: Path, indexes: Path) -> None:
    claimed(tmp_path, keys(indexes / "here", threads=1))
    with pytest.raises(UserError, match=r"\(searched.options.threads was 1, and is 2\)"):
        claimed(tmp_path, keys(indexes / "there", threads=2))
    claimed(tmp_path / "web", keys("web", provider="serper", api_key="first"))
    claimed(tmp_path / "web", keys("web", provider="serper", api_key="second"))
    assert "first" not in (tmp_path / "web" / SETTINGS).read_text()


def test_questions_are_compared_by_text_and_not_by_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    run(tmp_path, tokenizer, samples=1, rows=[{**row, "data_source": "kit"} for row in ROWS])
    assert run(tmp_path, tokenizer, samples=1, rows=[{**row, "data_source": "elsewhere"} for row in ROWS]).new == 0


def test_an_attempt_with_a_failed_search_is_not_recorded_and_is_repeated(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    broken = FixedRetriever(PASSAGES, poison="author")
    with pytest.raises(UserError, match=r"failed in 11 of 11 attempts.* the index is on fire.* 0 attempts are kept"):
        run(tmp_path, tokenizer, retriever=broken)
    assert not read_attempts(tmp_path)
    # Too few failures to stop the collection: they are counted and left to the next call.
    assert run(tmp_path, tokenizer, retriever=broken, samples=1) == Collected(0, 0, 6)
    assert run(tmp_path, tokenizer, samples=1) == Collected(6, 0, 0)


def test_an_invalid_line_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    run(tmp_path, tokenizer, samples=1)
    with (tmp_path / ATTEMPTS).open("a") as file:
        file.write('{"question": "of another file"}\n')
    with pytest.raises(UserError, match=r"attempts.jsonl, line 7, is not an attempt"):
        read_attempts(tmp_path)


# Selection


def attempt(index: int = 0, sample: int = 0, **changed: Any) -> Attempt:
    good: dict[str, Any] = {
        "id": f"q{index}",
        "data_source": "nq",
        "question": "?",
        "golden_answers": [GOLD],
        "messages": [{"role": "assistant", "content": "…"}],
        "answer": GOLD,
        "em": 1.0,
        "f1": 1.0,
        "format": 1.0,
        "searches": 1,
        "malformed": 0,
        "stop_reason": "answer",
        "prompt_ids": [1, 2],
        "ids": [3, 4, 5, sample],
        "mask": [1, 1, 0, 1],
    }
    return Attempt(index=index, sample=sample, **{**good, **changed})


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"answer": None, "em": 0.0, "f1": 0.0}, "no answer"),
        ({"em": 0.0, "f1": 0.8}, "wrong answer"),
        ({"format": 0.5}, "malformed"),
        ({"malformed": 1}, "malformed"),
        ({"searches": 0}, "too few calls"),
        ({"ids": [3] * 7, "mask": [1] * 7}, "too long"),
    ],
)
def test_every_reason_to_drop_an_attempt(changed: dict[str, Any], reason: str) -> None:
    rules = Rules(max_tokens=8)
    kept, outcomes = select([attempt(0), attempt(1, **changed)], rules)
    assert [one.index for one in kept] == [0] and outcomes == {"kept": 1, reason: 1}
    with pytest.raises(UserError, match=rf"none of 2 attempts is kept \({reason} 2\)\. Most frequent, {reason}: \w+"):
        select([attempt(0, **changed), attempt(1, **changed)], rules)


def test_rules_can_be_relaxed() -> None:
    loose = Rules(min_f1=0.5, well_formed=False, min_searches=0)
    odd = attempt(em=0.0, f1=0.5, format=0.5, malformed=2, searches=0, ids=[3] * 9000, mask=[1] * 9000)
    assert select([odd], loose)[0] == [odd]
    with pytest.raises(UserError, match="wrong answer 1"):
        select([attempt(em=0.0, f1=0.49)], loose)


def test_the_first_attempts_of_a_question_are_kept_without_duplicates() -> None:
    sampled = [attempt(1, 1), attempt(0, 2), attempt(0, 1), attempt(0, 0, ids=[3, 4, 5, 1]), attempt(0, 3)]
    kept, outcomes = select(sampled, Rules(keep_per_question=2))
    assert [(one.index, one.sample) for one in kept] == [(0, 0), (0, 2), (1, 1)]
    assert outcomes == {"kept": 3, "duplicate": 1, "enough of its question": 1}
    text = describe(sampled, kept, outcomes)
    assert "5 attempts at 2 questions: EM 1.000" in text and "kept: 2 questions, 1.00 searches, 9 tokens" in text


def test_a_collection_without_attempts() -> None:
    with pytest.raises(UserError, match="no attempts to select from"):
        select([], Rules())


def test_sft_trainer_reads_the_parquet_file_of_kept_attempts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    run(tmp_path, tokenizer)
    kept, _ = select(read_attempts(tmp_path), Rules())
    path = write_kept(tmp_path, kept)
    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert table["input_ids"] == [[*one.prompt_ids, *one.ids] for one in kept]
    assert table["assistant_masks"] == [[*[0] * len(one.prompt_ids), *one.mask] for one in kept]
    assert set(table["answer"]) == {GOLD} and table[0]["messages"][0]["role"] == "assistant"
    assert write_kept(tmp_path, kept[:1]) == path
    assert sorted(file.name for file in tmp_path.iterdir()) == [ATTEMPTS, "cache", "kept.parquet", SETTINGS]
    assert "input_ids" not in json.loads((tmp_path / ATTEMPTS).read_text("utf-8").splitlines()[0])
