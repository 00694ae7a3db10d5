r"""Counts reflective phrases, in which a model says that it checks its own claims ("wait", "let me re-check", …).

Seungyoun Shin's reproduction of Search-R1 (June 2025) counted such phrases over training and saw their share grow with
the benchmark score. It named four ("think again", "re-verify", "let's reconsider", "upon close inspection") and did
not publish a list. The lexicon below is ours: those four and similar phrases.

Pass only text that the policy wrote: "on closer inspection" in a passage is not a reflection.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

# The speaker must be the subject: "let me reconsider" is a reflection, "the court had to reconsider" is not.
_SELF = (
    r"(?:let me|let us|let's|i'll|we’ll|i'd better|i'm going to|i am going to|it is worth|it's worth|"
    r"(?:i|we) (?:will|must|should|ought to|need to|have to|want to|would like to|had better))"
)
_ADVERB = r"(?:(?:just|also|now|first|then|quickly|carefully|probably|still|really|try to|go back and) ){0,2}"
# The start of a clause: it matches "Wait, ..." but not "they had to wait, ...". White space is a single \s, because a
# look-behind needs a fixed width.
_CLAUSE = r"(?<!\w\s)"
_APART = r"(?=\s*(?:[,.!?:;…—–]|\n|\Z)|\s+\x2d)"
_INTERJECTION = r"(?:wait|hold on|hang on)"
_LOOK = r"(?:look|inspection|examination)"

# family → phrases. A phrase is a regular expression in which four characters have a special meaning:
#   " "  white space or hyphens           "double check" also matches `double-check`
#   "-"  white space, hyphens or nothing  "re-verify" also matches `reverify` and `re verify`
#   "'"  any apostrophe, or none          "let's" also matches `let’s` and `lets`
#   "’"  any apostrophe                   "we’ll" also matches `we'll`, but not `well`
LEXICON: dict[str, tuple[str, ...]] = {
    "think again": (
        r"think again",
        r"think (?:about )?(?:this|that|it) (?:over )?(?:again|once more|through again)",
        rf"{_SELF} {_ADVERB}re-think",
        r"re-thinking (?:this|that|the|my|our|it)",
        r"on second thoughts?",
        r"(?:up)?on (?:further|more|closer|careful) (?:reflection|consideration|thought)",
        r"after (?:further|more|closer|careful|some) (?:reflection|consideration|thought)",
        rf"{_CLAUSE}(?:up)?on reflection(?=\s*,)",
        r"com(?:e|ing) to think of it",
    ),
    "re-verify": (r"re-verif(?:y|ies|ied|ying|ication)", r"verify (?:this |that |it )?(?:again|once more)"),
    "re-check": (r"re-check(?:s|ed|ing)?", r"check (?:this |that |it )?(?:again|once more)"),
    "double check": (r"(?:double|triple|cross)-check(?:s|ed|ing)?",),
    "reconsider": (
        rf"{_SELF} {_ADVERB}(?:re-consider|re-evaluate|re-assess|re-examine|re-visit|re-read|review)",
        r"(?:re-considering|re-evaluating|re-assessing|re-examining|re-reading) (?:this|that|the|my|our|it)",
    ),
    "verify": (
        rf"{_SELF} {_ADVERB}(?:verify|confirm|make sure|be sure|check whether|check if)",
        rf"{_SELF} {_ADVERB}check (?:this|that|it|my|the)",
    ),
    "inspection": (
        rf"(?:up)?on (?:a )?(?:close|closer|further|careful|second) {_LOOK}",
        r"(?:up)?on (?:a )?(?:close|closer|further|careful) reading",
        r"after (?:a )?(?:closer|further|careful|second) (?:look|inspection|examination|reading)",
        rf"{_SELF} {_ADVERB}(?:look|read) (?:this |that |it )?(?:again|back|more closely|closely|closer)",
        rf"{_SELF} {_ADVERB}(?:take|have) (?:a|another) (?:(?:second|closer|careful|fresh) )?look",
        rf"{_CLAUSE}(?:looking|reading) (?:at (?:this|that|it) )?(?:again|more closely|closer(?! to\b))",
        rf"{_CLAUSE}(?:taking|with) (?:a (?:second|closer)|another) look",
    ),
    "wait": (
        # "wait" is also an ordinary verb ("they wait for the king"), so punctuation or the speaker must follow it.
        rf"{_CLAUSE}{_INTERJECTION}{_APART}",
        rf"{_CLAUSE}{_INTERJECTION} (?:a (?:minute|second|moment)|no|but|actually|maybe|that|i|let me)",
        rf"(?:but|oh|ah|hm+|okay|ok|actually) {_INTERJECTION}{_APART}",
    ),
    "mistake": (
        r"i (?:made|may have made|might have made|must have made) (?:a|an) (?:mistake|error)",
        r"i (?:was|may be|might be|may have been|might have been|must have been) (?:wrong|mistaken)",
        r"i (?:misread|misunderstood|overlooked|misremembered)",
        r"(?:let me|i must|i should|i need to) correct (?:myself|that|this|my)",
        r"(?:that|this) (?:is not|isn't|does not seem|doesn't seem|can't be|cannot be) (?:quite )?(?:right|correct)",
        r"that’s (?:not|not quite) (?:right|correct)",
        r"(?:this|that|it|something) (?:does not|doesn't) (?:add up|make sense)",
        r"(?:am i|are we) (?:really |quite )?(?:sure|certain)(?=\s*(?:\?|about|of|that))",
    ),
}

_HYPHEN = r"\-\u2010\u2011\u2012\u2013"
_APOSTROPHE = "['\u2018\u2019\u02bc\uff07`]"
_SPELLINGS = {" ": rf"[\s{_HYPHEN}]+", "-": rf"[\s{_HYPHEN}]*", "'": f"{_APOSTROPHE}?", "’": _APOSTROPHE}


def spell_out(phrase: str) -> str:
    """Converts a phrase of the lexicon to a standard regular expression."""
    return "".join(_SPELLINGS.get(character, character) for character in phrase)


# One pattern with one named group per family. The earliest match wins and matches do not overlap, so "wait, let me
# double-check" counts twice and "let me re-check" once.
_FAMILIES = {f"family_{index}": family for index, family in enumerate(LEXICON)}
_PATTERN = re.compile(
    r"(?<!\w)(?:"
    + "|".join(f"(?P<{group}>{'|'.join(map(spell_out, LEXICON[family]))})" for group, family in _FAMILIES.items())
    + r")(?!\w)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Reflection:
    """One reflective phrase: `text[start:end] == phrase`."""

    family: str
    phrase: str
    start: int
    end: int


def find_reflections(text: str) -> list[Reflection]:
    """Every reflective phrase in the text, in order and without overlaps.

    Example:
        >>> [(found.family, found.phrase) for found in find_reflections("Wait, let’s re‑verify that.")]
        [('wait', 'Wait'), ('re-verify', 're‑verify')]
    """
    return [
        Reflection(_FAMILIES[str(match.lastgroup)], match.group(), match.start(), match.end())
        for match in _PATTERN.finditer(text)
    ]


@functools.lru_cache(maxsize=4096)  # the reward and the metrics of a step count the same turns
def count_reflections(text: str) -> int:
    """How many reflective phrases the text holds.

    Example:
        >>> count_reflections("Upon close inspection it is Lyon. Let me double-check.")
        2
    """
    return sum(1 for _ in _PATTERN.finditer(text))


def reflection_ratio(texts: Iterable[str]) -> float:
    """The share of texts with at least one reflective phrase; 0.0 if there are none. Pass one text per trajectory.

    Example:
        >>> reflection_ratio(["Wait, that is Lyon.", "Paris."])
        0.5
    """
    found = [_PATTERN.search(text) is not None for text in texts]
    return sum(found) / len(found) if found else 0.0
