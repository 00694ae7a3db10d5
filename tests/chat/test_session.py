"""A chat samples the tokens that a training rollout samples, and reports them, and every failure, as they come."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.fakes import FixedRetriever, ScriptedPolicy
from trl_search.chat.events import (
    NO_SEARCHES_LEFT,
    SEARCH_FAILED,
    Corrected,
    Event,
    Found,
    HeardEnvironment,
    HeardPolicy,
    Said,
    SearchFailed,
    Searching,
)
from trl_search.chat.interrupts import beside_main
from trl_search.chat.session import Chat, load_chat
from trl_search.chat.terminal import Painter, Screen, visible
from trl_search.common.errors import UserError
from trl_search.config.agent import TINY, AgentSettings, read_settings
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.environment import SearchEnvironment
from trl_search.policies.tiny import tiny_policy_path
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.protocols import PROTOCOLS, load_protocol
from trl_search.rollout import Limits, rollout
from trl_search.types import Answer, Passage, Sampling, Search, StopReason

GREEDY = Sampling(temperature=0.0)
LIMITS = Limits(1024, 256, 256)
PASSAGES = [Passage("7", "Orlune", "Orlune is a harbour town.", 2.5, "https://orlune.example/"), Passage("8", "V", "")]


def write(tokenizer, *actions: Search | Answer) -> list[str]:
    """The turns of a policy. No turn contains another, so the fake policy can tell which turn is next."""
    protocol = load_protocol("qwen_tools", tokenizer)
    return [protocol.write(f"turn {n}", action) for n, action in enumerate(actions)]


def scripted(tokenizer, turns: Sequence[str], retriever=None, **options) -> Chat:
    environment = HeardEnvironment(SearchEnvironment(retriever or FixedRetriever(PASSAGES), **options))
    protocol = load_protocol("qwen_tools", tokenizer, instruction="")
    return Chat(ScriptedPolicy(tokenizer, lambda _: turns), protocol, environment, LIMITS)


def ask(chat: Chat, question: str = "Where is Orlune?", **options):
    events: list[Event] = []
    with chat:
        return chat.ask(question, events.append, **options), events


# The shipped policy


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_chat_samples_the_tokens_of_a_rollout_and_streams_them(world, retriever, name):
    questions = [question for question in world.questions("test", limit=30) if question.type == "two_hop"][:3]
    settings = dataclasses.replace(TINY, protocol=name)
    right = 0
    with load_chat("tiny", retriever, settings=settings, sampling=GREEDY, device="cpu") as chat:
        for question in questions:
            events: list[Event] = []
            reply = chat.ask(question.question, events.append, seed=5)
            tokenizer, model = chat.protocol.tokenizer, chat.policy.engine.model
            trajectory = rollout(
                [chat.protocol.prompt_ids(chat.protocol.messages(question.question))],
                [{}],
                policy=TransformersPolicy(model, tokenizer),
                environment=SearchEnvironment(retriever, max_searches=3),
                protocol=chat.protocol,
                limits=settings.limits,
                sampling=GREEDY,
            )[0]
            assert list(reply.turns) == trajectory.messages
            assert reply.model_tokens == trajectory.model_tokens and reply.searches == trajectory.searches >= 2
            # Events come in order: the turn, the search, its passages, the next turn.
            kinds = [type(event) for i, event in enumerate(events) if i == 0 or type(event) is not type(events[i - 1])]
            assert kinds == [*[Said, Searching, Found] * reply.searches, Said]
            said = "".join(event.text for event in events if isinstance(event, Said))
            assert said == "".join(turn["content"] for turn in reply.turns if turn["role"] == "assistant")
            # The text comes token by token; the EOS is not text.
            pieces = [event for event in events if isinstance(event, Said)]
            assert len(pieces) > 0.8 * reply.model_tokens
            assert reply.passages == tuple(p for event in events if isinstance(event, Found) for p in event.passages)
            assert reply.queries == tuple(q for event in events if isinstance(event, Searching) for q in event.queries)
            right += reply.answer in question.golden_answers
    assert right >= 2


def test_a_chat_uses_the_settings_of_the_training(retriever):
    settings = dataclasses.replace(TINY, max_searches=0, instruction="Asked: ")
    with load_chat("tiny", retriever, settings=settings, device="cpu") as chat:
        assert chat.protocol.tools == [] and chat.protocol.instruction == "Asked: "


def test_a_seed_repeats_an_answer_and_is_reported(world, retriever):
    question = world.questions("test", limit=1)[0].question
    with load_chat("tiny", retriever, sampling=Sampling(temperature=2.0), device="cpu") as chat:
        first = chat.ask(question)
        again, other = chat.ask(question, seed=first.seed), chat.ask(question, seed=first.seed + 1)
    assert first.turns == again.turns != other.turns


def test_an_adapter_is_loaded_on_its_base_model(tmp_path, world, retriever):
    import torch
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(tiny_policy_path(), dtype="float32")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)  # large enough to change the answers
    adapted.save_pretrained(tmp_path)
    question = world.questions("test", limit=1)[0].question
    replies = []
    for name in ("tiny", str(tmp_path)):
        with load_chat(name, retriever, settings=TINY, sampling=GREEDY, device="cpu") as chat:
            replies.append(chat.ask(question))
    assert replies[0].answer is not None and replies[0].turns != replies[1].turns


# Failures


def test_a_failed_search_is_reported_to_the_user_and_to_the_model(tokenizer):
    turns = write(tokenizer, Search(("poison",)), Search(("orlune",)), Search(("poison 2",)), Answer("a town"))
    chat = scripted(tokenizer, turns, FixedRetriever(PASSAGES, poison="poison"), max_searches=3)
    reply, events = ask(chat)
    told = [event for event in events if not isinstance(event, Said)]
    assert [type(event) for event in told] == [Searching, SearchFailed, Searching, Found, Searching, SearchFailed]
    assert "the index is on fire" in told[1].error
    assert reply.failed_searches == (told[1].error, told[5].error) and reply.answer == "a town"
    heard = [turn["content"] for turn in reply.turns if turn["role"] == "tool"]
    assert heard[0] == SEARCH_FAILED and heard[2] == f"{SEARCH_FAILED} {NO_SEARCHES_LEFT}"
    assert "harbour" in heard[1] and len(reply.passages) == 2
    assert reply.stop_reason is StopReason.ANSWER
    record = json.loads(json.dumps(reply.as_json()))
    assert record["searches"] == 3 and record["queries"] == ["poison", "orlune", "poison 2"]
    assert record["passages"][0] == {
        "id": "7", "title": "Orlune", "url": "https://orlune.example/", "score": 2.5,
        "text": "Orlune is a harbour town.",
    }  # fmt: skip
    assert set(record["tokens"]) == {"model", "observation"} and record["stop_reason"] == "answer"


def test_an_empty_result_is_not_a_failure(tokenizer):
    reply, events = ask(scripted(tokenizer, write(tokenizer, Search(("x",)), Answer("?")), FixedRetriever([])))
    assert Found((), "Nothing was found.") in events and reply.failed_searches == ()


def test_a_call_runs_several_queries_within_the_budgets(tokenizer):
    turns = write(tokenizer, Search(("a", "b", "c")), Search(("d",)), Search(("e",)))
    reply, events = ask(scripted(tokenizer, turns, max_searches=2, max_queries=2, passages_per_query=1))
    assert [event for event in events if isinstance(event, Searching)] == [Searching(("a", "b")), Searching(("d",))]
    found = [event for event in events if isinstance(event, Found)]
    assert len(found[0].passages) == 2 and "Only the first 2 queries were run." in found[0].notice
    assert found[1].notice == NO_SEARCHES_LEFT
    assert reply.answer is None and reply.stop_reason is StopReason.SEARCH_BUDGET
    # Queries beyond the budgets were not run.
    assert reply.queries == ("a", "b", "d") and reply.searches == 2


def test_a_malformed_call_is_reported(tokenizer):
    turns = ["<tool_call>{nonsense}</tool_call>", *write(tokenizer, Answer("so"))]
    reply, events = ask(scripted(tokenizer, turns))
    corrected = next(event for event in events if isinstance(event, Corrected))
    assert "not valid JSON" in corrected.notice and reply.answer == "so" and reply.searches == 0


def test_an_interrupt_ends_the_answer_and_not_the_chat(tokenizer):
    turns = write(tokenizer, Search(("slow",)), Answer("done"))
    retriever = FixedRetriever(PASSAGES, seconds=90.0)
    started = time.monotonic()
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, Searching):
            # As from a terminal: the signal goes to the process, and any thread that does not block it may receive it.
            threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()

    with scripted(tokenizer, turns, retriever) as chat:
        with pytest.raises(KeyboardInterrupt):
            chat.ask("first", listen)
        told = len(events)
        retriever.seconds = 0.0
        assert chat.ask("second").answer == "done"
        assert chat.ask("third").failed_searches == ()
    assert len(events) == told, "the first listener got an event after its question was interrupted"
    assert time.monotonic() - started < 60, "the second question waited for the search of the first"


def test_a_chat_works_inside_a_running_event_loop(tokenizer):
    async def notebook():
        with scripted(tokenizer, write(tokenizer, Answer("yes"))) as chat:
            return chat.ask("one").answer, chat.ask("two").answer

    assert asyncio.run(notebook()) == ("yes", "yes")


def test_an_exception_of_the_listener_reaches_the_caller(tokenizer):
    def breaks(event: Event) -> None:
        raise BrokenPipeError

    with scripted(tokenizer, write(tokenizer, Answer("yes"))) as chat:
        with pytest.raises(BrokenPipeError):
            chat.ask("one", breaks)
        with pytest.raises(UserError, match="empty"):
            chat.ask("  ")
    chat.close()  # closing twice is allowed


def test_a_character_of_several_tokens_is_not_split(tokenizer):
    protocol = load_protocol("qwen_tools", tokenizer)
    text = "né à Zürich 🚀 東京"
    ids = protocol.encode(text)
    pieces: list[str] = []
    heard = HeardPolicy(ScriptedPolicy(tokenizer, lambda _: [""]), protocol, lambda event: pieces.append(event.text))
    for n in range(len(ids)):
        heard.hear(ids[: n + 1])
    assert len(ids) > len(text) > len(pieces) > 5 and "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


# Loading


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{tmp}/nothing", "there is no model at {tmp}/nothing"),
        ("./runs/nothing", "there is no model at runs/nothing"),
        ("{tmp}/empty", "holds no model.*give {tmp}/empty/checkpoint-20"),
        ("{tmp}/file", "is a file"),
        ("{tmp}/cut", "the tokenizer of {tmp}/cut cannot be loaded"),
        ("nobody/no-such-model", "nobody/no-such-model is not on this machine, .*: give a path"),
    ],
)
def test_a_model_that_cannot_be_loaded(tmp_path, name, message):
    for step in (3, 20):
        (tmp_path / f"empty/checkpoint-{step}").mkdir(parents=True)
        (tmp_path / f"empty/checkpoint-{step}/config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/config.json").write_text("{}")
    with pytest.raises(UserError, match=message.format(tmp=tmp_path)):
        load_chat(name.format(tmp=tmp_path), FixedRetriever([]))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dtype": "float33"}, "there is no dtype 'float33'"),
        ({"device": "gpu0"}, "there is no device 'gpu0'"),
        ({"device": "cuda:7"}, "torch finds no GPU here"),
        ({"server": "localhost:8000"}, "must begin with http://"),
    ],
)
def test_impossible_options_are_refused(option, message):
    import torch

    if "cuda" in str(option) and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=message):
        load_chat("tiny", FixedRetriever([]), **option)


def test_a_model_without_chat_template_names_the_remedy(tmp_path, world, retriever):
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tiny_policy_path()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"needs a chat template.*use protocol='search_r1'"):
        load_chat(str(tmp_path), retriever)
    settings = AgentSettings(protocol="search_r1", instruction="", max_turn_length=40, max_completion_length=80)
    with load_chat(str(tmp_path), retriever, settings=settings, device="cpu") as chat:
        assert chat.ask("Who?").turns


# The settings that a model was trained with


def test_the_defaults_are_those_of_the_training():
    defaults = {field.name: field.default for field in dataclasses.fields(SearchGRPOConfig)}
    for name, value in dataclasses.asdict(AgentSettings()).items():
        assert value == defaults[name], name


def test_the_settings_of_a_training_are_read_from_the_folder_of_the_model(tmp_path):
    assert read_settings(str(tmp_path)) is None
    config = {"protocol": "search_r1", "instruction": "", "max_searches": 2, "learning_rate": 1e-6}
    (tmp_path / "run.json").write_text(json.dumps({"format": 1, "config": config}))
    (tmp_path / "checkpoint-5").mkdir()
    wanted = AgentSettings(protocol="search_r1", instruction="", max_searches=2)
    assert read_settings(str(tmp_path)) == read_settings(str(tmp_path / "checkpoint-5")) == wanted
    published = dataclasses.replace(wanted, system_prompt="Be brief.", search_timeout_s=5)
    (tmp_path / "checkpoint-5/trl_search.json").write_text(json.dumps(published.as_json()))
    assert read_settings(str(tmp_path / "checkpoint-5")) == published
    thinking = dataclasses.replace(wanted, chat_template_kwargs={"enable_thinking": False})
    (tmp_path / "run.json").write_text(json.dumps({"config": thinking.as_json()}))
    assert read_settings(str(tmp_path)) == thinking


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1, "config": {"proto', "run.json is not JSON"),
        ('{"format": 1}', "run.json has no config"),
        ("[]", "holds no JSON object"),
        ('{"config": {"max_searches": "four"}}', "max_searches is 'four', but must be a whole number"),
        ('{"config": {"instruction": [4]}}', r"instruction is \[4\], but must be a string"),
        ('{"config": {"chat_template_kwargs": "x"}}', "chat_template_kwargs is not JSON"),
    ],
)
def test_an_incomplete_record_is_refused(tmp_path, text, message):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_settings(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"r": 4', "adapter_config.json is not JSON.*save the adapter again"), ('{"r": 4}', "no base model")],
)
def test_a_damaged_adapter_is_named(tmp_path, retriever, text, message):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_chat(str(tmp_path), retriever)


# The screen


@given(st.text(st.characters(codec=None, categories=["Cc", "Cf", "Cs", "Lu", "Lo", "Zs", "Zl", "Zp"]), max_size=60))
def test_no_text_of_a_model_moves_the_cursor(text):
    shown = visible(text)
    assert not any((ord(char) < 32 and char not in "\t\n") or 127 <= ord(char) < 160 for char in shown)
    assert not any("\u202a" <= char <= "\u202e" or "\ud800" <= char <= "\udfff" for char in shown)
    shown.encode()


TAGGED = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "a", " <", "</", "<b>", "x>", "<t"]
    ),
    max_size=12,
).map("".join)


@given(TAGGED, st.lists(st.integers(1, 5), min_size=1))
def test_styles_do_not_depend_on_how_the_text_is_split(text, sizes):
    def styled(pieces: Sequence[str]) -> list[tuple[str, str]]:
        painter = Painter()
        painted = [part for piece in pieces for part in painter.feed(piece)] + list(painter.flush())
        return [(char, style) for part, style in painted for char in part]

    cut, at = [], 0
    while at < len(text):
        size = sizes[len(cut) % len(sizes)]
        cut.append(text[at : at + size])
        at += size
    assert styled(cut) == styled([text])
    assert "".join(char for char, _ in styled(cut)) == text


def shown(tmp_path: Path, events: Sequence[Event], **options) -> str:
    path = tmp_path / "screen"
    with path.open("w") as file:
        screen = Screen(Console(file=file, width=80, **options))
        for event in events:
            screen.show(event)
        screen.end_turn()
    return path.read_text()


def test_a_terminal_gets_colours_and_a_pipe_gets_the_text(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    evil = Passage("9", "\x1b]0;owned\x07Title", "text [bold]not markup[/] \x1b[2J", 1.0)
    events = [
        Said("<thi"), Said("nk> hm\x1b[31m </think>\n<tool_call>q</tool_call>"), Searching(("q\x9b2J", "r")),
        Found((evil,), "Only the first."), SearchFailed("no\x1bnet"), Corrected("again"), Said("<answer> x </answer>"),
    ]  # fmt: skip
    plain = shown(tmp_path, events)
    assert "\x1b" not in plain and "\x07" not in plain and "\x9b" not in plain
    assert "<think> hm\\x1b[31m </think>\n<tool_call>q</tool_call>\nsearching: q\\x9b2J | r\n" in plain
    assert "1. \\x1b]0;owned\\x07Title  [id 9, score 1.00]" in plain and "text [bold]not markup[/] \\x1b[2J" in plain
    assert "the search failed: no\\x1bnet\n" in plain and plain.endswith("<answer> x </answer>\n")
    terminal = {"force_terminal": True, "color_system": "standard"}
    coloured = shown(tmp_path, events, **terminal)
    assert "\x1b[1;32m<answer>\x1b[0m\x1b[1;32m x \x1b[0m" in coloured and "\x1b[36m<tool_call>" in coloured
    assert "\x1b[2;3m<think>" in coloured and "\x1b[2J" not in coloured and "\x1b]0;" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[36m" not in shown(tmp_path, events, **terminal)


def test_threads_beside_the_main_thread_leave_interrupts_to_it():
    masks = []

    def work():
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        thread = threading.Thread(target=lambda: masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
        thread.start()
        thread.join()
        return "loaded"

    assert beside_main(work) == "loaded"
    assert [signal.SIGINT in mask for mask in masks] == [True, True]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(UserError, match="no such model"):
        beside_main(lambda: (_ for _ in ()).throw(UserError("no such model")))
