"""The lexicon finds what people write, in the spellings they write it, and not its look-alikes."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_search.reflection import LEXICON, count_reflections, find_reflections, reflection_ratio


@pytest.mark.parametrize(
    ("text", "family"),
    [
        # The seed's own four.
        ("Think again.", "think again"),
        ("I should re-verify the date", "re-verify"),
        ("let’s reconsider", "reconsider"),
        ("Upon close inspection, it is Lyon", "inspection"),
        # Their relatives.
        ("on second thought", "think again"),
        ("rethinking this", "think again"),
        ("re-check", "re-check"),
        ("I rechecked it", "re-check"),
        ("on closer inspection", "inspection"),
        ("let me look again", "inspection"),
        ("let me verify", "verify"),
        ("I need to make sure", "verify"),
        ("Let me just double-check", "double check"),
        ("Wait, that is wrong", "wait"),
        ("Wait", "wait"),
        ("wait a minute", "wait"),
        ("hold on", "wait"),
        ("I made a mistake", "mistake"),
        # Spellings: case, hyphens (also non-breaking), spaces, line breaks, apostrophes (also none).
        ("RE VERIFY", "re-verify"),
        ("reverify", "re-verify"),
        ("re\u2011verify", "re-verify"),
        ("double\ncheck", "double check"),
        ("double-checking", "double check"),
        ("Let's re-consider", "reconsider"),
        ("Lets reconsider", "reconsider"),
        ("Letʼs\u00a0reconsider", "reconsider"),
    ],
)
def test_phrases_are_found(text: str, family: str) -> None:
    assert [found.family for found in find_reflections(text)] == [family]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "They wait for the king",
        "the waiter, awaiting a wait-list",
        "He held on to the throne; hold on to it",
        "The court had to reconsider the case",  # somebody else reflects
        "The prefecture verified the vote",
        "on close terms with the inspection board",
        "methink again",  # word boundaries, on both sides
        "think against",
        "unreverified",
        "I can confirm that",
    ],
)
def test_look_alikes_are_not(text: str) -> None:
    assert find_reflections(text) == []


def test_phrases_do_not_overlap_and_are_located() -> None:
    text = "Wait, let me double-check: upon closer inspection it’s Lyon."
    found = find_reflections(text)
    assert [item.family for item in found] == ["wait", "double check", "inspection"]
    assert all(text[item.start : item.end] == item.phrase for item in found)
    assert count_reflections("let me re-check") == 1
    assert count_reflections(text) == 3


def test_ratio_is_a_share_of_texts_and_not_of_phrases() -> None:
    assert reflection_ratio(["Wait, wait, wait, re-check", "Paris", "Lyon", "think again"]) == 0.5
    assert reflection_ratio([]) == 0.0


@given(
    st.lists(st.sampled_from(["wait", ",", " ", "\n", "let me", "let's", "re", "-", "verify", "king", "on"])).map(
        "".join
    )
)
def test_any_text_gives_ordered_spans(text: str) -> None:
    found = find_reflections(text)
    assert len(found) == count_reflections(text)
    assert all(before.end <= after.start for before, after in itertools.pairwise(found))
    assert all(item.family in LEXICON and text[item.start : item.end] == item.phrase for item in found)


def test_hostile_text_is_read_quickly() -> None:
    start = time.perf_counter()
    for text in ("wait" + " " * 50_000, "let me " * 20_000, "upon on " * 20_000, "re-" * 50_000, "i " * 50_000):
        count_reflections(text)
    assert time.perf_counter() - start < 3
