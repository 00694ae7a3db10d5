"""benchmarks/real_model.py: which chains are compared, and what is kept from their logs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.real_model import compare, difference, history_of
from trl_search.evaluation.answers_file import Records
from trl_search.evaluation.outcomes import Outcome


def outcome(em: float) -> Outcome:
    return Outcome(
        id="q", data_source="nq", question="?", golden_answers=("a",), answer="a", em=em, f1=em, contains=em, read=em,
        searches=1, turns=2, malformed=0, model_tokens=9, observation_tokens=9, latency_s=1.0, reflections=0,
        stop_reason="answer", error="",
    )  # fmt: skip


def chain(folder: Path, name: str, em: dict[int, float], mode: str = "search") -> Path:
    """A chain with one held-out question and its scores at some steps."""
    held_out = folder / name / "grpo" / "held_out"
    held_out.mkdir(parents=True)
    for step, score in em.items():
        Records(held_out, mode, f"step_{step}").write([outcome(score)])
    return folder / name


def test_chains_are_compared_per_seed_at_their_last_common_step(tmp_path: Path) -> None:
    first = [chain(tmp_path, "em_0", {0: 0.0, 10: 1.0, 20: 0.0}), chain(tmp_path, "em_1", {0: 0.0, 10: 0.0})]
    second = [chain(tmp_path, "nosearch_0", {0: 0.0, 10: 0.0}, "direct")]
    steps, ones, others = compare(first, second)
    assert steps == {"0": 10} and difference(ones, others, ["nq"])[0] == -1.0


def test_chains_without_a_common_seed_or_step_are_named(tmp_path: Path) -> None:
    first = [chain(tmp_path, "em_0", {0: 0.0, 10: 1.0})]
    with pytest.raises(SystemExit, match="no seed has a chain of both kinds, em_0 and format_1"):
        compare(first, [chain(tmp_path, "format_1", {0: 0.0})])
    with pytest.raises(SystemExit, match="format_0 were evaluated at no common step"):
        compare(first, [chain(tmp_path, "format_0", {5: 0.0})])


def test_policies_that_were_asked_different_questions_are_not_compared() -> None:
    one, other = {"nq": [outcome(1.0)]}, {"nq": [replace(outcome(1.0), id="another")]}
    for first, second in ((one, other), (one, {}), ({}, one)):
        with pytest.raises(SystemExit, match="the policies were asked different questions of nq"):
            difference([first], [second], ["nq"])


def test_a_metric_that_was_not_finite_stays_null(tmp_path: Path) -> None:
    folder = chain(tmp_path, "em_0", {0: 0.0, 10: 1.0})
    rows = [{"step": 1, "reward": 0.1234567, "grad_norm": None, "other": "x"}]
    (folder / "grpo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert history_of(folder)[1:] == [{"step": 1, "reward": 0.12346, "grad_norm": None}]
