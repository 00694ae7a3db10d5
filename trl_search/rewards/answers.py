r"""Normalises, extracts and compares answers by the rules of published results.

Normalisation is SQuAD's, as Search-R1 and its successors use it: lower-case, delete ASCII punctuation, turn the words
*a*, *an*, *the* into spaces, collapse white space. Punctuation is deleted, not replaced by a space, so `U.S.` becomes
`us` and `well-known` becomes `wellknown`.

There are two deviations:

- `contains_answer` compares whole words. Search-R1 looks for a substring, so it finds the gold answer `art` in every
  passage about a *party*.
- In scripts without spaces between words (Chinese, Japanese, Korean, Thai, ...) answers are compared letter by letter,
  as MLQA does (arXiv:1910.07475). A text with such letters loses all punctuation, "。" too, and its full-width
  letters become ordinary ones: "北京。" is "北京". Text without such letters is compared as SQuAD does.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

from trl_search.common.unspaced import UNSPACED, UNSPACED_LETTERS
from trl_search.protocols.turn import read_turn
from trl_search.rewards.golden_answers import golden_list

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_UNSPACED_LETTER = re.compile(rf"[{UNSPACED_LETTERS}][^\w\s]*")  # with combining marks: the vowels and tones of Thai


def normalize_answer(text: str) -> str:
    """Normalises an answer for comparison.

    Example:
        >>> normalize_answer("  The U.S. Senate ")
        'us senate'
    """
    text = text.lower().translate(_DELETE_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def answer_words(text: str) -> list[str]:
    """The units of comparison: normalised words, and single letters in scripts without spaces.

    Example:
        >>> answer_words("The U.S. Senate"), answer_words("東京タワー(1958年)。")
        (['us', 'senate'], ['東', '京', 'タ', 'ワ', 'ー', '1958', '年'])
    """
    if text.isascii() or not UNSPACED.search(unicodedata.normalize("NFKC", text)):
        return normalize_answer(text).split()
    spaced = "".join(" " if not c.isascii() and unicodedata.category(c)[0] == "P" else c for c in text)
    return _UNSPACED_LETTER.sub(r" \g<0> ", normalize_answer(unicodedata.normalize("NFKC", spaced))).split()


def extract_answer(text: str) -> str | None:
    """The stripped content of the last closed `<answer>…</answer>` outside thoughts; `None` if there is none.

    Pass only text that the policy wrote: a retrieved passage may contain the tags too.

    Example:
        >>> extract_answer("<think> <answer> Rome </answer> </think> <answer> Lyon </answer><answer> Paris </answer>")
        'Paris'
    """
    return read_turn(text).answer


def last_answer(turns: Sequence[str]) -> str | None:
    """The answer of a conversation: that of the last of the policy's turns whose action is an answer.

    A turn that calls a tool first or writes the environment's tags has no answer; the environment saw none either.

    Example:
        >>> last_answer(["<answer> Lyon </answer>", "let me check"])
        'Lyon'
    """
    for turn in map(read_turn, reversed(turns)):
        if turn.act is not None and turn.act.tag == "answer" and not turn.speaks_for_world:
            return turn.answer
    return None


def exact_match(prediction: str, golden_answers: str | Sequence[str]) -> bool:
    """Whether the prediction equals any gold answer, both normalised.

    Example:
        >>> exact_match("the Beatles!", ["Beatles", "Fab Four"])
        True
        >>> exact_match("北京。", ["北京"])
        True
    """
    words = answer_words(prediction)
    return any(words == answer_words(golden) for golden in golden_list(golden_answers))


def f1_score(prediction: str, golden_answers: str | Sequence[str], *, yes_no: bool = False) -> float:
    """SQuAD's F1 over multisets of normalised words: the maximum over the gold answers. If a side has no words, F1 is
    1.0 if both have none and 0.0 otherwise (SQuAD 2.0's rule), so an exact match always has F1 1.0.

    Args:
        yes_no (`bool`): HotpotQA's rule: if either side is `yes`, `no` or `noanswer`, only equality counts.

    Example:
        >>> round(f1_score("Marie Curie of Warsaw", ["Marie Skłodowska Curie"]), 3)
        0.571
    """
    predicted = answer_words(prediction)
    scores = [
        float(predicted == golden)
        if yes_no and (_closed(predicted) or _closed(golden))
        else _multiset_f1(predicted, golden)
        for golden in map(answer_words, golden_list(golden_answers))
    ]
    return max(scores, default=0.0)


def contains_answer(text: str, golden_answers: str | Sequence[str]) -> bool:
    """Whether the normalised text contains any normalised gold answer as consecutive whole words. A gold answer that
    is empty after normalisation (`"The"`, `"!!!"`) never matches.

    Example:
        >>> contains_answer("Curie was born in Warsaw, Poland.", ["warsaw"])
        True
        >>> contains_answer("A party in Lyon", ["art"])
        False
        >>> contains_answer("他出生在北京市。", ["北京"])
        True
    """
    padded = f" {' '.join(answer_words(text))} "
    golden = (" ".join(answer_words(answer)) for answer in golden_list(golden_answers))
    return any(answer and f" {answer} " in padded for answer in golden)


def _closed(words: list[str]) -> bool:
    return words in (["yes"], ["no"], ["noanswer"])


def _multiset_f1(predicted: list[str], golden: list[str]) -> float:
    if not predicted or not golden:
        return float(predicted == golden)
    common = (Counter(predicted) & Counter(golden)).total()
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(golden)
    return 2 * precision * recall / (precision + recall)
