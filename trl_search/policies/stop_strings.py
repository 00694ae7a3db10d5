"""Finds out whether a sampled token completes a stop string. Most tokens are ruled out without decoding."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# A stop string begins at most this many tokens before the token that completes it.
_TAIL_TOKENS = 32


class StopStrings:
    """The stop strings of turns, in the tokens of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._last_tokens: dict[tuple[str, ...], set[int]] = {}  # that can complete these strings; empty: any token

    def is_reached(self, ids: Sequence[int], stop: tuple[str, ...]) -> bool:
        """Whether the last of the sampled `ids` completes one of the strings."""
        if not stop:
            return False
        if stop not in self._last_tokens:
            # Byte-level vocabularies keep ASCII, so only a token with a stop's last character can complete it.
            ends = {text[-1] for text in stop}
            tokens = self._tokenizer.get_vocab().items() if all(end.isascii() for end in ends) else ()
            self._last_tokens[stop] = {token_id for token, token_id in tokens if ends & set(token)}
        candidates = self._last_tokens[stop]
        if candidates and ids[-1] not in candidates:
            return False
        tail = self._tokenizer.decode(list(ids[-_TAIL_TOKENS:]), skip_special_tokens=False)
        return any(text in tail for text in stop)
