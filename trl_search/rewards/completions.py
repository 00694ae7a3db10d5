"""Reads a completion as TRL passes it to rewards.

It is a list of chat messages (the policy writes `assistant`, the environment `tool`) or a string by the policy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from trl_search.rewards.answers import extract_answer, last_answer

Completion = str | Sequence[dict[str, Any]] | dict[str, Any]


def texts_of(completion: Completion, role: str) -> list[str]:
    """The texts of one role, `assistant` or `tool`, one per turn."""
    return [_content(message) for message in _messages(completion) if message.get("role", "assistant") == role]


def answer_of(completion: Completion) -> str | None:
    """The policy's last `<answer>`; `None` if there is none."""
    if isinstance(completion, str):  # it may hold a whole conversation, including calls
        return extract_answer(completion)
    return last_answer(texts_of(completion, "assistant"))


def _messages(completion: Completion) -> Sequence[dict[str, Any]]:
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    return [completion] if isinstance(completion, dict) else completion


def _content(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)  # [{"type": "text", "text": …}, …]
    # Plain TRL removes calls from the text; write them back, so that one parser reads both forms.
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    return content + "".join(f"\n<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)
