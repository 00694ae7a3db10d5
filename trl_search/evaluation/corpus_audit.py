"""Can a corpus answer a question set at all? The share of questions whose golden answer stands in some passage.

No retriever can find an answer that no passage holds, so this share is the upper bound of what search can add. With a
retriever, the share in its first k passages is shown too (`retriever_quality.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tqdm.auto import tqdm

from trl_search.rewards.answers import answer_words, contains_answer
from trl_search.types import Passage


def answerable(passages: Iterable[Passage], golden_answers: Sequence[Sequence[str]]) -> set[int]:
    """Returns the positions of the questions that have a golden answer in a passage or its title.

    Every passage is read once. It is compared with a question only if it has the first word of one of its answers, so
    a corpus of millions takes minutes and not days.

    Example:
        >>> answerable([Passage("1", "Orlune", "A harbour.")], [["Orlune"], ["Vesk"]])
        {0}
    """
    by_word: dict[str, set[int]] = {}
    for index, golden in enumerate(golden_answers):
        for words in map(answer_words, golden):
            if words:
                by_word.setdefault(words[0], set()).add(index)
    found: set[int] = set()
    for passage in tqdm(passages, desc="reading the corpus", unit=" passages", disable=None):
        text = f"{passage.title}\n{passage.text}"
        candidates = {index for word in set(answer_words(text)) for index in by_word.get(word, ())}
        found |= {index for index in candidates - found if contains_answer(text, golden_answers[index])}
    return found
