"""The instruction before a question if the policy has tools other than search, or none.

If search is its only tool, each protocol uses its own instruction, because published results depend on the wording.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl_search.common.errors import UserError

# Left out if a chat template writes results in another way.
REPLY_TAGS = "; its results come between <tool_response> and </tool_response>"
_ANSWER = (
    "the final answer inside <answer> and </answer>, without explanation. For example, <answer> Beijing </answer>. "
    "Question: "
)


def tool_names(tools: Any) -> list[str]:
    """The names in the JSON schemas of tools.

    Raises:
        UserError: if `tools` is not a list of JSON schemas.

    Example:
        >>> tool_names([{"type": "function", "function": {"name": "add", "parameters": {...}}}])
        ['add']
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise UserError(f"tools must be a list of JSON schemas; got {type(tools).__name__}: {tools!r:.80}")
    names = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise UserError(
                'a tool must be a JSON schema, {"type": "function", "function": {"name": ..., "description": ..., '
                f'"parameters": {{...}}}}}}; got {tool!r:.80}'
            )
        names.append(name)
    return names


def instruction_for(names: Sequence[str]) -> str:
    """The instruction for a policy with these tools.

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
