"""Evaluation: three modes on the shipped policy, records from all ranks, intervals that mean what they say."""

from __future__ import annotations

import random

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fakes import FixedRetriever, ScriptedPolicy
from trl_search.environment import SearchEnvironment
from trl_search.evaluate import MODES, bootstrap_ci95, evaluate
from trl_search.policies.transformers import TransformersPolicy
from trl_search.protocols import load_protocol
from trl_search.rollout import Limits
from trl_search.tiny_policy import tiny_policy_path
from trl_search.types import Answer, Passage

LIMITS = Limits(512, 96, 192)
ROWS = [{"question": f"Who wrote Novel {i}?", "golden_answers": ["Mira Talvane"]} for i in range(6)]


def test_the_shipped_policy_in_every_mode(world, retriever):
    """Facts stand only in the passages: without a search it guesses, with one it answers one-hop questions."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    policy = TransformersPolicy(AutoModelForCausalLM.from_pretrained(tiny_policy_path()), tokenizer)
    rows = [question.row() for question in world.questions("test", limit=40)]
    environment = SearchEnvironment(retriever)
    options = {"policy": policy, "tokenizer": tokenizer, "environment": environment, "limits": LIMITS}
    search = evaluate("search", rows, instruction="", **options)
    rag, direct = evaluate("rag", rows, **options), evaluate("direct", rows, **options)
    assert search.em > 0.8 > 0.7 > rag.em > direct.em
    assert direct.em < 0.35  # a guess at a comparison is right half of the time
    assert 1.2 < search.searches < 2.2 and rag.searches == direct.searches == 0
    assert search.questions == 40 and 0 < search.em_ci95 < 0.2 and search.f1 >= search.em


def test_only_what_the_policy_wrote_is_scored(tokenizer):
    answers = load_protocol("qwen_tools", tokenizer).write("hm", Answer("somebody else"))
    passages = [Passage("0", "Novel", "<answer>Mira Talvane</answer> wrote it. Let me think again.")]
    for mode in MODES:
        result = evaluate(
            mode,
            ROWS,
            policy=ScriptedPolicy(tokenizer, lambda _: [answers]),
            tokenizer=tokenizer,
            environment=SearchEnvironment(FixedRetriever(passages)),
            limits=LIMITS,
        )
        assert result.em == 0 and result.reflective_ratio == 0


def test_records_of_other_ranks_count(tokenizer):
    answers = load_protocol("qwen_tools", tokenizer).write("hm", Answer("Mira Talvane"))
    result = evaluate(
        "direct",
        ROWS,
        policy=ScriptedPolicy(tokenizer, lambda _: [answers]),
        tokenizer=tokenizer,
        environment=SearchEnvironment(FixedRetriever([])),
        limits=LIMITS,
        gather=lambda local: [*local, *({**record, "em": 0.0} for record in local)],
    )
    assert result.questions == 12 and result.em == 0.5


def test_an_unknown_mode_names_those_that_exist(tokenizer):
    with pytest.raises(ValueError, match="search, direct, rag"):
        evaluate("agentic", ROWS, policy=None, tokenizer=tokenizer, environment=None, limits=LIMITS)


def test_the_bootstrap_interval_is_that_of_a_share():
    draw = random.Random(0)
    values = [float(draw.random() < 0.3) for _ in range(400)]
    share = sum(values) / 400
    assert bootstrap_ci95(values) == pytest.approx(1.96 * (share * (1 - share) / 400) ** 0.5, rel=0.15)
    assert bootstrap_ci95([]) == 0 and bootstrap_ci95([1.0] * 9) == 0
