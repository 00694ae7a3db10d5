"""Splits text into index terms, identically for passages and queries and for every engine.

    "Mira Talvane's novels of the U.S."  ->  ["mira", "talvan", "novel", "u", "s"]
    "東京タワー"                          ->  ["東京", "京タ", "タワ", "ワー"]

A query that is split or stemmed differently from the index finds nothing, without an error. So an index records its
`Analyzer` in the manifest, and every query is split by that analyzer.

- Words are runs of letters and digits with their combining marks: the vowels of Hindi and Thai are part of a word.
- Scripts without spaces between words (`common/unspaced.py`) become pairs of neighbouring letters, as in Lucene's
  CJKAnalyzer.
- Optional marks (Arabic and Hebrew vowels, tatweel, joiners) are dropped. So is the dot that Python's `lower` leaves
  over the i of a Turkish İ.
- Single characters are terms ("U.S.", "Vitamin C"); the pattern of bm25s drops them.
- Stop words are dropped, except from a query that has no other words: "The The" finds the band. For such queries, the
  stop words of passages are indexed as separate terms ("'the"), whose scores never mix with those of other words.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import re
import sys
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from trl_search.common.errors import UserError, unknown_name
from trl_search.common.unspaced import UNSPACED, UNSPACED_LETTERS

ANALYZER_VERSION = 2  # increment when the same options give different terms: an index of another version is rejected
STOP_MARK = "'"  # begins the terms of stop words; no other term holds an apostrophe

# A possessive ending is dropped: "Talvane" finds "Talvane's", stemmed or not.
_POSSESSIVE = re.compile(r"(?<=\w)['\u2019]s\b")
_OPTIONAL_POINTS = re.compile(
    "[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"  # Hebrew
    "\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed"  # Arabic
    "\u200c\u200d]"  # joiners
)
_ACCENTS = re.compile("[\u0300-\u036f]")
_ASCII_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Analyzer:
    """Splits text into terms: NFKC, lower case, words or pairs of letters, minus stop words, stemmed. The options are
    those of [`BM25Builder`]."""

    stemmer: str | None = "english"
    stopwords: str | None = "english"
    fold_accents: bool = False
    _stem: Callable[[list[str]], list[str]] = field(init=False, repr=False, compare=False)
    _dropped: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_stem", _snowball(self.stemmer) if self.stemmer else list)
        object.__setattr__(self, "_dropped", _stop_words(self.stopwords) if self.stopwords else frozenset())

    def query_terms(self, query: str) -> list[str]:
        """The terms to search for: the query's terms or, if all its words are stop words, the terms of those."""
        terms, stops = self.split(query)
        return terms or stops

    def split(self, text: str) -> tuple[list[str], list[str]]:
        """The terms of a text and, separately, its marked stop words: `(["orlun"], ["'the"])`."""
        words = self._words(text)
        kept = self._stem([word for word in words if word not in self._dropped])
        return kept, [f"{STOP_MARK}{word}" for word in words if word in self._dropped]

    def misfit(self, texts: Iterable[str]) -> str | None:
        """The reason why these options do not suit a sample of a corpus; `None` if they do."""
        words = [word for text in texts for word in self._words(text)]
        if len(words) < 200 or self.stemmer is None:
            return None
        scripts = Counter(map(_script, words))
        latin = self.stemmer not in _OTHER_SCRIPTS
        foreign = sum(count for script, count in scripts.items() if (script == "LATIN") != latin and script)
        if foreign > 0.3 * len(words):
            main = max((script for script in scripts if script), key=scripts.__getitem__)
            return (
                f"{foreign / len(words):.0%} of the words are not in the script of the stemmer {self.stemmer!r} (most "
                f"are {main.title()}); choose stemmer and stopwords by language, or none"
            )
        stops = sum(word in self._dropped for word in words)
        if self._dropped and stops < 0.04 * len(words):
            return (
                f"only {stops / len(words):.1%} of the words are stop words of {self.stopwords!r}, as if the passages "
                "were in another language; choose stemmer and stopwords by language, or none"
            )
        return None

    def _words(self, text: str) -> list[str]:
        if text.isascii():
            return _ASCII_WORD.findall(_POSSESSIVE.sub("", text.lower()))
        plain = unicodedata.normalize("NFKC", text).lower().replace("i\u0307", "i")
        if self.fold_accents:
            folded = _ACCENTS.sub("", unicodedata.normalize("NFD", plain))
            plain = unicodedata.normalize("NFC", folded)
        plain = _OPTIONAL_POINTS.sub("", _POSSESSIVE.sub("", plain))
        word, run, letter = _patterns()
        words: list[str] = []
        for found in word.findall(plain):
            if found.isascii() or not UNSPACED.search(found):
                words.append(found)
            else:
                for unspaced, other in run.findall(found):
                    words += _pairs(letter.findall(unspaced)) if unspaced else [other]
        return words


def _pairs(letters: list[str]) -> list[str]:
    """All pairs of neighbouring letters; a single letter is one term."""
    return [first + second for first, second in itertools.pairwise(letters)] or letters


@functools.cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Three patterns: a word with its combining marks; inside a word, a run of a script without spaces or of any other
    characters; in such a run, a letter with its marks."""
    codes = [code for code in range(0x300, 0x20000) if unicodedata.category(chr(code)) in ("Mn", "Mc")]
    marks = "".join(chr(code) for code in codes if not 0xFE00 <= code <= 0xFE0F)  # variation selectors follow emoji
    letter = f"[{UNSPACED_LETTERS}][{marks}]*"
    run = rf"((?:{letter})+)|((?:(?![{UNSPACED_LETTERS}]).)+)"
    return re.compile(rf"\w[\w{marks}]*"), re.compile(run), re.compile(letter)


# Snowball's languages that are not written in Latin letters.
_OTHER_SCRIPTS = {"arabic", "armenian", "greek", "hindi", "nepali", "russian", "tamil", "yiddish"}


def _script(word: str) -> str:
    """The first word of a letter's Unicode name: "LATIN", "CYRILLIC", "CJK"; `""` for digits."""
    return unicodedata.name(word[0], "").split(" ")[0] if word[0].isalpha() else ""


def _snowball(algorithm: str) -> Callable[[list[str]], list[str]]:
    import Stemmer

    if algorithm not in Stemmer.algorithms():
        raise unknown_name("stemmer", algorithm, Stemmer.algorithms())
    snowball = Stemmer.Stemmer(algorithm, 200_000)  # stems in its cache; with 10,000 most lookups miss
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
    """Imports bm25s, with jax hidden and debug messages off: bm25s imports jax if it is installed, and jax claims most
    of the GPU's memory."""
    with _hidden("jax"):
        import bm25s
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Makes `import module` fail inside the block, unless the program has already imported the module."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
