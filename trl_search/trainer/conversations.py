"""Checks conversations that a dataset gives as prompts, before anything is generated.

[{"role": "user", "content": "Who?"}]      asked as it is
[{"role": "human", "content": "Who?"}]     an error: Qwen's chat template leaves such a message out without a word
[{"from": "human", "value": "Who?"}]       an error
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl_search.common.errors import UserError
from trl_search.protocols import Protocol


def conversation_check(protocol: Protocol) -> Callable[[Sequence[Any], str], None]:
    """A check of conversations that are given as prompts. A chat template that leaves out a message, such as one of
    an unknown role, is found once per sequence of roles and of the keys of their messages.

    Raises:
        UserError: from the check; it names the place of the conversation.
    """
    shown: set[tuple[Any, ...]] = set()

    def check(messages: Sequence[Any], place: str) -> None:
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise UserError(f"{place} has the message {message!r:.80}: write {{'role': 'user', 'content': '...'}}")
            if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
                content = message.get("content")
                raise UserError(f"{place} has the content {content!r:.80}: rollouts are text only, so write a string")
        roles = tuple(message["role"] for message in messages)
        if roles[-1] == "assistant":
            raise UserError(f"{place} ends with the assistant's own turn: end it with the user's")
        if protocol.system_prompt and "system" not in roles:
            raise UserError(
                f"{place} is a conversation without a system message, and is asked unchanged, so system_prompt has no "
                "effect: put it into the conversation, or leave it out"
            )
        form = tuple(
            (message["role"], *sorted(key for key in message if message[key] is not None)) for message in messages
        )
        if form in shown:
            return
        try:
            text = protocol.render_messages(messages, add_generation_prompt=True)
        except Exception as error:  # a template may raise anything
            raise UserError(f"{place} is refused by the chat template: {error}") from error
        for message in messages:
            said = (message["content"] or "").strip()
            quoted = json.dumps(said, ensure_ascii=False)[1:-1]  # as some templates write a tool's reply
            if message["role"] != "assistant" and said not in text and quoted not in text:
                raise UserError(
                    f"{place} has a message of the role {message['role']!r}, which the chat template does not show: "
                    "give it a role that the template knows, such as user"
                )
        shown.add(form)

    return check
