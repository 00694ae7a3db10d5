"""The instruction before a question where the policy has other tools than the search, or none.

Where the search is its only tool, each protocol has an instruction of its own: published results depend on the words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl_search.common.errors import UserError

# Left out where a chat template writes results in another way.
REPLY_TAGS = "; its results come between <tool_response> and </tool_response>"
_ANSWER = (
    "the final answer inside <answer> and </answer>, without explanation. For example, <answer> Beijing </answer>. "
    "Question: "
)


def tool_names(tools: Any) -> list[str]:
    """The names in the JSON schemas of some tools.

    Raises:
        UserError: for what is no list of JSON schemas.

    Example:
        >>> tool_names([{"type": "function", "function": {"name": "add", "parameters": {...}}}])
        ['add']
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise UserError(f"tools is a list of JSON schemas, and this is {type(tools).__name__}: {tools!r:.80}")
    names = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise UserError(
                'a tool is a JSON schema, {"type": "function", "function": {"name": ..., "description": ..., '
                f'"parameters": {{...}}}}}}, and this is {tool!r:.80}'
            )
        names.append(name)
    return names


def instruction_for(names: Sequence[str]) -> str:
    """What a policy with these tools is told before each question.

    Example:
        >>> instruction_for(["add", "multiply"])
        'Answer the given question. You must reason ... call the tools add and multiply; ...'
    """
    if not names:
        return f"Answer the given question. You must reason inside <think> and </think> first. Then give {_ANSWER}"
    called = f"tool {names[0]}" if len(names) == 1 else f"tools {', '.join(names[:-1])} and {names[-1]}"
    replies = REPLY_TAGS if len(names) == 1 else REPLY_TAGS.replace("its results", "their results")
    return (
        "Answer the given question. You must reason inside <think> and </think> first every time you get new "
        f"information. If it helps, call the {called}{replies}. You can call as often as you need. When you know "
        f"enough, give {_ANSWER}"
    )
