"""Checks at the start that a chat template shows the policy what it is asked, word for word.

A template may fail, leave the text of a message out (templates for images want a list of parts), or change it:
Nemotron Nano 2's removes "/think", also from "</think>".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from trl_search.common.errors import UserError

_END = 10  # characters at the end of a text; a template that changes text somewhere shows them


def check_prompt(render: Callable[..., str], messages: Sequence[Mapping[str, Any]]) -> None:
    """Renders a question, first without and then with its system message, if there is one.

    Raises:
        UserError: if the template fails or changes their text.
    """
    *system, asked = messages
    try:
        shown = render([asked], add_generation_prompt=True)
    except Exception as error:  # a template may raise anything
        raise UserError(f"the chat template fails on a question ({error}): set tokenizer.chat_template") from error
    if asked["content"].strip()[-_END:] not in shown:
        raise UserError(
            "the chat template does not show the question, as those for images, which want a list of parts: set "
            "tokenizer.chat_template, or use a model for text"
        )
    if lost := _lost(asked["content"].strip(), shown):
        raise UserError(
            f"the chat template changes the question ({lost!r} is missing): set an instruction without this text, or "
            "tokenizer.chat_template"
        )
    if not system:
        return
    try:
        shown = render(messages, add_generation_prompt=True)
    except Exception as error:
        raise UserError(
            f"the chat template rejects a system message ({error}): put the text of system_prompt into instruction"
        ) from error
    if lost := _lost(system[0]["content"].strip(), shown):
        raise UserError(
            f"the chat template does not show a system message ({lost!r} is missing): put the text of system_prompt "
            "into instruction"
        )


def check_options(options: Iterable[str], template: str) -> None:
    """Checks that the template reads every option: Jinja ignores the others without a word.

    Raises:
        UserError: for an option that does not occur in the template.
    """
    words = set(re.findall(r"\w+", template))
    for option in options:
        if option not in words:
            near = difflib.get_close_matches(option, words, n=1)
            raise UserError(
                f"the chat template does not read {option!r} of chat_template_kwargs, so it has no effect: "
                f"{f'did you mean {near[0]!r}?' if near else 'leave it out'}"
            )


def _lost(text: str, shown: str) -> str:
    """The part of `text` around the first character that `shown` lacks; `""` if all of it is there."""
    if text in shown:
        return ""
    start = next(length for length in range(len(text)) if text[: length + 1] not in shown)
    return text[max(0, start - 20) : start + 40]
