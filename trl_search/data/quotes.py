"""Reading a question and a passage without a model: names, key words, and the sentence that holds a word.

names("Who directed the film Rogues' Regiment?")          ["Rogues' Regiment"]
key_words("Where was the director of Hatari! born?")      "director Hatari born"
quote(text, "Robert Florey")                              "Rogues' Regiment is a 1948 film … directed by Robert Florey"
"""

from __future__ import annotations

import calendar
import itertools
import re
from collections.abc import Iterable

from trl_search.rewards.answers import contains_answer

# Words that carry no topic.
_STOP = frozenset(
    re.findall(
        r"\w+",
        """
    a an the of in on at to for by with from as into than and or nor but is are was were be been being am do
    does did has have had having can could will would shall should may might must what which who whom whose when
    where why how that this these those it its he she they them his her their there also both either same other
    one ones many much get got you your we our i me my if so not s out up name named called known term refers
    """,
    )
)
# Useless as names by themselves.
_DEMONYMS = frozenset(
    re.findall(
        r"\w+",
        """
    american british english french german italian indian chinese japanese russian spanish australian canadian
    irish scottish european african korean greek latin
    """,
    )
)
_WORD = re.compile(r"[\w'’.&-]*\w")
# "A.", "Rogues'", "1971", "Bullets!"; a dot ends a name unless it ends an initial or a title.
_CAPITAL = r"(?:(?:[A-Z]\.)+|(?:Mr|Mrs|Dr|St|Jr|Sr|No)\.|[A-Z0-9À-ÖØ-ÞĀ-Ž](?:[\w&-]|['’](?!s\b))*['’!]?)"
# "Duke of Edinburgh": small words may stand between the capitalised words of one name.
_NAME = re.compile(
    rf"{_CAPITAL}(?: (?:(?:of|the|de|de'|di|da|del|der|la|du|von|van|bin|ibn|in|for|to|at|on|&) ){{0,2}}{_CAPITAL})*"
)
_MONTHS = set(calendar.month_name[1:])
_SENTENCE_END = re.compile(r"(?<=[.!?][\s\"”)])\s*(?=[A-Z0-9\"“À-Þ])|(?<=[.!?])\s+(?=[A-Z0-9\"“À-Þ])")
# "Robert E. Lee", "Mr. Lee", "the U.S. Senate": no sentence ends there.
_ABBREVIATION = re.compile(
    r"(?:\b[A-Z]|\b(?:Mr|Mrs|Ms|Dr|St|Sr|Jr|No|vs|c|ca|b|d|Lt|Col|Gen|Capt|Rev|Prof|U\.S|U\.K))\.\s*$"
)
QUOTE_WORDS = 30


def names(text: str) -> list[str]:
    """The first 16 capitalised spans, each once, without dates and without words that only begin a sentence.
    "Mira Talvane in Oslo" may be one name or two: all three are returned."""
    found: dict[str, None] = {}
    for match in _NAME.finditer(text):
        for span in dict.fromkeys((match[0], *re.split(r" (?:in|at|on|for|to) ", match[0]))):
            words = span.split()
            while words and words[0].lower().strip(",!'’") in _STOP:
                words = words[1:]
            name = " ".join(words).strip(" ,!'’-")
            if len(name) < 3 or name[0].isdigit() or name.lower() in _DEMONYMS or set(words) & set(_MONTHS):
                continue
            found.setdefault(name)
    return list(found)[:16]


def key_words(question: str, without: str = "", limit: int = 8) -> str:
    """The topic words of a question, in their order, without those of a name."""
    left_out = {word.lower() for word in _WORD.findall(without)}
    kept = [word.removesuffix("'s").removesuffix("’s") for word in _WORD.findall(question)]
    kept = [word for word in kept if word and word.lower() not in _STOP and word.lower() not in left_out]
    return " ".join(dict.fromkeys(kept[:limit]))


def sentences(text: str) -> list[str]:
    """The sentences of a text, each an exact piece of it."""
    parts: list[str] = []
    for part in _SENTENCE_END.split(text):
        if parts and _ABBREVIATION.search(parts[-1]):
            # Cut from the text: joining the parts with a space could change it.
            start = text.find(parts[-1])
            parts[-1] = text[start : text.find(part, start + len(parts[-1])) + len(part)]
        else:
            parts.append(part)
    return [part.strip() for part in parts if part.strip()]


def quote(text: str, words: str) -> str | None:
    """The sentence that holds `words`, or `QUOTE_WORDS` words of it around them; `None` if no sentence does."""
    listed = sentences(text)
    pairs = [text[text.find(a) : text.find(b, text.find(a)) + len(b)] for a, b in itertools.pairwise(listed)]
    for sentence in [*listed, *pairs]:
        if words.lower() in sentence.lower() or contains_answer(sentence, words):
            return _around(sentence, words)
    return None


def best_sentence(text: str, asked: str, *, wants_number: bool) -> str:
    """The sentence that shares the most words with the question, the first of equals; one with a number is preferred
    if the question compares."""
    wanted = {word.lower() for word in _WORD.findall(asked)} - _STOP

    def score(sentence: str) -> float:
        shared = len(wanted & {word.lower() for word in _WORD.findall(sentence)})
        return shared + (2.0 if wants_number and re.search(r"\d{3}", sentence) else 0.0)

    listed = sentences(text) or [text.strip()]
    return _around(max(listed[:6], key=score), "")


def year(text: str, *, last: bool) -> str | None:
    """The first year that a text names, or the last one: "(July 8, 1893 – July 5, 1969)" is a birth and a death."""
    found = re.findall(r"\b(1[0-9]{3}|20[0-9]{2})\b", text)
    return found[-1 if last else 0] if found else None


def first_of(answers: Iterable[str], text: str) -> str | None:
    """The first of the answers that the text holds: literally, then normalised, then inside a longer word ("India" in
    "an Indian film director")."""
    listed = list(answers)
    literal = (one for one in listed if one.lower() in text.lower() and contains_answer(text, one))
    alike = (one for one in listed if contains_answer(text, one))
    longer = (one for one in listed if len(one) > 3 and re.search(rf"\b{re.escape(one)}[a-z]{{1,3}}\b", text))
    return next(literal, None) or next(alike, None) or next(longer, None)


def _around(sentence: str, words: str) -> str:
    spans = [match.span() for match in re.finditer(r"\S+", sentence)]
    if len(spans) <= QUOTE_WORDS:
        return sentence.rstrip(".")
    at = max(0, sentence.lower().find(words.lower()))
    index = next(i for i, (_, end) in enumerate(spans) if end > at)
    needed = len(words.split())
    first = max(0, min(index - (QUOTE_WORDS - needed) // 2, len(spans) - QUOTE_WORDS))
    last = min(len(spans), max(first + QUOTE_WORDS, index + needed)) - 1
    return sentence[spans[first][0] : spans[last][1]].rstrip(".,;")
