"""The markers of thoughts in model families, and their translation into `<think>…</think>`."""

from __future__ import annotations

import re

THINK = ("<think>", "</think>")
# The markers of other families. A model has them if its chat template names them.
_OTHERS = (
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|channel>thought\n", "<channel|>"),  # Gemma 4
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
)
_OPENING, _CLOSING = ("|".join(map(re.escape, markers)) for markers in zip(THINK, *_OTHERS, strict=True))
_OPENED = re.compile(rf"(?:{_OPENING})\s*\Z")
_WRITTEN = re.compile(rf"(?:{_OPENING})\s*(?:(?:{_CLOSING})\s*)?\Z")
# Characters at the end of a prompt in which an opened thought is searched.
_TAIL = 64


def thought_markers(chat_template: str) -> tuple[tuple[str, str], ...]:
    """The markers other than `<think>` in a chat template."""
    return tuple(pair for pair in _OTHERS if pair[0].strip() in chat_template)


def with_think_tags(text: str, markers: tuple[tuple[str, str], ...]) -> str:
    """The text with the `markers` replaced by `<think>` and `</think>`."""
    for pair in markers:
        for marker, tag in zip(pair, THINK, strict=True):
            text = text.replace(marker, tag)
    return text


def opened_thought(prompt: str) -> str:
    """The end of a prompt if it opens a thought, else `""`.

    Example:
        >>> opened_thought("<|im_start|>assistant\\n<think>\\n")
        '<think>\\n'
    """
    opened = _OPENED.search(prompt[-_TAIL:])
    return opened[0] if opened else ""


def written_thought(prompt: str) -> str:
    """The end of a prompt if it opens a thought, or opens and closes an empty one, else `""`.

    Example:
        >>> written_thought("<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n")
        '<think>\\n\\n</think>\\n\\n'
    """
    written = _WRITTEN.search(prompt[-_TAIL:])
    return written[0] if written else ""
