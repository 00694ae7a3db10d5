r"""Splits one turn of the policy into thoughts, calls and answers. All code that parses turns uses this module.

    <think> I could use <answer> … </think> <tool_call> … </tool_call>
    └────────────── thought ──────────────┘ └───────── act ──────────┘

Tags inside `<think>…</think>` are plain text, and there are no acts after a thought that is never closed. A call
extends to its own closing tag, so a query may mention any other tag. Parsing takes one pass and linear time for any
text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

CALLS = frozenset({"tool_call", "search"})
TAG = re.compile(r"<(/?)(think|tool_call|search|answer|tool_response|information)>")
_WORLD = frozenset({"tool_response", "information"})


class Block(NamedTuple):
    """`text[start:end]`, which is `<tag>content</tag>`. An unclosed call or thought extends to the end of its turn."""

    tag: str
    content: str
    start: int
    end: int
    closed: bool = True


class TurnText(NamedTuple):
    """A parsed turn."""

    blocks: tuple[Block, ...]  # thoughts, calls and answers in order
    tidy: bool  # whether every tag outside the blocks is paired, and no answer or call contains another tag
    speaks_for_world: bool  # whether the policy wrote `<tool_response>` or `<information>` outside its thoughts

    @property
    def act(self) -> Block | None:
        """The first call or answer."""
        return next((block for block in self.blocks if block.tag != "think"), None)

    @property
    def answer(self) -> str | None:
        """The last closed answer. A later answer corrects an earlier one."""
        return next((block.content.strip() for block in reversed(self.blocks) if block.tag == "answer"), None)


def read_turn(text: str) -> TurnText:
    """Parses one turn of the policy.

    A `</think>` before any other tag closes a thought that the prompt opened.

    Example:
        >>> read_turn("<think> <search> or not? </think> <answer> Lyon </answer>").act
        Block(tag='answer', content=' Lyon ', start=36, end=59, closed=True)
    """
    blocks: list[Block] = []
    tidy, speaks_for_world, position = True, False, 0
    last_close = {tag: text.rfind(f"</{tag}>") for tag in ("think", "answer", *CALLS)}
    while tag := TAG.search(text, position):
        closes, name = tag.groups()
        position = tag.end()
        if name in _WORLD:
            speaks_for_world = True
        elif closes:
            if name == "think" and tidy and not blocks and not speaks_for_world:
                blocks.append(Block("think", text[: tag.start()], 0, tag.end()))
            tidy = False
        elif last_close[name] < position:
            tidy = False
            # An unclosed answer is plain text; an unclosed call or thought extends to the end of the turn.
            if name != "answer":
                blocks.append(Block(name, text[position:], tag.start(), len(text), closed=False))
                speaks_for_world |= name != "think" and not _WORLD.isdisjoint(_tags(text, position, len(text)))
                break
        else:
            end = text.index(f"</{name}>", position)
            content = text[position:end]
            if name == "answer":
                content = content[content.rfind("<answer>") + len("<answer>") if "<answer>" in content else 0 :]
            if name != "think" and (inside := _tags(text, position, end)):
                tidy = False
                speaks_for_world |= not _WORLD.isdisjoint(inside)
            position = end + len(f"</{name}>")
            blocks.append(Block(name, content, tag.start(), position))
    return TurnText(tuple(blocks), tidy, speaks_for_world)


def in_thought(text: str) -> bool:
    """Whether the turn so far ends inside a thought, where a stop string does not end it."""
    blocks = read_turn(text).blocks
    return bool(blocks) and blocks[-1].tag == "think" and not blocks[-1].closed


def outside_thoughts(text: str) -> str:
    """The turn without its thoughts.

    Example:
        >>> outside_thoughts("<think> a </think> b")
        ' b'
    """
    pieces, position = [], 0
    for block in read_turn(text).blocks:
        if block.tag == "think":
            pieces.append(text[position : block.start])
            position = block.end
    return "".join([*pieces, text[position:]])


def _tags(text: str, start: int, end: int) -> list[str]:
    return [name for _, name in TAG.findall(text, start, end)]
