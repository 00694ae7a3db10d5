"""The rollout loop: what the policy sees, what is masked, how trajectories end, and that none waits for another."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import signal
import threading
import time
import traceback

import pytest

from tests.support.calculator import Calculator
from tests.support.fakes import FixedRetriever, ScriptedPolicy
from trl_search.common.errors import UserError
from trl_search.common.event_loop import run_sync
from trl_search.environment import AnswerOnly, Environment, SearchEnvironment
from trl_search.policies.base import Policy
from trl_search.protocols import PROTOCOLS, load_protocol
from trl_search.retrieval.base import RetrievalError
from trl_search.retrieval.threads import MAX_HUNG
from trl_search.rollout import Job, Limits, rollout
from trl_search.types import (
    Answer,
    Completion,
    FinishReason,
    Observation,
    Passage,
    Sampling,
    Search,
    StopReason,
    ToolCall,
)

PASSAGES = [Passage(str(i), f"Title {i}", f"Quiet Raven is a novel by Mira Talvane, part {i}.") for i in range(5)]
LIMITS = Limits(completion_tokens=1000, turn_tokens=200, observation_tokens=300)


def run(
    tokenizer,
    script,
    *,
    name="qwen_tools",
    questions=("Who wrote Quiet Raven?",),
    environment=None,
    limits=LIMITS,
    retriever=None,
    **options,
):
    protocol = load_protocol(name, tokenizer, instruction="")
    policy = ScriptedPolicy(tokenizer, script if callable(script) else lambda _: script, **options)
    environment = environment or SearchEnvironment(retriever or FixedRetriever(PASSAGES), max_searches=2)
    protocol.tools = list(environment.tools)
    trajectories = rollout(
        [protocol.prompt_ids(protocol.messages(question)) for question in questions],
        [{"question": question} for question in questions],
        policy=policy,
        environment=environment,
        protocol=protocol,
        limits=limits,
        sampling=Sampling(),
    )
    return trajectories, policy, protocol


def turns(protocol_name, tokenizer, *actions):
    protocol = load_protocol(protocol_name, tokenizer)
    return [protocol.write("hm", action) for action in actions]


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_a_search_and_an_answer(tokenizer, name):
    script = turns(name, tokenizer, Search(("author of Quiet Raven",)), Answer("Mira Talvane"))
    (trajectory,), _, protocol = run(tokenizer, script, name=name)
    assert trajectory.stop_reason is StopReason.ANSWER
    assert trajectory.actions == [Search(("author of Quiet Raven",)), Answer("Mira Talvane")]
    assert trajectory.searches == 1 and [p.id for p in trajectory.passages[0]] == ["0", "1", "2"]
    assert [turn.role for turn in trajectory.turns if turn.text] == ["assistant", "tool", "assistant"]
    assert trajectory.ids[-1] == tokenizer.eos_token_id
    # Masked tokens spell the frame and the passages; the others spell exactly what the policy sampled.
    trained = [i for i, m in zip(trajectory.ids, trajectory.mask, strict=True) if m]
    assert protocol.decode(trained).replace("<|im_end|>", "") == "".join(script)


# Pitfall 1: the next prompt is exactly prompt ids + sampled ids + observation ids; nothing is encoded again.
@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_each_prompt_extends_the_ids_that_were_sampled(tokenizer, name):
    script = turns(name, tokenizer, Search(("a",)), Search(("b",)), Answer("c"))
    (trajectory,), policy, _ = run(tokenizer, script, name=name)
    for i, prompt in enumerate(policy.prompts):
        start = [turn.start for turn in trajectory.turns if turn.role == "assistant"][i]
        assert prompt == [*trajectory.prompt_ids, *trajectory.ids[:start]]


def test_ids_that_would_be_encoded_differently_are_kept(tokenizer):
    """A policy may sample ' Mi' + 'ra' where the tokenizer writes ' Mira': the sampled ids are kept and trained on."""
    odd = [i for letter in " Mira" for i in tokenizer.encode(letter)]
    assert tokenizer.encode(tokenizer.decode(odd)) != odd
    script = turns("qwen_tools", tokenizer, Answer("x"))
    protocol = load_protocol("qwen_tools", tokenizer)

    class OddPolicy(ScriptedPolicy):
        async def generate(self, prompt_ids, **options):
            completion = await super().generate(prompt_ids, **options)
            ids, logprobs = (*odd, *completion.ids), (*[-1.0] * len(odd), *completion.logprobs)
            return dataclasses.replace(completion, ids=ids, logprobs=logprobs)

    (trajectory,) = rollout(
        [(1, 2)], [{}], policy=OddPolicy(tokenizer, lambda _: script), environment=AnswerOnly(), protocol=protocol,
        limits=LIMITS, sampling=Sampling(),
    )  # fmt: skip
    assert trajectory.ids[: len(odd)] == odd


# Pitfall 2: a stop string can end inside a token; ids and logprobs are kept, and the text is parsed up to the tag.
def test_a_token_that_runs_past_the_stop_string_is_kept(tokenizer):
    script = turns("search_r1", tokenizer, Search(("a",)), Answer("c"))
    (trajectory,), _, protocol = run(tokenizer, script, name="search_r1", extra_tokens_after_stop="\n\n")
    assert trajectory.actions == [Search(("a",)), Answer("c")]
    trained = [i for i, m in zip(trajectory.ids, trajectory.mask, strict=True) if m]
    assert protocol.decode(trained) == "".join(turn + "\n\n" for turn in script)


# Pitfall 11: when the searches are used up, the policy is told so and still generates the last turn.
def test_there_is_a_final_turn_after_the_last_search(tokenizer):
    script = turns("qwen_tools", tokenizer, Search(("a",)), Search(("b",)), Answer("c"))
    (trajectory,), policy, _ = run(tokenizer, script)
    tool_turns = [turn.text for turn in trajectory.turns if turn.role == "tool" and turn.text]
    assert "no searches left" not in tool_turns[0] and "You have no searches left: answer now." in tool_turns[1]
    assert len(policy.prompts) == 3 and trajectory.stop_reason is StopReason.ANSWER


def test_a_search_beyond_the_budget_ends_the_trajectory(tokenizer):
    script = turns("qwen_tools", tokenizer, Search(("a",)), Search(("b",)), Search(("c",)), Answer("d"))
    retriever = FixedRetriever(PASSAGES)
    (trajectory,), _, _ = run(tokenizer, script, retriever=retriever)
    assert trajectory.stop_reason is StopReason.SEARCH_BUDGET
    assert [query for batch in retriever.batches for query in batch] == ["a", "b"]


def test_each_turn_may_use_the_rest_of_the_budget(tokenizer):
    script = turns("qwen_tools", tokenizer, Search(("a",)), Answer("c"))
    limits = Limits(completion_tokens=180, turn_tokens=150, observation_tokens=300)
    (trajectory,), policy, _ = run(tokenizer, script, limits=limits)
    spent = next(turn.start for turn in trajectory.turns[2:] if turn.role == "assistant")
    assert policy.budgets == [150, min(150, 180 - spent)]
    assert len(trajectory.ids) <= limits.completion_tokens + 1


@pytest.mark.parametrize("tokens", range(1, 140, 7))
def test_a_trajectory_is_valid_under_any_budget(tokenizer, tokens):
    script = turns("qwen_tools", tokenizer, Search(("a",)), Search(("b",)), Answer("c"))
    (trajectory,), _, _ = run(tokenizer, script, limits=Limits(tokens, 40, 60))
    assert len(trajectory.ids) >= 1 and trajectory.stop_reason is not None
    assert len(trajectory.ids) <= tokens + 1  # the EOS that closes it for TRL may be added
    if trajectory.stop_reason is StopReason.TOKEN_BUDGET:
        assert len(trajectory.mask) == len(trajectory.ids)


def test_malformed_calls_are_corrected_counted_and_limited(tokenizer):
    bad = "<tool_call>\n{oops\n</tool_call>"
    (trajectory,), _, _ = run(tokenizer, [bad, *turns("qwen_tools", tokenizer, Answer("c"))])
    assert trajectory.malformed == 1 and trajectory.stop_reason is StopReason.ANSWER
    assert any("not valid JSON" in turn.text for turn in trajectory.turns if turn.role == "tool")
    (trajectory,), _, _ = run(tokenizer, lambda _: [f"<tool_call>\n{{oops {time.perf_counter_ns()}\n</tool_call>"])
    assert trajectory.malformed == 3 and trajectory.stop_reason is StopReason.TURN_BUDGET


# Pitfall 10: a failed retrieval fails only its trajectory.
def test_a_failed_search_ends_only_its_trajectory(tokenizer):
    def script(prompt):
        query = "poison" if "Question 1?" in prompt else "fine"
        return turns("qwen_tools", tokenizer, Search((query,)), Answer("c"))

    questions = [f"Question {i}?" for i in range(4)]
    trajectories, _, _ = run(
        tokenizer, script, questions=questions, retriever=FixedRetriever(PASSAGES, poison="poison")
    )
    assert [t.failed for t in trajectories] == [False, True, False, False]
    assert "on fire" in trajectories[1].error


def test_a_hanging_search_times_out_and_the_others_continue(tokenizer):
    class Hangs(FixedRetriever):
        def search(self, queries, k):
            if "slow" in queries:
                released.wait(120)
            return super().search(queries, k)

    def script(prompt):
        return turns("qwen_tools", tokenizer, Search(("slow" if "Question 0?" in prompt else "quick",)), Answer("c"))

    released = threading.Event()
    environment = SearchEnvironment(Hangs(PASSAGES), timeout_s=0.3)
    started = time.perf_counter()
    trajectories, _, _ = run(tokenizer, script, questions=["Question 0?"], environment=environment)
    assert trajectories[0].failed and "timed out" in trajectories[0].error
    assert time.perf_counter() - started < 60
    released.set()


def test_an_empty_result_is_not_a_failure(tokenizer):
    script = turns("qwen_tools", tokenizer, Search(("a",)), Answer("c"))
    (trajectory,), _, _ = run(tokenizer, script, retriever=FixedRetriever([]))
    assert trajectory.stop_reason is StopReason.ANSWER and trajectory.passages == [()]
    assert any("Nothing was found." in turn.text for turn in trajectory.turns)


# One coroutine per trajectory and no turn barrier: slow trajectories delay no others, and searches are batched.
def test_there_is_no_turn_barrier_and_searches_are_batched(tokenizer):
    class Slow(SearchEnvironment):
        """The first search of question 0 lasts until all other questions are answered."""

        async def step(self, action):
            if self.row["question"] == "Question 0?" and isinstance(action, Search):
                async with asyncio.timeout(120):
                    await others_answered.wait()
            if isinstance(action, Answer):
                answered.append(self.row["question"])
                if len(answered) == 15:
                    others_answered.set()
            return await super().step(action)

    answered: list[str] = []
    others_answered = asyncio.Event()
    retriever = FixedRetriever(PASSAGES, seconds=0.02)
    questions = [f"Question {i}?" for i in range(16)]

    def script(prompt):
        number = prompt.split("Question ")[1].split("?")[0]
        return turns("qwen_tools", tokenizer, Search((f"a {number}",)), Search((f"b {number}",)), Answer("c"))

    trajectories, _, _ = run(tokenizer, script, questions=questions, environment=Slow(retriever, max_searches=3))
    assert all(t.searches == 2 for t in trajectories)
    assert answered[-1] == "Question 0?" and len(answered) == 16
    assert len(retriever.batches) < 16  # fewer calls than queries


def test_results_come_in_the_order_of_the_prompts(tokenizer):
    class Late(AnswerOnly):
        async def step(self, action):
            await asyncio.sleep(0.1 if self.row["question"] == "Question 0?" else 0)
            return await super().step(action)

    def script(prompt):
        return turns("qwen_tools", tokenizer, Answer(prompt.split("Question ")[1][0]))

    questions = [f"Question {i}?" for i in range(5)]
    trajectories, _, _ = run(tokenizer, script, questions=questions, environment=Late())
    assert [t.actions[0] for t in trajectories] == [Answer(str(i)) for i in range(5)]


def test_a_users_environment_with_state(tokenizer):
    class Guess(Environment):
        tools = ()

        def start(self, row):
            game = super().start(row)
            game.guesses = 0
            return game

        async def step(self, action):
            self.guesses += 1
            if not isinstance(action, Answer) or action.text == "7":
                return Observation(done=StopReason.ENVIRONMENT)
            return Observation(notice=f"No, guess {self.guesses} is wrong.")

    script = turns("qwen_tools", tokenizer, Answer("3"), Answer("5"), Answer("7"))
    trajectories, _, _ = run(tokenizer, script, questions=["A?", "B?"], environment=Guess())
    assert all(t.stop_reason is StopReason.ENVIRONMENT and len(t.actions) == 3 for t in trajectories)


def test_an_environment_that_raises_fails_only_its_trajectory(tokenizer, caplog):
    class Broken(AnswerOnly):
        async def step(self, action):
            if self.row["question"] == "B?":
                raise KeyError("row")
            return await super().step(action)

    script = turns("qwen_tools", tokenizer, Answer("x"))
    trajectories, _, _ = run(tokenizer, script, questions=["A?", "B?"], environment=Broken())
    assert [t.failed for t in trajectories] == [False, True]
    assert "Broken.step failed" in caplog.text


def test_a_failure_of_the_environment_is_logged_once_with_its_traceback(tokenizer, caplog):
    class Fragile(AnswerOnly):
        async def step(self, action):
            raise KeyError(self.row["question"])

    script = turns("qwen_tools", tokenizer, Answer("x"))
    trajectories, _, _ = run(tokenizer, script, questions=["A?", "B?", "C?"], environment=Fragile())
    assert {t.stop_reason for t in trajectories} == {StopReason.ENVIRONMENT_FAILED}
    assert [t.error for t in trajectories] == [f"KeyError('{name}?')" for name in "ABC"]
    (record,) = caplog.records
    assert "Fragile.step failed" in record.message
    frames = traceback.extract_tb(record.exc_info[2])
    assert [frame.filename for frame in frames] == [__file__]


def test_a_search_that_fails_in_a_users_step_is_a_failed_search(tokenizer, caplog):
    class Asks(AnswerOnly):
        def step(self, action):
            raise RetrievalError("the index is on fire")

    (trajectory,), _, _ = run(tokenizer, turns("qwen_tools", tokenizer, Answer("x")), environment=Asks())
    assert (trajectory.stop_reason, trajectory.error) == (StopReason.RETRIEVAL_FAILED, "the index is on fire")
    assert not caplog.records


def test_a_start_method_that_returns_a_shared_environment_is_refused(tokenizer):
    class Shared(AnswerOnly):
        def start(self, row):
            self.row = row
            return self

    with pytest.raises(UserError, match=r"Shared.start returned the environment itself, which all trajectories"):
        run(tokenizer, turns("qwen_tools", tokenizer, Answer("x")), environment=Shared())


def test_calls_of_other_tools_are_counted_separately_from_searches(tokenizer):
    script = turns("qwen_tools", tokenizer, ToolCall("add", {"a": 1, "b": 2}), Answer("3"))
    (trajectory,), _, _ = run(tokenizer, script, environment=Calculator())
    assert (trajectory.calls, trajectory.searches) == (1, 0)
    assert next(turn.text.strip() for turn in trajectory.turns if turn.role == "tool") == "3"


def test_an_engine_that_raises_ends_the_rollout_and_nothing_hangs(tokenizer):
    class Dies(ScriptedPolicy):
        closed = False

        async def generate(self, prompt_ids, **options):
            if "Question 2?" in self.tokenizer.decode(list(prompt_ids)):
                raise RuntimeError("out of memory")
            await asyncio.sleep(600)

        async def close(self):
            Dies.closed = True

    protocol = load_protocol("qwen_tools", tokenizer, instruction="")
    prompts = [protocol.prompt_ids(protocol.messages(f"Question {i}?")) for i in range(4)]
    started = time.perf_counter()
    with pytest.raises(RuntimeError, match="out of memory"):
        rollout(prompts, [{}] * 4, policy=Dies(tokenizer, lambda _: []), environment=AnswerOnly(), protocol=protocol,
                limits=LIMITS, sampling=Sampling())  # fmt: skip
    assert time.perf_counter() - started < 60 and Dies.closed


def test_the_engine_is_closed_even_if_closing_the_environment_fails(tokenizer):
    closed = []

    class Stuck(AnswerOnly):
        async def close(self):
            raise OSError("the sandbox is gone")

    class Engine(ScriptedPolicy):
        async def close(self):
            closed.append(True)

    protocol = load_protocol("qwen_tools", tokenizer, instruction="")
    turn = protocol.write("hm", Answer("x"))
    with pytest.raises(OSError, match="sandbox"):
        rollout([protocol.prompt_ids(protocol.messages("A?"))], [{}], policy=Engine(tokenizer, lambda _: [turn]),
                environment=Stuck(), protocol=protocol, limits=LIMITS, sampling=Sampling())  # fmt: skip
    assert closed == [True]


def test_rollouts_run_inside_a_running_event_loop(tokenizer):
    """As in a notebook."""

    async def cell():
        return run(tokenizer, turns("qwen_tools", tokenizer, Answer("x")))

    (trajectory,), _, _ = asyncio.run(cell())
    assert trajectory.stop_reason is StopReason.ANSWER


def test_interrupting_a_notebook_cell_ends_its_rollout():
    """Ctrl-C reaches the main thread, but the rollout runs on another."""
    ended = []

    async def endless():
        try:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            ended.append(threading.current_thread().name)

    async def cell():
        with pytest.raises(KeyboardInterrupt):
            run_sync(endless())
        return list(ended), [thread.name for thread in threading.enumerate()]

    loop = asyncio.new_event_loop()  # asyncio.run has its own handler
    ended_there, alive = loop.run_until_complete(cell())
    loop.close()
    assert ended_there == ["rollout"] and "rollout" not in alive


# Stop strings inside a thought are ignored.
def test_a_stop_string_inside_a_thought_does_not_end_the_turn(tokenizer):
    thought = "<think> I could <search> x </search>"
    rest = [" or </search> answer. </think> <search> author of Quiet Raven </search>", "<answer> Mira </answer>"]
    script = [thought, *rest]
    (trajectory,), policy, _ = run(tokenizer, script, name="search_r1")
    assert trajectory.actions == [Search(("author of Quiet Raven",)), Answer("Mira")]
    assert trajectory.spoken == [thought + rest[0], rest[1]]
    assert trajectory.stop_reason is StopReason.ANSWER and sum(trajectory.mask) == trajectory.model_tokens
    assert policy.prompts[1] == [*policy.prompts[0], *tokenizer.encode(thought, add_special_tokens=False)]


class Interrupted(Policy):
    """Returns `part` tokens of a turn per request, like an engine that is interrupted repeatedly."""

    def __init__(self, tokenizer, script, *, part):
        self.tokenizer, self.script, self.part = tokenizer, list(script), part
        self.left, self.seen = [], 0

    async def generate(self, prompt_ids, *, max_tokens, sampling, stop=(), stop_token_ids=()):
        if len(prompt_ids) != self.seen:  # after an observation, a new turn begins
            # One token per letter; otherwise a tag would be one token, which no interruption splits.
            letters = (self.tokenizer.encode(letter, add_special_tokens=False) for letter in self.script.pop(0))
            self.left = [*(token for letter in letters for token in letter), self.tokenizer.eos_token_id]
        ids = []
        while self.left and len(ids) < min(self.part, max_tokens):
            ids.append(self.left.pop(0))
            if any(string in self.tokenizer.decode(ids) for string in stop):
                self.left, reason = [], FinishReason.STOP
                break
        else:
            reason = FinishReason.LENGTH if len(ids) == max_tokens else FinishReason.INTERRUPTED
            reason = reason if self.left else FinishReason.EOS
        self.seen = len(prompt_ids) + len(ids)
        return Completion(tuple(ids), (-0.5,) * len(ids), reason, (4,) * len(ids))


@pytest.mark.parametrize("part", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("name", ["qwen_tools", "search_r1"])
def test_an_interrupted_turn_is_continued(tokenizer, name, part):
    """A stop string that an interruption splits is still found: nothing after the call is generated."""
    script = turns(name, tokenizer, Search(("author of Quiet Raven",)), Answer("Mira Talvane"))
    if name == "search_r1":
        script = [turn + " and so on </so on" for turn in script]
    protocol = load_protocol(name, tokenizer, instruction="")
    (trajectory,) = rollout(
        [protocol.prompt_ids(protocol.messages("Who wrote Quiet Raven?"))],
        [{}],
        policy=Interrupted(tokenizer, script, part=part),
        environment=SearchEnvironment(FixedRetriever(PASSAGES)),
        protocol=protocol,
        limits=LIMITS,
        sampling=Sampling(),
    )
    assert trajectory.actions == [Search(("author of Quiet Raven",)), Answer("Mira Talvane")]
    assert trajectory.stop_reason is StopReason.ANSWER
    assert [turn.removesuffix(" and so on </so on") for turn in script] == [
        text.rstrip() for text in trajectory.spoken
    ]
    assert [4 if sampled else -1 for sampled in trajectory.mask] == trajectory.versions


# One trajectory fails and is masked and counted; the others continue.
@pytest.mark.parametrize("fault", ["surrogate", "no text", "none", "start"])
def test_a_failure_affects_only_its_trajectory(tokenizer, fault):
    class Faulty(SearchEnvironment):
        def start(self, row):
            if fault == "start" and row["question"] == "B?":
                raise KeyError("row")
            return super().start(row)

        async def step(self, action):
            if self.row["question"] != "B?" or fault == "start" or not isinstance(action, Search):
                return await super().step(action)
            return {
                "surrogate": lambda: Observation(documents=("half a pair \ud83d",), notice="\udc00"),
                "no text": lambda: Observation(documents=(None,)),
                "none": lambda: None,
            }[fault]()

    script = turns("qwen_tools", tokenizer, Search(("a",)), Answer("x"))
    environment = Faulty(FixedRetriever(PASSAGES))
    trajectories, _, _ = run(tokenizer, script, questions=["A?", "B?"], environment=environment)
    assert [trajectory.failed for trajectory in trajectories] == [False, fault != "surrogate"]
    assert trajectories[1].ids and bool(trajectories[1].error) == trajectories[1].failed
    if fault == "surrogate":
        assert any("half a pair \N{REPLACEMENT CHARACTER}" in turn.text for turn in trajectories[1].turns)


def test_extra_results_of_a_retriever_are_dropped(tokenizer):
    class Generous(FixedRetriever):
        def search(self, queries, k):
            return [list(self.passages) for _ in queries]

    script = turns("qwen_tools", tokenizer, Search(("a",)), Answer("x"))
    environment = SearchEnvironment(Generous(PASSAGES), passages_per_query=2)
    (trajectory,), _, _ = run(tokenizer, script, environment=environment)
    assert [passage.id for passage in trajectory.passages[0]] == ["0", "1"]


def test_a_retriever_that_hangs_in_every_batch_leaves_a_bounded_number_of_threads(tokenizer):
    release = threading.Event()

    class Hangs(FixedRetriever):
        def search(self, queries, k):
            release.wait()
            return super().search(queries, k)

    script = turns("qwen_tools", tokenizer, Search(("a",)), Answer("x"))
    environment = SearchEnvironment(Hangs(PASSAGES), timeout_s=0.01)
    before = threading.active_count()
    for _ in range(MAX_HUNG + 3):
        (trajectory,), _, _ = run(tokenizer, script, environment=environment)
        assert trajectory.failed
    assert threading.active_count() <= before + MAX_HUNG
    assert "hangs" in trajectory.error
    release.set()


def test_a_long_passage_costs_only_the_part_that_is_shown(tokenizer):
    encoded: list[int] = []

    class Counting(type(tokenizer)):
        def encode(self, text, **options):
            encoded.append(len(text))
            return super().encode(text, **options)

    counting = copy.deepcopy(tokenizer)
    counting.__class__ = Counting
    book = Passage("1", "A book", "Mira Talvane wrote it. " * 200_000)
    script = turns("qwen_tools", tokenizer, Search(("a",)), Answer("x"))
    (trajectory,), _, _ = run(counting, script, retriever=FixedRetriever([book]))
    assert trajectory.stop_reason is StopReason.ANSWER
    assert max(encoded) < 40 * LIMITS.observation_tokens


def run_more(tokenizer, more, *, finished=None):
    """Runs two trajectories and those that `more` adds. Returns those that ended, by index."""
    protocol = load_protocol("qwen_tools", tokenizer, instruction="")
    policy = ScriptedPolicy(tokenizer, lambda _: turns("qwen_tools", tokenizer, Answer("c")))
    ended = {}
    kept = rollout(
        [(1, 2), (1, 3)], [{}, {}], policy=policy, environment=AnswerOnly(), protocol=protocol, limits=LIMITS,
        sampling=Sampling(), more=more, on_finish=ended.__setitem__, finished=finished,
    )  # fmt: skip
    return ended, kept, policy


def test_a_trajectory_that_ends_may_add_others_to_the_batch(tokenizer):
    async def more(place, trajectory):
        return {place + 2: Job((1, place + 4), {}, key=str(place + 2))} if place < 4 else {}

    ended, kept, _ = run_more(tokenizer, more)
    assert sorted(ended) == list(range(6)) and [t.prompt_ids for t in kept] == [(1, 2), (1, 3)]
    assert [ended[place].prompt_ids for place in range(2, 6)] == [(1, 4), (1, 5), (1, 6), (1, 7)]


def test_an_exception_in_an_added_trajectory_ends_the_batch(tokenizer):
    async def more(place, trajectory):
        if place == 7:
            raise ValueError("no such question")
        return {7: Job((1, 4), {}, key="7")} if place == 0 else {}

    with pytest.raises(ValueError, match="no such question"):
        run_more(tokenizer, more)


def test_trajectories_that_an_earlier_process_finished_are_reported_but_not_repeated(tokenizer):
    _, (first, _), _ = run_more(tokenizer, None)
    ended, kept, policy = run_more(tokenizer, None, finished={0: first})
    assert kept[0] is first and ended[0] is first and len(policy.prompts) == 1
