"""Refuses lengths in which the shortest turn or observation does not fit: no trajectory could be right."""

from __future__ import annotations

from typing import Any

from trl_search.common.errors import UserError
from trl_search.protocols import SEARCH_TOOL, Protocol
from trl_search.protocols.turn import outside_thoughts
from trl_search.types import Answer, Observation, Search

_SHORTEST_ANSWER, _SHORTEST_SEARCH = Answer("a"), Search(("a",))


def check_lengths(agent: Any, protocol: Protocol) -> None:
    """Checks that an answer, a search and an observation of one word, without a thought, fit into their lengths.

    Raises:
        UserError: for a length that is too small; the message names the key and its least value.
    """
    turns: list[tuple[str, Answer | Search]] = [("an answer", _SHORTEST_ANSWER)]
    if SEARCH_TOOL in protocol.tools and agent.max_searches:
        turns.append(("a search", _SHORTEST_SEARCH))
    for name, action in turns:
        needed = len(protocol.encode(outside_thoughts(protocol.write("", action)).strip()))
        for key in ("max_turn_length", "max_completion_length"):
            _check(key, getattr(agent, key), needed, name)
    if protocol.tools:
        _check("max_observation_length", agent.max_observation_length, _observation_tokens(protocol), "an observation")


def _observation_tokens(protocol: Protocol) -> int:
    written = protocol.observation_ids(Observation(documents=("a",)), max_tokens=1 << 20, turn_closed=False)
    assert written is not None  # it fits into a million tokens
    return len(written[0])


def _check(key: str, given: int, needed: int, name: str) -> None:
    if given < needed:
        raise UserError(
            f"{key}={given} is too small: {name} of one word takes {needed} tokens with this tokenizer and protocol. "
            f"Give a few times as many, or leave {key} out"
        )
