r"""Whether a trajectory keeps to the structure of its protocol, read off the turns that the model wrote.

    turn 1   <think> … </think> <tool_call> … </tool_call>     any thoughts, then one call, then nothing
    turn 2   <think> … </think> <search> … </search>           (either tag: one checker for every protocol)
    turn n   <think> … </think> <answer> … </answer>           any thoughts, then one answer, then nothing

Thoughts are optional, and so is plain text between the blocks: chat models talk. What is not allowed is what makes a
protocol unreadable: a block left open, a block inside another, a second call, words after the call, and a model that
writes the world's part itself.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from trl_search.rewards.answers import extract_answer

CALLS = frozenset({"tool_call", "search"})
_TAG = re.compile(r"<(/?)(think|tool_call|search|answer|tool_response|information)>")
_WORLD_TAG = re.compile(r"</?(?:tool_response|information)>")
# What may follow the last block: white space and the tokens that end a turn, `<|im_end|>` or `</s>`.
_ENDING = re.compile(r"(?:\s|<\|[^<>|]*\|>|</s>)*")


class Block(NamedTuple):
    """`<tag>content</tag>`, ending at `end` in its turn."""

    tag: str
    content: str
    end: int


def format_score(turns: Sequence[str]) -> float:
    """0.0 without an answer in the last turn, or where the model wrote the world's tags; 0.5 where it answers but is
    malformed; 1.0 where it is well-formed.

    Example:
        >>> format_score(["<search> a </search>", "<answer> b </answer>"])
        1.0
        >>> format_score(["<search> a", "<answer> b </answer>"])
        0.5
    """
    if not turns or extract_answer(turns[-1]) is None or any(map(_WORLD_TAG.search, turns)):
        return 0.0
    *calling, last = turns
    well_formed = all(_ends_in(turn, CALLS) for turn in calling) and _ends_in(last, {"answer"})
    return 1.0 if well_formed else 0.5


def read_blocks(text: str) -> list[Block] | None:
    """The blocks of a turn in order, or `None` where one is not closed, not opened, or lies inside another."""
    blocks, opening = [], None
    for tag in _TAG.finditer(text):
        closes, name = tag.groups()
        if opening is None and not closes:
            opening = tag
        elif opening is not None and closes and name == opening[2]:
            blocks.append(Block(name, text[opening.end() : tag.start()], tag.end()))
            opening = None
        else:
            return None
    return None if opening else blocks


def duplicate_tags(turns: Sequence[str]) -> int:
    """How often a tag is opened again, or closed again, in one turn: what a policy that loses its protocol does.

    A repeated block counts once. A turn may think twice, and that is counted too: no protocol here asks for it.

    Example:
        >>> duplicate_tags(["<search> a </search>", "<answer> b </answer> </answer> <answer> c </answer>"])
        2
    """
    repeated = 0
    for turn in turns:
        seen = Counter(tag[0] for tag in _TAG.finditer(turn))
        names = {tag.strip("</>") for tag in seen}
        repeated += sum(max(seen[f"<{name}>"], seen[f"</{name}>"], 1) - 1 for name in names)
    return repeated


def _ends_in(turn: str, tags: set[str] | frozenset[str]) -> bool:
    act = next((block for block in read_blocks(turn) or [] if block.tag != "think"), None)
    if act is None or act.tag not in tags or not act.content.strip():
        return False
    # Whatever follows the first act is one thing too many, a second act included.
    return _ENDING.fullmatch(turn, act.end) is not None and (act.tag != "tool_call" or _parses(act.content))


def _parses(call: str) -> bool:
    """A bare query always does (the seed's script takes one); what looks like JSON must be a call."""
    if not call.lstrip().startswith(("{", "[")):
        return True
    try:
        value = json.loads(call)
    except (json.JSONDecodeError, RecursionError):
        return False
    return isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get("arguments"), dict)
