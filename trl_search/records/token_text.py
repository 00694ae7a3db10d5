"""Splits the decoded text of a trajectory into one text per token, so that a token mask can be drawn over it.

    ids      [ 77,    4711,   148, 237, 9 ]
    texts    [ "Mira", " was", "", "é", "." ]         joined: the decoded text, always

A character that is split over several tokens belongs to the last of them. The same applies to characters that a
tokenizer does not decode token by token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class TokenTexts:
    """Maps token ids to texts. It caches the text of each id, because decoding ids one by one is slow."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of all ids together, special tokens included."""
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        text: str = self._tokenizer.decode(list(ids), **options)
        return text

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """One text per id; joined, they equal `decode(ids)`."""
        text = self.decode(ids)
        for token in set(ids) - self._alone.keys():
            self._alone[token] = self.decode([token])
        texts = [self._alone[token] for token in ids]
        if "".join(texts) == text:
            return texts
        # A character is split, or texts depend on neighbours (some tokenizers write a space only inside a sentence).
        return _laid_along(text, self._decoded_in_turn(ids))

    def _decoded_in_turn(self, ids: Sequence[int]) -> Iterable[str]:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:  # one of the few pure-Python tokenizers
            return (self._alone[token] for token in ids)
        return self._streamed(ids, backend)

    def _streamed(self, ids: Sequence[int], backend: Any) -> Iterable[str]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        for token in ids:
            try:
                yield stream.step(backend, token) or ""
            # The library raises a plain `Exception` for bytes that are not a character.
            except Exception:
                stream = DecodeStream(skip_special_tokens=False)
                yield stream.step(backend, token) or ""


def _laid_along(text: str, pieces: Iterable[str]) -> list[str]:
    """Cuts `text` where the pieces end. Text between two pieces goes to the second one, the rest to the last."""
    laid: list[str] = []
    at = 0
    for piece in pieces:
        found = text.find(piece, at)
        end = at if found < 0 else found + len(piece)
        laid.append(text[at:end])
        at = end
    if laid:
        laid[-1] += text[at:]
    return laid
