"""The summary of a run: its sentence claims no more than was measured, and its numbers are those of the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.support.calculator import ADD
from trl_search import SearchEnvironment
from trl_search.records.folder import Run
from trl_search.records.report.summary import Fact, call_words, facts_of, headline


def run_of(history: list[dict[str, Any]], results: dict[str, dict[str, Any]], **values: Any) -> Run:
    info = {"command": "trl-search train recipes/qwen3b.yaml --seed 1", "model": "Qwen/Qwen2.5-3B", **values}
    return Run(Path("/runs/a"), info, history, [], [], results, 3661.0)


def measured(em: float, half: float = 0.03, **values: Any) -> dict[str, Any]:
    return {"em": em, "em_ci95": half, "em_interval": [em - half, em + half], "questions": 200, **values}


LOG = [{"step": step, "reward": step / 10, "step_time": 5.0} for step in range(1, 7)]
BEFORE, AFTER = "search, before GRPO", "search, after GRPO"


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ({BEFORE: measured(0.2), AFTER: measured(0.6)}, "rose from 0.200 to 0.600 on 200 questions."),
        ({BEFORE: measured(0.6), AFTER: measured(0.2)}, "fell from 0.600 to 0.200 on 200 questions."),
        (
            {BEFORE: measured(0.9301), AFTER: measured(0.9299)},
            "stayed at 0.930 on 200 questions, which is within the noise of the measurement (± 0.042).",
        ),
        ({BEFORE: measured(0.2), AFTER: measured(0.24)}, "which is within the noise of the measurement (± 0.042)."),
        (
            {"one-shot RAG": measured(0.3), "direct answer, no search": measured(0.1)}
            | {BEFORE: measured(0.2), AFTER: measured(0.6)},
            "to 0.600 on 200 questions, 2.0 times one-shot RAG (0.300).",
        ),
    ],
)
def test_the_sentence_of_the_summary(results: dict[str, dict[str, Any]], said: str) -> None:
    assert headline(run_of(LOG, results)).startswith("Held-out exact match ")
    assert headline(run_of(LOG, results)).endswith(said)


def test_without_an_evaluation_before_training_the_first_one_during_it_is_used() -> None:
    history = [{"step": 2, "eval/em": 0.1}, {"step": 8, "eval/em": 0.5}]
    assert headline(run_of(history, {})) == "Held-out exact match rose from 0.100 to 0.500 between step 2 and step 8."


def test_without_held_out_questions_the_sentence_reports_the_reward() -> None:
    said = "The training reward rose from 0.200 to 0.500; held-out questions were not measured."
    assert headline(run_of(LOG, {})) == said
    assert headline(run_of([], {})) == headline(run_of(LOG[:1], {})) == "Nothing was measured yet."


def test_rollbacks_are_among_the_numbers() -> None:
    run = dataclasses.replace(run_of(LOG, {}), rollbacks=[{"step": 44, "to": 24}, {"step": 60, "to": 24}])
    told = "step 44 to 24, step 60 to 24; each halved the learning rate"
    assert Fact("Rollbacks", "2", told) in facts_of(run)
    assert "Rollbacks" not in {fact.name for fact in facts_of(run_of(LOG, {}))}


def test_the_numbers_of_the_summary() -> None:
    results = {
        "one-shot RAG": measured(0.3),
        BEFORE: measured(0.2, searches=0.5),
        AFTER: measured(0.6, searches=1.5),
        "search, best checkpoint (step 4)": measured(0.65),
    }
    config = {"config": {"max_steps": 10}, "task": {"retriever": "bm25"}, "protocol": "qwen_tools"}
    facts = {fact.name: (fact.value, fact.note) for fact in facts_of(run_of(LOG, results, **config))}
    assert facts == {
        "Held-out exact match": ("0.200 → 0.600", "95 % interval 0.570 to 0.630; best 0.650 (step 4)"),
        "One-shot RAG": ("0.300", "95 % interval 0.270 to 0.330"),
        "Training reward": ("0.200 → 0.500", "means of the first and the last 3 logs"),
        "Searches per question": ("0.50 → 1.50", "held-out questions"),
        "Steps": ("6 of 10", "61 min in all, 5 s per step"),
        "Model": ("Qwen2.5-3B", "qwen_tools · bm25"),
        "Recipe": ("qwen3b", ""),
    }


@pytest.mark.parametrize(
    ("tools", "named", "said"),
    [
        ([ADD], ("call of add", "calls of add"), "Calls of add per question"),
        ([*SearchEnvironment.tools, ADD], ("call", "calls"), "Calls per question"),
        (SearchEnvironment.tools, ("search", "searches"), "Searches per question"),
        ("damaged", ("search", "searches"), "Searches per question"),
    ],
)
def test_calls_are_named_after_the_tool(tools: Any, named: tuple[str, str], said: str) -> None:
    log = [{"step": step, "tools/calls": step / 2} for step in (1, 2)]
    run = run_of(log, {}, environment={"tools": tools})
    assert call_words(run) == named
    assert Fact(said, "0.50 → 1.00", "training questions") in facts_of(run)


def test_what_is_not_recorded_is_left_out() -> None:
    assert facts_of(Run(Path("/a"), {"command": "python 'train.py"}, [], [], [])) == []
    broken = {AFTER: {"em": None, "em_interval": [None, None]}}
    assert [fact.name for fact in facts_of(Run(Path("/a"), {"task": None}, LOG, [], [], broken))] == [
        "Training reward",
        "Steps",
    ]
