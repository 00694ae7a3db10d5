"""Cuts documents into passages of N words or tokens, as DPR cut Wikipedia into passages of 100 words.

    document "17" of 250 words  ->  "17#0" words 1 to 100, "17#1" words 81 to 180, "17#2" words 161 to 250
                                    (100 words each, 20 of them shared with the passage before)

A passage is a verbatim piece of its document, with the document's title and url. The part of its id before the last
`#` is the document's id. A letter is never cut, whether it has several tokens (an emoji) or several characters (a
flag, a letter with accents); the passage, and its overlap, then has a few tokens fewer.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import regex

from trl_search.common.errors import UserError
from trl_search.common.unspaced import UNSPACED_LETTERS
from trl_search.types import Passage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A word ends at a space. In scripts without spaces, each letter with its marks counts as one word.
_WORD = re.compile(rf"[{UNSPACED_LETTERS}][^\s\w]*|[^\s{UNSPACED_LETTERS}]+")
_LETTER = regex.compile(r"\X")  # a letter with its marks, a flag, an emoji of several characters

Span = tuple[int, int]  # the start and end of a word or token in the text
Split = Callable[[str], list[Span]]


def split_words(text: str) -> list[Span]:
    """The spans of the words of a text.

    Example:
        >>> split_words("A town."), split_words("東京 1958")
        ([(0, 1), (2, 7)], [(0, 1), (1, 2), (3, 7)])
    """
    return [found.span() for found in _WORD.finditer(text)]


def token_splitter(tokenizer: PreTrainedTokenizerBase) -> Split:
    """Returns a function that gives the spans of the tokens of a text.

    Raises:
        UserError: if the tokenizer does not report the offsets of its tokens.
    """
    if not tokenizer.is_fast:
        name = tokenizer.name_or_path
        raise UserError(f"the tokenizer of {name!r} does not report the offsets of its tokens; cut by words")

    def split(text: str) -> list[Span]:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [(start, end) for start, end in encoded["offset_mapping"] if end > start]

    return split


def cut_documents(
    documents: Iterable[Passage], size: int, *, overlap: int = 0, split: Split = split_words
) -> Iterator[Passage]:
    """Cuts documents into passages of at most `size` words or tokens (`split` gives their spans), which overlap by
    `overlap`. The last passage of a document may be shorter. A letter of more than `size` tokens becomes a passage.

    Raises:
        UserError: for a size below 1, or an overlap that is not below the size.

    Example:
        >>> [chunk.text for chunk in cut_documents([Passage("17", "Orlune", "a b c d e")], 3, overlap=1)]
        ['a b c', 'c d e']
    """
    if size < 1 or not 0 <= overlap < size:
        raise UserError(
            f"size {size} and overlap {overlap}: size must be at least 1, and overlap at least 0 and below size"
        )
    return (chunk for document in documents for chunk in _cut(document, size, overlap, split))


def _cut(document: Passage, size: int, overlap: int, split: Split) -> Iterator[Passage]:
    for number, (start, end) in enumerate(windows(document.text, split(document.text), size, overlap)):
        yield replace(document, id=f"{document.id}#{number}", text=document.text[start:end])


def windows(text: str, spans: list[Span], size: int, overlap: int) -> Iterator[Span]:
    """The spans of the passages of a text. A text without words gives one empty passage."""
    if not spans:
        yield 0, 0
        return
    spans = _to_whole_letters(text, spans)
    cuts = _cuts(spans)
    first, last = 0, 0
    while last < len(spans):
        if last:
            following = cuts[bisect_right(cuts, last)]
            # A window that began earlier would end where the last one did, because the next letter does not fit.
            first = cuts[bisect_left(cuts, min(last, max(last - overlap, following - size)))]
        last = cuts[max(bisect_right(cuts, first + size) - 1, bisect_right(cuts, first))]
        yield spans[first][0], max(end for _, end in spans[first:last])


def _cuts(spans: list[Span]) -> list[int]:
    """Indexes of the spans before which the text may be cut: those that begin after all earlier letters; and the
    end."""
    cuts, reached = [], 0
    for number, (start, end) in enumerate(spans):
        if start >= reached:
            cuts.append(number)
        reached = max(reached, end)
    return [*cuts, len(spans)]


def _to_whole_letters(text: str, spans: list[Span]) -> list[Span]:
    """The spans; a span that ends within a letter of several characters is extended to the letter's end."""
    ends = [letter.end() for letter in _LETTER.finditer(text)]
    return [(start, ends[bisect_left(ends, end)]) for start, end in spans]
