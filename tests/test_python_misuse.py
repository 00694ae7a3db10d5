"""Any argument of a public function works, or is refused by a `UserError` of one line that says what is wrong."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.support.calculator import Calculator
from tests.support.fakes import FixedRetriever
from tests.support.scripted_trainer import DATA, PASSAGES, config
from trl_search import (
    Passage,
    SearchEnvironment,
    SearchGRPOConfig,
    SearchGRPOTrainer,
    ToolCall,
    load_environment,
    load_protocol,
    load_questions,
    load_retriever,
    play,
)
from trl_search.chat import load_chat
from trl_search.common.errors import UserError
from trl_search.config.agent import AgentSettings
from trl_search.rewards import resolve_rewards

ABSURD: list[Any] = [
    None, True, -1, 10**30, float("nan"), "", "nonsense", "no/such/folder", [], ["text"], {}, {"a": [1]}, object(),
    len, Calculator, lambda: Calculator(), b"bytes", Path("nowhere"),
]  # fmt: skip


def rows(**row: Any) -> Dataset:
    return Dataset.from_list([row] * 4)


def refused_or_done(call: Any, said: str) -> None:
    """The call returns, or raises a `UserError` of one line."""
    try:
        call()
    except UserError as error:
        assert str(error) and "\n" not in str(error), said
    except Exception as error:
        raise AssertionError(f"{said}: {type(error).__name__}: {error}") from error


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


ENTRIES: dict[str, Any] = {
    "load_retriever(kind)": lambda value, tokenizer: load_retriever(value),
    "load_retriever(index)": lambda value, tokenizer: load_retriever("bm25", index=value),
    "load_retriever(passages)": lambda value, tokenizer: load_retriever("bm25", passages=value),
    "load_environment(name)": lambda value, tokenizer: load_environment(value),
    "load_environment(retriever)": lambda value, tokenizer: load_environment("search", retriever=value),
    "load_protocol(name)": lambda value, tokenizer: load_protocol(value, tokenizer),
    "load_protocol(tokenizer)": lambda value, tokenizer: load_protocol("qwen_tools", value),
    "load_protocol(tools)": lambda value, tokenizer: load_protocol("qwen_tools", tokenizer, tools=value),
    "load_protocol(instruction)": lambda value, tokenizer: load_protocol("qwen_tools", tokenizer, instruction=value),
    "load_questions(name)": lambda value, tokenizer: load_questions(value),
    "resolve_rewards": lambda value, tokenizer: resolve_rewards(value),
    "SearchEnvironment(retriever)": lambda value, tokenizer: SearchEnvironment(value),
    "play(environment)": lambda value, tokenizer: play(value, []),
    "play(turns)": lambda value, tokenizer: play(Calculator(), value),
    "play(row)": lambda value, tokenizer: play(Calculator(), [ToolCall("add", {"a": 1, "b": 2})], value),
    "play(protocol)": lambda value, tokenizer: play(Calculator(), ["x"], protocol=value),
    "load_chat(model)": lambda value, tokenizer: load_chat(value, FixedRetriever([])),
    "load_chat(retriever)": lambda value, tokenizer: load_chat("tiny", value),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_public_function_works_or_says_what_is_wrong(entry: str, tokenizer) -> None:
    for value in ABSURD:
        refused_or_done(lambda value=value: ENTRIES[entry](value, tokenizer), f"{entry} with {value!r:.40}")


@pytest.mark.parametrize(
    "name", ["passages_per_query", "max_searches", "max_queries", "max_invalid", "timeout_s", "passage_template"]
)
def test_a_search_environment_works_or_says_what_is_wrong(name: str) -> None:
    for value in ABSURD:
        refused_or_done(
            lambda value=value: SearchEnvironment(FixedRetriever([]), **{name: value}), f"{name}={value!r:.40}"
        )


@pytest.mark.parametrize("cls", [AgentSettings, SearchGRPOConfig])
def test_a_configuration_works_or_says_what_is_wrong(cls: type) -> None:
    draw = random.Random(0)
    fixed = {} if cls is AgentSettings else {"output_dir": "runs/x", "use_cpu": True, "bf16": False}
    keys = {field.name for field in dataclasses.fields(AgentSettings)}
    keys |= set() if cls is AgentSettings else set(SearchGRPOConfig.__annotations__) - {"_VALID_DICT_FIELDS"}
    for name in sorted(keys):
        for value in ABSURD if cls is AgentSettings else draw.sample(ABSURD, 3):
            refused_or_done(lambda name=name, value=value: cls(**{**fixed, name: value}), f"{name}={value!r:.40}")


@pytest.mark.parametrize(
    "argument",
    ["model", "reward_funcs", "train_dataset", "eval_dataset", "processing_class", "retriever", "environment"],
)
def test_the_trainer_is_built_or_says_what_is_wrong(argument: str, random_model, tokenizer, tmp_path: Path) -> None:
    for value in random.Random(argument).sample(ABSURD, 9):  # each takes a tenth of a second
        given = {
            "model": random_model,
            "args": config(tmp_path),
            "reward_funcs": "em",
            "train_dataset": DATA,
            "processing_class": tokenizer,
            "retriever": None if argument == "environment" else FixedRetriever(PASSAGES),
        }
        refused_or_done(
            lambda given=given, value=value: SearchGRPOTrainer(**{**given, argument: value}),
            f"{argument}={value!r:.40}",
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"environment": Calculator}, "environment=Calculator is a class: give an instance"),
        ({"environment": Calculator()}, None),
        ({"retriever": "bm25"}, "bm25 needs one of index=DIR, corpus=FILE.jsonl and passages="),
        ({"retriever": "indexes/wiki"}, "indexes/wiki"),
        ({"retriever": ["a passage"]}, 'retriever is a list: load_retriever\\("bm25", passages='),
        (
            {"train_dataset": list(DATA)},
            r"train_dataset must be a Dataset, not list: convert a list with Dataset.from_list\(rows\)",
        ),
        ({"train_dataset": "train.csv"}, r"not str: load_questions\('train.csv'\) reads a file or a set"),
        ({"train_dataset": DATA.to_pandas()}, r"not DataFrame: convert it with Dataset.from_pandas\(frame\)"),
        ({"train_dataset": None}, "train_dataset must be a Dataset, not NoneType"),
        ({"train_dataset": rows(question=None, golden_answers=["x"])}, r"\[0\] has no question: it is None"),
        ({"train_dataset": rows(question=7, golden_answers=["x"])}, r"\[0\] has no question: it is 7"),
        (
            {"train_dataset": rows(question="Who?", golden_answers=[])},
            "the column 'golden_answers' of train_dataset is empty in every row",
        ),
        (
            {"train_dataset": rows(question="Who?", golden_answers=["x", " "])},
            r"train_dataset\[0\] has a blank golden answer, \['x', ' '\]: leave it out of golden_answers",
        ),
        ({"processing_class": "gpt2"}, "processing_class must be a tokenizer, .* not 'gpt2'"),
        ({"processing_class": None}, "the model has no name from which to load a tokenizer: give processing_class"),
        ({"model": 3}, "model must be a name, a folder or a PreTrainedModel, not int"),
        ({"reward_funcs": {"em": 1.0}}, r"set reward_funcs=\['em'\], and reward_weights=\[1.0\] in the configuration"),
        ({"reward_funcs": "em"}, None),
    ],
    # Without the values: they contain addresses, which differ per process, and pytest-xdist compares the names.
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_common_mistakes_are_named(
    arguments: dict, message: str | None, random_model, tokenizer, tmp_path: Path
) -> None:
    random_model.config._name_or_path = ""
    usual = {"model": random_model, "args": config(tmp_path), "train_dataset": DATA, "processing_class": tokenizer}
    if "environment" not in arguments:
        usual["retriever"] = FixedRetriever(PASSAGES)
    if message is None:
        SearchGRPOTrainer(**{**usual, **arguments})
        return
    with pytest.raises(UserError, match=message):
        SearchGRPOTrainer(**{**usual, **arguments})


@pytest.mark.parametrize("place", ["indexes/wiki", "http://localhost:8000"])
def test_for_a_place_instead_of_a_kind_the_error_says_what_opens_it(place: str) -> None:
    with pytest.raises(UserError, match=rf"'{place}' is not a kind of retriever: .* open_retriever\('{place}'\)"):
        load_retriever(place)


def test_for_a_passage_that_is_only_text_the_error_shows_how_to_write_it() -> None:
    with pytest.raises(
        UserError, match=r"passage 1 is 'text': write it as Passage\(id='1', title='...', text='...'\)"
    ):
        load_retriever("bm25", passages=["text"])
    assert load_retriever("bm25", passages=[Passage("1", "", "text")]).search(["text"], 1)
