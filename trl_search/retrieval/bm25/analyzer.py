"""From text to index terms, the same for passages and for queries whatever the lexical engine.

    "Mira Talvane's novels of the U.S."  ->  ["mira", "talvan", "novel", "u", "s"]

A query stemmed otherwise than the index finds nothing and says nothing, so an index records its `Analyzer` in the
manifest and every query goes through that one. Single characters are terms ("U.S.", "Vitamin C"), which bm25s' own
pattern drops.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from trl_search.common.errors import UserError, unknown_name

# A possessive is no part of its word: "Talvane's" is found by "Talvane", stemmed or not.
_POSSESSIVE = re.compile(r"(?<=\w)['\u2019]s\b")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Analyzer:
    """Splits text into terms: NFKC, lower case, words, minus stop words, stemmed.

    Args:
        stemmer (`str`, *optional*): A Snowball algorithm by name ("english", "german", ...); `None` does not stem.
        stopwords (`str`, *optional*): A language whose bm25s stop-word list is dropped; `None` keeps every word.
    """

    stemmer: str | None = "english"
    stopwords: str | None = "english"
    _stem: Callable[[list[str]], list[str]] = field(init=False, repr=False, compare=False)
    _dropped: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_stem", _snowball(self.stemmer) if self.stemmer else list)
        object.__setattr__(self, "_dropped", _stop_words(self.stopwords) if self.stopwords else frozenset())

    def terms(self, text: str) -> list[str]:
        plain = _POSSESSIVE.sub("", unicodedata.normalize("NFKC", text).lower())
        return self._stem([word for word in _WORD.findall(plain) if word not in self._dropped])


def _snowball(algorithm: str) -> Callable[[list[str]], list[str]]:
    try:
        import Stemmer
    except ImportError as error:
        raise ImportError(
            f"the {algorithm!r} stemmer needs PyStemmer: pip install PyStemmer; or index with stemmer=None"
        ) from error
    if algorithm not in Stemmer.algorithms():
        raise unknown_name("stemmer", algorithm, Stemmer.algorithms())
    snowball = Stemmer.Stemmer(algorithm, 200_000)  # words whose stem it remembers; with 10,000 it mostly forgets
    lock = threading.Lock()  # a Stemmer object keeps a cache and is not safe to share between threads

    def stem(words: list[str]) -> list[str]:
        with lock:
            stems: list[str] = snowball.stemWords(words)
        return stems

    return stem


def _stop_words(language: str) -> frozenset[str]:
    try:
        return frozenset(import_bm25s().tokenization.Tokenizer(stopwords=language).stopwords)
    except ValueError as error:
        raise UserError(f"unknown stop words: {error}") from None


def import_bm25s() -> Any:
    """bm25s, for its stop words or its scores. Where jax is installed its import would start jax, which claims most of
    the GPU's memory, so jax is hidden from it."""
    try:
        with _hidden("jax"):
            import bm25s
    except ImportError as error:
        raise ImportError("BM25 needs bm25s: pip install bm25s") from error
    return bm25s


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Makes `import module` fail inside the block, unless the program has imported it for itself."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
