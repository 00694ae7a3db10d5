"""Environments by name, from installed packages and by import path, with their options and budgets."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.calculator import ADD, Calculator
from tests.support.fakes import FixedRetriever
from trl_search.common.errors import UserError
from trl_search.config.agent import AgentSettings, asked, build_environment, settings_in
from trl_search.environment import ENVIRONMENTS, Environment, SearchEnvironment, load_environment
from trl_search.environment.registry import described, needs_retriever, options_of, takes_retriever

CALCULATOR = "tests.support.calculator:Calculator"
RETRIEVER = FixedRetriever([])


class Library(SearchEnvironment):
    """Stores its options."""

    def __init__(self, retriever, pages=3, **options):
        super().__init__(retriever, **options)
        self.pages = pages


class Forgetful(SearchEnvironment):
    """Does not call the constructor above it."""

    def __init__(self, retriever):
        self.pages = 3


LIBRARY = f"{__name__}:Library"


def test_an_installed_package_adds_an_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "toy-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[trl_search.environments]\n"
        f"adds = {CALCULATOR}\nmade = tests.support.calculator:make\nwrong = tests.support.calculator:wrong\n"
        "gone = tests.support.calculator:Gone\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert ENVIRONMENTS.names() == ["search", "adds", "gone", "made", "wrong"]
    assert load_environment("adds", max_calls=2).max_calls == 2 and load_environment("made").max_calls == 5
    assert AgentSettings(environment="adds").environment == "adds"
    for name, message in (
        ("gone", "environment 'gone' of package 'toy' .* cannot be imported"),
        ("wrong", "environment 'wrong' returned a int, not an Environment"),
        ("ads", "unknown environment 'ads': did you mean 'adds'"),
    ):
        with pytest.raises(UserError, match=message):
            load_environment(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (CALCULATOR, {"max_cals": 2}, "unexpected keyword argument 'max_cals'; its options are: max_calls"),
        (CALCULATOR, {"retriever": RETRIEVER}, "has no parameter `retriever`"),
        ("search", {}, "environment 'search' searches: give a retriever"),
        ("search", {"retriever": [1]}, "retriever is a list"),
        ("search", {"retriever": FixedRetriever}, "retriever=FixedRetriever is a class: give an instance"),
        (
            "search",
            {"retriever": RETRIEVER, "passages_per_query": 0},
            r"\(passages_per_query=0\): give a whole number, at least 1",
        ),
        ("search", {"retriever": RETRIEVER, "timeout_s": -1}, "give seconds, more than 0"),
        ("os:system", {"command": "false"}, "returned a int, not an Environment"),
        ("subprocess:Popen", {}, "neither a subclass of Environment nor a function"),
        (f"{__name__}:Forgetful", {"retriever": RETRIEVER}, r"Forgetful.__init__ does not call super\(\).__init__"),
        ("no_such_module:World", {}, "No module named 'no_such_module': put no_such_module.py into /.*, or install"),
        (
            LIBRARY,
            {"retriever": RETRIEVER, "pags": 3},
            "unknown option 'pags': did you mean 'pages'",
        ),
        (LIBRARY, {"retriever": RETRIEVER, "zzz": 3}, r"There are: [^.]*\bpassages_per_query, retriever, timeout_s"),
        ("Library", {}, "unknown environment 'Library'.*by its import path: my_module:Library, of my_module.py"),
        ("my_env.py", {}, "'my_env.py' is a file: give its import path, my_env:NAME$"),
    ],
)
def test_an_environment_that_cannot_be_made_is_explained(name: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_environment(name, **options)


def test_an_environment_gets_a_retriever_if_it_has_the_parameter() -> None:
    assert takes_retriever("search") and takes_retriever(LIBRARY) and not takes_retriever(CALCULATOR)
    assert needs_retriever(LIBRARY)


def test_the_budgets_of_a_configuration_reach_a_search_environment_and_no_other() -> None:
    agent = AgentSettings(environment=LIBRARY, environment_options={"pages": 7}, max_searches=2, passages_per_query=5)
    library = build_environment(agent, RETRIEVER)
    assert (library.pages, library.max_searches, library.passages_per_query) == (7, 2, 5)
    assert build_environment(AgentSettings(environment=CALCULATOR, max_searches=2), None).max_calls == 3


def test_an_instance_has_its_own_budgets() -> None:
    agent = settings_in(Library(RETRIEVER, pages=9, max_searches=1, max_invalid=0), AgentSettings())
    assert (agent.environment, agent.max_searches) == (LIBRARY, 1)
    assert agent.environment_options == {"pages": 9, "max_invalid": 0}
    assert settings_in(SearchEnvironment(RETRIEVER), AgentSettings()) == AgentSettings()
    assert options_of(Calculator()) == {} and options_of(Calculator(4)) == {"max_calls": 4}
    told = described(Calculator(4))
    assert told["options"]["max_calls"] == 4 and told["tools"] == [ADD] and told["name"] == CALCULATOR


def test_a_models_settings_alone_do_not_run_code() -> None:
    trained = AgentSettings(environment=CALCULATOR, environment_options={"max_calls": 1})
    with pytest.raises(UserError, match=f"If you trust that code, name it: --environment {CALCULATOR}"):
        asked(trained, {"max_turn_length": 9})
    assert asked(trained, {"environment": CALCULATOR}).environment_options == {"max_calls": 1}
    assert asked(trained, {"environment": "search"}).environment_options is None


def test_the_record_of_a_search_agent_has_no_environment_key() -> None:
    assert "environment" not in AgentSettings().as_json()
    assert AgentSettings(environment=CALCULATOR).as_json()["environment"] == CALCULATOR


def test_options_may_be_json_or_a_mapping() -> None:
    assert AgentSettings(environment_options='{"max_calls": 3}').environment_options == {"max_calls": 3}
    with pytest.raises(UserError, match="environment_options is not JSON"):
        AgentSettings(environment_options="max_calls=3")


def test_an_environment_shows_no_tool_unless_it_has_one() -> None:
    assert Environment.tools == () and [tool["function"]["name"] for tool in SearchEnvironment.tools] == ["search"]
