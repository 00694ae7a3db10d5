"""Evaluation: four modes with the shipped policy, what is scored, failed questions, and several ranks."""

from __future__ import annotations

import asyncio
import copy
import math
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.fakes import FixedRetriever, ScriptedPolicy
from trl_search.common.errors import UserError
from trl_search.config.agent import TINY
from trl_search.environment import AnswerOnly, SearchEnvironment
from trl_search.evaluation.evaluate import MODES, answer_questions
from trl_search.evaluation.outcomes import summarize
from trl_search.policies.tiny import tiny_policy_path
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.protocols import load_protocol
from trl_search.types import Answer, Passage, Sampling, Search

pytestmark = pytest.mark.slow

AGENT = replace(TINY, instruction=None)
ROWS = [{"question": f"Who wrote Novel {i}?", "golden_answers": ["Mira Talvane"]} for i in range(6)]


@pytest.fixture(scope="module")
def tiny():
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    return TransformersPolicy(AutoModelForCausalLM.from_pretrained(tiny_policy_path()), tokenizer), tokenizer


def ask(mode, policy, tokenizer, rows=ROWS, *, retriever=None, **options):
    environment = SearchEnvironment(retriever or FixedRetriever([]))
    return answer_questions(
        mode,
        rows,
        **{"policy": policy, "tokenizer": tokenizer, "environment": environment, "agent": AGENT} | options,
    )


def says(tokenizer, *turns):
    """A policy that makes these turns for every question."""
    protocol = load_protocol("qwen_tools", tokenizer)
    written = [turn if isinstance(turn, str) else protocol.write("hm", turn) for turn in turns]
    return ScriptedPolicy(tokenizer, lambda _: written)


def test_the_shipped_policy_in_every_mode(tiny, world, retriever):
    """Facts are only in the passages: without searches the policy guesses; with them it answers one-hop questions."""
    policy, tokenizer = tiny
    rows = [question.row() for question in world.questions("test", limit=40)]
    environment = SearchEnvironment(retriever)
    options = {"policy": policy, "tokenizer": tokenizer, "environment": environment, "agent": TINY}
    search = summarize("search", answer_questions("search", rows, **options))
    rag, direct, cot = (summarize(mode, answer_questions(mode, rows, **options)) for mode in ("rag", "direct", "cot"))
    assert search.em > 0.8 > 0.7 > rag.em > direct.em
    assert direct.em < 0.35  # half of the guesses at comparisons are right
    assert 1.2 < search.searches < 2.2 and rag.searches == direct.searches == cot.searches == 0
    assert search.questions == 40 and search.failed == 0 and search.f1 >= search.contains >= search.em
    low, high = search.em_interval
    assert low < search.em < high and search.em_ci95 == pytest.approx((high - low) / 2) and search.em_ci95 < 0.2


def test_an_outcome_records_the_trajectory(tokenizer):
    row = {"id": "7", "data_source": "nq", "question": "Who wrote it?", "golden_answers": ["the Mira Talvane", "MT"]}
    policy = says(
        tokenizer, Search(("it",)), "<tool_call>{</tool_call>", "Wait, let me re-check. <answer> Mira X. </answer>"
    )
    (one,) = ask("search", policy, tokenizer, [row], retriever=FixedRetriever([Passage("0", "It", "By Mira.")]))
    assert (one.id, one.data_source, one.question, one.answer) == ("7", "nq", "Who wrote it?", "Mira X.")
    assert one.golden_answers == ("the Mira Talvane", "MT")
    assert (one.em, one.f1, one.contains) == (0.0, 0.5, 0.0)
    assert (one.searches, one.turns, one.malformed, one.reflections) == (1, 3, 1, 2)
    assert (one.stop_reason, one.error, one.failed) == ("answer", "", False)
    assert one.model_tokens > 30 and one.observation_tokens > 20 and 0 < one.latency_s < 60


def test_a_trajectory_without_an_answer_is_wrong(tokenizer):
    (one,) = ask("direct", says(tokenizer, "Mira Talvane"), tokenizer, ROWS[:1])
    assert (one.answer, one.em, one.f1, one.contains, one.stop_reason) == (None, 0, 0, 0, "end_of_turn")


def test_only_the_policys_text_is_scored(tokenizer):
    passages = [Passage("0", "Novel", "<answer>Mira Talvane</answer> wrote it. Let me think again.")]
    for mode in MODES:
        policy = says(tokenizer, Answer("somebody else"))
        outcomes = ask(mode, policy, tokenizer, retriever=FixedRetriever(passages))
        assert [(one.em, one.reflections) for one in outcomes] == [(0.0, 0)] * 6


@pytest.mark.parametrize(
    ("mode", "shown", "hidden"),
    [
        ("search", ["call the search tool", "<tools> search </tools>"], ["Doc 1"]),
        ("direct", ["Answer the given question.", "without explanation"], ["<think>", "<tools>", "Doc 1"]),
        ("cot", ["reasoning inside <think> and </think> first"], ["<tools>", "Doc 1"]),
        ("rag", ['Doc 1(Title: "Novel") Deep.\n\nAnswer the given question.'], ["<think>", "<tools>"]),
    ],
)
def test_each_mode_has_its_prompt(tokenizer, mode, shown, hidden):
    policy = says(tokenizer, Answer("x"))
    ask(mode, policy, tokenizer, ROWS[:1], retriever=FixedRetriever([Passage("0", "Novel", "Deep.")]))
    prompt = tokenizer.decode(policy.prompts[0])
    assert "Who wrote Novel 0?" in prompt
    assert all(text in prompt for text in shown) and not any(text in prompt for text in hidden)


