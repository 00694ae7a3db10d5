"""Control tokens: the ids that only a policy and its chat template may write.

`ControlTokens.encode` checks the ids of text from the environment, not the text itself: a tokenizer may normalize its
input, so that `</s>` in full-width letters becomes EOS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# `<|im_end|>`, `</s>`, `[INST]`, `<|User|>`: between brackets and without inner spaces.
_LOOKS_LIKE_CONTROL = re.compile(r"\s*[<\[{\uff1c]\S{0,80}[>\]}\uff1e]\s*")
# Markers between the messages of a template that are not single tokens: `<<SYS>>`, `[INST]`.
_MARKER = re.compile(r"<{1,2}/?\|?[A-Za-z_][\w ./-]{0,40}\|?>{1,2}|\[/?[A-Z_]{2,30}\]")


class ControlTokens:
    """The control tokens of a tokenizer and its chat template.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Its added tokens are control tokens if they are special or look so.
        encode (`Callable[[str], list[int]]`): Encodes a piece of a conversation.
        frames (`Sequence[str]`): Text that the template writes around messages. Its markers are neutralized, too.

    Example:
        >>> control = ControlTokens(tokenizer, encode)
        >>> tokenizer.decode(control.encode("the end <|im_end|>"))
        'the end &lt;|im_end|>'
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, encode: Callable[[str], list[int]], frames: Sequence[str] = ()
    ) -> None:
        self._tokenizer, self._encode = tokenizer, encode
        special = set(tokenizer.all_special_ids)
        added = tokenizer.added_tokens_decoder
        self.ids = frozenset(
            index
            for index, token in added.items()
            if index in special or token.special or _LOOKS_LIKE_CONTROL.fullmatch(token.content)
        ) | frozenset(special)
        markers = sorted({marker for frame in frames for marker in _MARKER.findall(frame)}, key=len, reverse=True)
        self._markers = re.compile("|".join(map(re.escape, markers))) if markers else None
        self._inert: dict[int, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        """Encodes text that the policy did not write, without control tokens."""
        ids = self._encode(self._without_markers(text))
        if self.ids.isdisjoint(ids):
            return ids
        return [part for index in ids for part in (self._spelled(index) if index in self.ids else (index,))]

    def escape(self, text: str) -> str:
        """Returns the text in a form that encodes to no control token, for use in a message."""
        text = self._without_markers(text)
        for _ in range(3):
            if self.ids.isdisjoint(self._encode(text)):
                return text
            text = str(self._tokenizer.decode(self.encode(text), clean_up_tokenization_spaces=False))
        # Last resort, for a tokenizer that turns any punctuation into control tokens: keep only the words.
        return re.sub(r"[^\w\s.,;:!?'\"-]", " ", text)

    def _without_markers(self, text: str) -> str:
        text = well_formed(text)
        return text if self._markers is None else self._markers.sub(lambda marker: _defused(marker[0]), text)

    def _spelled(self, index: int) -> tuple[int, ...]:
        """The ids of a control token as plain text; empty if even its letters give control tokens."""
        if index not in self._inert:
            spelled = self._encode(_defused(str(self._tokenizer.convert_ids_to_tokens(index))))
            self._inert[index] = tuple(part for part in spelled if part not in self.ids)
        return self._inert[index]


def well_formed(text: str) -> str:
    """Replaces the halves of broken surrogate pairs, which no tokenizer accepts.

    Example:
        >>> well_formed("half a pair: \\ud800")
        'half a pair: \N{REPLACEMENT CHARACTER}'
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _defused(marker: str) -> str:
    return "&lt;" + marker[1:] if marker[0] == "<" else marker[0] + " " + marker[1:]
