r"""Reflective phrases: where the model says that it looks at its own claims again ("wait", "let me re-check", …).

The seed of this project counted them over training and saw their share grow with the benchmark score. It named four
("think again", "re-verify", "let's reconsider", "upon close inspection") and published no list, so the lexicon below
is ours: those four and the families around them. What is counted is a phrase, not the thought behind it.

Give these functions text that the model wrote. A passage that says "on closer inspection" reflects nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Who reflects. "The court had to reconsider" is no reflection; "let me reconsider" is.
_SELF = r"(?:let me|let us|let's|i'll|we'll|(?:i|we) (?:will|must|should|need to|have to|want to|had better))"
_ADVERB = r"(?:(?:just|also|now|first|quickly|carefully) )?"

# family → phrases. A phrase is a regular expression in which three characters mean more than themselves:
#   " "  white space or hyphens      "double check" also finds `double-check`
#   "-"  the same, or nothing        "re-verify" also finds `reverify` and `re verify`
#   "'"  any apostrophe, or none     "let's" also finds `let’s` and `lets`
LEXICON: dict[str, tuple[str, ...]] = {
    "think again": (
        r"think again",
        r"re-think(?:ing)?",
        r"think (?:about )?(?:this|that|it) (?:over )?(?:again|once more|through again)",
        r"on second thoughts?",
        r"(?:up)?on (?:further |more )?(?:reflection|consideration)",
    ),
    "re-verify": (r"re-verif(?:y|ies|ied|ying|ication)", r"verify (?:this |that |it )?(?:again|once more)"),
    "re-check": (r"re-check(?:s|ed|ing)?", r"check (?:this |that |it )?(?:again|once more)"),
    "double check": (r"(?:double|triple|cross) check(?:s|ed|ing)?",),
    "reconsider": (
        rf"{_SELF} {_ADVERB}(?:re-consider|re-evaluate|re-assess|re-examine|re-visit|re-read)",
        r"(?:re-considering|re-evaluating|re-assessing|re-examining|re-reading) (?:this|that|the|my|our|it)",
    ),
    "verify": (
        rf"{_SELF} {_ADVERB}(?:verify|confirm|make sure|be sure|check whether|check if)",
        rf"{_SELF} {_ADVERB}check (?:this|that|it|my|the)",
    ),
    "inspection": (
        r"(?:up)?on (?:a )?(?:close|closer|further|careful|second) (?:inspection|look|reading|examination)",
        rf"{_SELF} {_ADVERB}(?:look|read) (?:this |that |it )?(?:again|more closely|closer)",
        r"(?:looking|reading) (?:at (?:this|that|it) )?(?:again|more closely|closer)",
    ),
    "wait": (
        # "wait" alone is also a verb ("they wait for the king"): it must stand apart, or turn to the speaker.
        r"wait(?=\s*(?:[,.!?:;…—–]|\n|\Z))",
        r"wait (?:a (?:minute|second|moment)|no|but|actually|maybe|that|i|let me)",
        r"hold on(?! to\b)",
        r"hang on(?! to\b)",
    ),
    "mistake": (
        r"i (?:made|may have made|might have made) (?:a|an) (?:mistake|error)",
        r"i (?:was|may be|might be|may have been|might have been) (?:wrong|mistaken)",
        r"that (?:is not|isn't|does not seem|doesn't seem|can't be|cannot be) (?:right|correct)",
    ),
}

_HYPHEN = r"\-\u2010\u2011\u2012\u2013"
_SPELLINGS = {" ": rf"[\s{_HYPHEN}]+", "-": rf"[\s{_HYPHEN}]*", "'": "['\u2018\u2019\u02bc\uff07`]?"}


def _spell_out(phrase: str) -> str:
    return "".join(_SPELLINGS.get(character, character) for character in phrase)


# One pattern, one named group a family; the earliest match wins and none overlap, so "wait, let me double-check"
# counts twice and "let me re-check" once.
_FAMILIES = {f"family_{index}": family for index, family in enumerate(LEXICON)}
_PATTERN = re.compile(
    r"(?<!\w)(?:"
    + "|".join(f"(?P<{group}>{'|'.join(map(_spell_out, LEXICON[family]))})" for group, family in _FAMILIES.items())
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
    """Every reflective phrase in the text, in order, none overlapping another.

    Example:
        >>> [(found.family, found.phrase) for found in find_reflections("Wait, let’s re‑verify that.")]
        [('wait', 'Wait'), ('re-verify', 're‑verify')]
    """
    return [
        Reflection(_FAMILIES[str(match.lastgroup)], match.group(), match.start(), match.end())
        for match in _PATTERN.finditer(text)
    ]


def count_reflections(text: str) -> int:
    """How many reflective phrases the text holds.

    Example:
        >>> count_reflections("Upon close inspection it is Lyon. Let me double-check.")
        2
    """
    return sum(1 for _ in _PATTERN.finditer(text))


def reflection_ratio(texts: Iterable[str]) -> float:
    """The share of texts with at least one reflective phrase; 0.0 of none. One text a trajectory: the model's words.

    Example:
        >>> reflection_ratio(["Wait, that is Lyon.", "Paris."])
        0.5
    """
    found = [_PATTERN.search(text) is not None for text in texts]
    return sum(found) / len(found) if found else 0.0
