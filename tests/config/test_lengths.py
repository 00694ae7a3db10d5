"""Lengths in which no answer, search or observation fits are refused before anything is generated."""

from __future__ import annotations

import pytest

from tests.support.families import FAMILIES
from trl_search.common.errors import UserError
from trl_search.config.agent import AgentSettings, protocol_of
from trl_search.config.lengths import check_lengths
from trl_search.environment import SearchEnvironment
from trl_search.protocols import SEARCH_TOOL, load_protocol

TOOLS = SearchEnvironment.tools


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_lengths_fit_every_family(family):
    names = ["search_r1", *(["qwen_tools"] if FAMILIES[family].form else [])]
    for name in names:
        check_lengths(AgentSettings(), load_protocol(name, FAMILIES[family].tokenizer(), tools=TOOLS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_turn_length": 2}, r"max_turn_length=2 is too small: an answer of one word takes \d+ tokens"),
        ({"max_turn_length": 4}, r"max_turn_length=4 is too small: a search of one word takes \d+ tokens"),
        ({"max_completion_length": 4}, r"max_completion_length=4 is too small: a search of one word"),
        (
            {"max_observation_length": 8},
            r"max_observation_length=8 is too small: an observation of one word takes 1\d",
        ),
    ],
)
def test_lengths_that_hold_no_turn_are_refused(tokenizer, settings, message):
    """A run went through with them, and no trajectory could be right."""
    with pytest.raises(UserError, match=message):
        protocol_of(AgentSettings(**settings), tokenizer, TOOLS)


def test_an_agent_without_a_search_needs_room_for_an_answer_only(tokenizer):
    protocol_of(AgentSettings(max_turn_length=4, max_observation_length=1), tokenizer, ())
    protocol_of(AgentSettings(max_turn_length=4, max_searches=0), tokenizer, (SEARCH_TOOL,))
