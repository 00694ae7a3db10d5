r"""Scores whether the policy's turns follow the structure of the protocol.

    turn 1   <think> … </think> <tool_call> … </tool_call>     any thoughts, then one call, then nothing
    turn 2   <think> … </think> <search> … </search>           (either tag: one checker for every protocol)
    turn n   <think> … </think> <answer> … </answer>           any thoughts, then one answer, then nothing

Thoughts are optional and may hold any text, including tags. Plain text between blocks is allowed, because chat models
write it. Not allowed are an open block, a tag inside a call or an answer, a second call, text after the call, and the
environment's tags.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from trl_search.protocols.calls import NO_SUCH_TOOL, read_call, read_query
from trl_search.protocols.turn import CALLS, TAG, Block, outside_thoughts, read_turn
from trl_search.types import Invalid

# Allowed after the last block: white space and the tokens that end a turn, `<|im_end|>` or `</s>`.
_ENDING = re.compile(r"(?:\s|<\|[^<>|]{1,64}\|>|</s>)*")


def format_score(turns: Sequence[str]) -> float:
    """0.0 if the last turn does not answer or the policy wrote the environment's tags; 0.5 if it answers but something
    is malformed; 1.0 if everything is well-formed.

    Example:
        >>> format_score(["<search> a </search>", "<answer> b </answer>"])
        1.0
        >>> format_score(["<search> a", "<answer> b </answer>"])
        0.5
    """
    if not turns or any(read_turn(turn).speaks_for_world for turn in turns):
        return 0.0
    *calling, last = turns
    act = read_turn(last).act
    if act is None or act.tag != "answer":
        return 0.0
    well_formed = all(_ends_in(turn, CALLS) for turn in calling) and _ends_in(last, {"answer"})
    return 1.0 if well_formed else 0.5


def duplicate_tags(turns: Sequence[str]) -> int:
    """Number of repeated tags within turns, outside thoughts. A repeated block counts once.

    Example:
        >>> duplicate_tags(["<search> a </search>", "<answer> b </answer> </answer> <answer> c </answer>"])
        2
    """
    repeated = 0
    for turn in turns:
        seen = Counter(tag[0] for tag in TAG.finditer(outside_thoughts(turn)))
        # A second thought counts as a repeated tag; tags inside thoughts do not count.
        thoughts = sum(block.tag == "think" for block in read_turn(turn).blocks)
        repeated += max(0, thoughts - 1)
        names = {tag.strip("</>") for tag in seen}
        repeated += sum(max(seen[f"<{name}>"], seen[f"</{name}>"], 1) - 1 for name in names)
    return repeated


def _ends_in(text: str, tags: set[str] | frozenset[str]) -> bool:
    turn = read_turn(text)
    act = turn.act
    if not turn.tidy or act is None or act.tag not in tags or not act.content.strip():
        return False
    # Nothing may follow the first action.
    return _ENDING.fullmatch(text, act.end) is not None and _is_readable(act)


def _is_readable(act: Block) -> bool:
    if act.tag == "answer":
        return True
    action = read_query(act.content) if act.tag == "search" else read_call(act.content)
    # A call of an unknown tool is well-formed: only the environment knows which tools exist.
    return not isinstance(action, Invalid) or action == NO_SUCH_TOOL
