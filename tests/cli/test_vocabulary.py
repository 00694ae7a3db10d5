"""All commands and recipes use the same name for the same thing."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, get_type_hints

import pytest

from trl_search.cli import commands
from trl_search.cli.main import command_names, main, with_underscores

# Other common names for the same things -> the name that we use.
FOREIGN = {
    "topk": "passages_per_query", "k": "passages_per_query", "num_passages": "passages_per_query",
    "retriever_args": "retriever_options", "retriever_kwargs": "retriever_options", "options": "retriever_options",
    "force": "overwrite", "timeout": "search_timeout_s", "out": "output", "output_path": "output",
    "dataset": "datasets", "n": "limit", "num_samples": "limit", "max_questions": "limit", "random_seed": "seed",
    "batch": "concurrency", "vllm_url": "server",
}  # fmt: skip


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Each command and `data` action with its parser, except `train` and `sft`, which take recipes."""
    for name in command_names():
        module = importlib.import_module(f"{commands.__name__}.{name.replace('-', '_')}")
        if not hasattr(module, "add_arguments"):
            continue
        parser = argparse.ArgumentParser(prog=name)
        module.add_arguments(parser)
        inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not inner:
            yield name, parser
        for action in inner:
            yield from ((f"{name} {word}", one) for word, one in action.choices.items())


def recipe_fields() -> dict[str, Any]:
    from trl_search.config.agent import AgentSettings
    from trl_search.config.grpo import SearchGRPOConfig
    from trl_search.config.task import TaskArguments
    from trl_search.trainer.cold_start.arguments import ColdStartArguments
    from trl_search.trainer.sft import SearchSFTConfig

    own: dict[str, Any] = {}
    for cls in (AgentSettings, TaskArguments, ColdStartArguments, SearchGRPOConfig, SearchSFTConfig):
        hints = get_type_hints(cls)
        own |= {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return own


PARSERS = dict(parsers())


def options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {
        action.option_strings[-1][2:]: action
        for action in parser._actions
        if action.option_strings and action.dest != "help"
    }


def test_every_command_is_covered() -> None:
    assert {name.split()[0] for name in PARSERS} == set(command_names()) - {"train", "sft"}


@pytest.mark.parametrize("name", PARSERS)
def test_no_command_has_another_name_for_a_known_thing(name: str) -> None:
    given = options(PARSERS[name])
    assert not given.keys() & FOREIGN.keys()
    assert all(option == option.lower() and "-" not in option for option in given)
    if {"retriever", "retrievers"} & {action.dest for action in PARSERS[name]._actions}:
        assert {"retriever_options", "world_passages", "world_seed"} <= given.keys()


def test_an_option_has_the_same_type_in_all_commands() -> None:
    kinds: dict[str, dict[tuple[Any, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, parser in PARSERS.items():
        for option, action in options(parser).items():
            # --output is a file or a folder, depending on the command; --server of the doctor takes several addresses.
            if option not in ("output", "server", "device"):
                kinds[option][(action.type or str, type(action).__name__, action.nargs)].append(name)
    assert {option: found for option, found in kinds.items() if len(found) > 1} == {}


def test_a_recipe_key_and_an_option_of_the_same_name_agree() -> None:
    keys = recipe_fields()
    for parser in PARSERS.values():
        for option, action in options(parser).items():
            if option in keys and action.type in (int, float):
                hint = str(keys[option])
                assert action.type.__name__ in hint or "Any" in hint, (parser.prog, option, hint)


@pytest.mark.parametrize("name", ["chat", "eval"])
def test_top_k_is_a_sampling_option_and_passages_have_another_name(name: str) -> None:
    given = options(PARSERS[name])
    assert "sampled" in str(given["top_k"].help) and "retrieved" in str(given["passages_per_query"].help)


@pytest.mark.parametrize("name", PARSERS)
def test_hyphens_and_underscores_are_equivalent(name: str) -> None:
    for option in options(PARSERS[name]):
        assert with_underscores(f"--{option.replace('_', '-')}") == f"--{option}"


@pytest.mark.parametrize("command", ["train", "sft"])
def test_recipes_take_hyphens_too(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"train": "quickstart", "sft": "sft_world"}[command]
    assert main([command, recipe, "--max-searches", "-1"]) == 2
    assert "max_searches=-1 must be at least 0" in capsys.readouterr().err