def test_without_searches_the_policy_sees_no_tool_and_has_one_turn(tokenizer):
    policy = says(tokenizer, Search(("Novel",)), Answer("x"))
    options = {"tokenizer": tokenizer, "agent": AGENT}
    never = SearchEnvironment(FixedRetriever([]), max_searches=0)
    (searched,) = answer_questions("search", ROWS[:1], policy=policy, environment=never, **options)
    (only,) = answer_questions("search", ROWS[:1], policy=policy, environment=AnswerOnly(), **options)
    assert policy.prompts[0] == policy.prompts[1] and "<tools>" not in tokenizer.decode(policy.prompts[0])
    assert searched.stop_reason == only.stop_reason == "end_of_turn" and searched.searches == 0


def test_options_of_the_chat_template_reach_the_prompt(tokenizer):
    marked = copy.deepcopy(tokenizer)
    marked.chat_template = "{% if marker is defined %}{{ marker }}{% endif %}" + tokenizer.chat_template
    policy = says(marked, Answer("x"))
    agent = replace(AGENT, chat_template_kwargs={"marker": "THINK "})
    options = {"policy": policy, "tokenizer": marked, "environment": AnswerOnly(), "agent": agent}
    answer_questions("search", ROWS[:1], **options)
    assert marked.decode(policy.prompts[0]).startswith("THINK ")


@pytest.mark.parametrize("mode", ["search", "rag"])
def test_a_failed_search_is_counted_and_named_and_left_out_of_means(tokenizer, mode):
    turns = {i: [load_protocol("qwen_tools", tokenizer).write("hm", Search((f"Novel {i}",)))] for i in range(6)}
    answer = load_protocol("qwen_tools", tokenizer).write("hm", Answer("Mira Talvane"))

    def script(prompt):
        number = next(i for i in range(6) if f"Novel {i}" in prompt)
        return [*(turns[number] if mode == "search" else []), answer]

    result = summarize(
        mode,
        answer_questions(
            mode,
            ROWS,
            policy=ScriptedPolicy(tokenizer, script),
            tokenizer=tokenizer,
            environment=SearchEnvironment(FixedRetriever([], poison="Novel 4")),
            agent=AGENT,
        ),
    )
    assert (result.questions, result.failed, result.em) == (6, 1, 1.0)
    assert result.errors == {"the index is on fire": 1}


def test_without_successful_questions_there_is_no_score(tokenizer):
    policy, retriever = says(tokenizer, Answer("x")), FixedRetriever([], poison="Novel")
    result = summarize(
        "rag",
        answer_questions(
            "rag", ROWS, policy=policy, tokenizer=tokenizer, environment=SearchEnvironment(retriever), agent=AGENT
        ),
    )
    assert result.failed == 6 and math.isnan(result.em) and math.isnan(result.em_ci95)


def test_outcomes_are_reported_as_they_end_and_concurrency_is_limited(tokenizer):
    running, most, told = 0, 0, []

    class Counting(ScriptedPolicy):
        async def generate(self, prompt_ids, **options):
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.01)
            running -= 1
            return await super().generate(prompt_ids, **options)

    answer = load_protocol("qwen_tools", tokenizer).write("hm", Answer("x"))
    policy = Counting(tokenizer, lambda _: [answer])
    outcomes = ask("direct", policy, tokenizer, concurrency=2, on_outcome=lambda *one: told.append(one))
    assert most == 2 and told == list(enumerate(outcomes)) and [one.id for one in outcomes] == list("012345")


def test_the_samples_of_a_question_do_not_depend_on_other_questions(tiny, world, retriever):
    policy, tokenizer = tiny
    rows = [question.row() for question in world.questions("test", limit=8)]
    options = {"retriever": retriever, "agent": TINY}
    hot = ask("search", policy, tokenizer, rows, sampling=Sampling(temperature=1.5, seed=1), **options)
    half = ask("search", policy, tokenizer, rows[5:], sampling=Sampling(temperature=1.5, seed=1), **options)
    other = ask("search", policy, tokenizer, rows, sampling=Sampling(temperature=1.5, seed=2), **options)

    def seen(outcomes):
        return [(one.id, one.answer, one.model_tokens) for one in outcomes]

    assert seen(half) == seen(hot)[5:] and seen(other) != seen(hot)


def test_an_impossible_mode_is_refused(tokenizer):
    with pytest.raises(UserError, match="search, direct, cot, rag"):
        ask("agentic", None, tokenizer)
    with pytest.raises(UserError, match="AnswerOnly has no retriever"):
        ask("rag", None, tokenizer, environment=AnswerOnly())


@pytest.mark.parametrize(("mode", "key"), [("search", "max_completion_length"), ("direct", "max_turn_length")])
def test_questions_that_are_too_long_are_refused_before_the_first_answer(tokenizer, mode, key):
    policy = says(tokenizer, Answer("x"))
    policy.positions = 2048
    long = {"question": "\N{EURO SIGN}" * 700, "golden_answers": ["x"]}
    with pytest.raises(UserError, match=rf"1 of 7 questions are too long for mode '{mode}': .* row 6 .*Lower {key}"):
        ask(mode, policy, tokenizer, [*ROWS, long])
    assert policy.prompts == []
    assert len(ask("rag", policy, tokenizer, [*ROWS, long])) == 7  # its prompts are not known before the search
