"""The lexicon finds reflective phrases in their usual spellings, but not similar texts."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_search.records.trajectory_metrics import trajectory_metrics
from trl_search.rewards.reflective_phrases import (
    LEXICON,
    count_reflections,
    find_reflections,
    reflection_ratio,
    spell_out,
)
from trl_search.types import Completion, FinishReason, StopReason, Trajectory


@pytest.mark.parametrize(
    ("text", "family"),
    [
        # The four phrases in Shin's article.
        ("Think again.", "think again"),
        ("I should re-verify the date", "re-verify"),
        ("let’s reconsider", "reconsider"),
        ("Upon close inspection, it is Lyon", "inspection"),
        # Related phrases.
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
        ("Upon further reflection", "think again"),
        ("On reflection, it is Lyon", "think again"),
        ("after careful consideration", "think again"),
        ("Let me rethink", "think again"),
        ("come to think of it", "think again"),
        ("We’ll re-examine the passage", "reconsider"),
        ("I should probably go back and re-read it", "reconsider"),
        ("let me review the passages", "reconsider"),
        ("I would like to confirm the date", "verify"),
        ("I'd better check whether he won", "verify"),
        ("let me take a closer look", "inspection"),
        ("let me look back", "inspection"),
        ("Looking closer, it is Lyon", "inspection"),
        ("<think>Wait, no", "wait"),
        ("But wait, Lyon is", "wait"),
        ("Hmm wait... Lyon", "wait"),
        ("Hold on, Lyon is", "wait"),
        ("Wait - Lyon is", "wait"),
        ("I misread the passage", "mistake"),
        ("That's not right", "mistake"),
        ("this doesn’t add up", "mistake"),
        ("Am I sure about Lyon?", "mistake"),
        # Spellings: case, hyphens (also non-breaking), spaces, line breaks, apostrophes (or none).
        ("RE VERIFY", "re-verify"),
        ("reverify", "re-verify"),
        ("re\u2011verify", "re-verify"),
        ("double\ncheck", "double check"),
        ("double-checking", "double check"),
        ("Let's re-consider", "reconsider"),
        ("Lets reconsider", "reconsider"),
        ("Letʼs\u00a0reconsider", "reconsider"),
        ("doublecheck", "double check"),
        ("let`s reconsider", "reconsider"),
        ("let＇s reconsider", "reconsider"),
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
        "The court had to reconsider the case",  # other people reflect
        "The prefecture verified the vote",
        "on close terms with the inspection board",
        "methink again",  # word boundaries, on both sides
        "think against",
        "unreverified",
        "I can confirm that",
        # Narration: other people verify, wait, hold on, look and read.
        "Officers verify the passport office and confirm the list; a clerk must verify it",
        "They may well verify that, and as well confirm it",  # no "we'll"
        "Visitors had to wait. Nobody could hold on, or wait a minute longer",
        "a firm hold on power; to hang on every word",
        "The lords had to rethink their plan; the mill was rethought",
        "The bill passed on second reading after a reading of the text",
        "a treatise on reflection and refraction; depending on consideration",
        "He was reading again by candlelight, looking closer to home",
        "the doubled checks; a reconsidered verdict; a mistaken king was wrong",
    ],
)
def test_similar_texts_are_not_found(text: str) -> None:
    assert find_reflections(text) == []


def test_phrases_do_not_overlap_and_are_located() -> None:
    text = "Wait, let me double-check: upon closer inspection it’s Lyon."
    found = find_reflections(text)
    assert [item.family for item in found] == ["wait", "double check", "inspection"]
    assert all(text[item.start : item.end] == item.phrase for item in found)
    assert count_reflections("let me re-check") == 1
    assert count_reflections(text) == 3


def test_the_ratio_counts_texts_not_phrases() -> None:
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


# One text for each alternative of a family, in its plainest spelling.
PLAIN = {
    "think again": "think again",
    "re-verify": "re-verify",
    "re-check": "re-check",
    "double check": "double check",
    "reconsider": "let's reconsider",
    "verify": "i'll verify",
    "inspection": "on closer inspection",
    "wait": "wait, ",
    "mistake": "that isn't right",
}


def test_every_family_has_a_plain_phrase() -> None:
    assert PLAIN.keys() == LEXICON.keys()


@given(
    family=st.sampled_from(sorted(PLAIN)),
    spaces=st.lists(st.sampled_from([" ", "\n", "\u00a0", "  ", "\t"]), min_size=3, max_size=3),
    hyphen=st.sampled_from(["-", "\u2010", "\u2011", "–", "", " "]),
    apostrophe=st.sampled_from(["'", "‘", "’", "ʼ", "＇", "`"]),
    upper=st.sampled_from([str.lower, str.upper, str.title]),
    around=st.tuples(
        st.sampled_from(["", "(", "so. ", "é. ", "<think>"]), st.sampled_from(["", ".", " then", "</think>"])
    ),
)
def test_a_phrase_is_found_in_every_spelling(family, spaces, hyphen, apostrophe, upper, around) -> None:
    replaced = iter(spaces)
    spelt = "".join(next(replaced) if c == " " else hyphen if c == "-" else c for c in PLAIN[family])
    text = around[0] + upper(spelt.replace("'", apostrophe)) + around[1]
    assert [found.family for found in find_reflections(text)] == [family], text


@given(
    family=st.sampled_from(sorted(PLAIN)),
    before=st.sampled_from(["a", "é", "9", "_", "字"]),
    after=st.sampled_from(["a", "é", "9", "_", "字"]),
)
def test_a_phrase_inside_a_word_is_not_found(family: str, before: str, after: str) -> None:
    phrase = PLAIN[family].strip(" ,")
    assert find_reflections(before + phrase) == []
    assert find_reflections(phrase + after) == []


@given(st.text())
def test_text_in_any_script_is_accepted(text: str) -> None:
    assert all(text[item.start : item.end] == item.phrase for item in find_reflections(text))


def test_only_the_policys_text_is_counted() -> None:
    """From a Trajectory to the metrics of a step: the text of passages does not count."""
    trajectory = Trajectory(prompt_ids=(1,))
    trajectory.act(Completion(tuple(range(60)), (-0.1,) * 60, FinishReason.EOS), text="Wait, let me re-check.")
    trajectory.observe(tuple(range(500)), text="Wait, think again. Upon closer inspection I was wrong. " * 20)
    trajectory.act(Completion(tuple(range(40)), (-0.1,) * 40, FinishReason.EOS), text="On second thought: Lyon.")
    trajectory.finish(StopReason.ANSWER)
    metrics = trajectory_metrics(trajectory)
    assert metrics["reflection/ratio"] == 1.0
    assert metrics["reflection/phrases_per_1k_tokens"] == 1000 * 3 / 100

    quoting = Trajectory(prompt_ids=(1,))
    quoting.act(Completion((1, 2), (-0.1, -0.1), FinishReason.EOS), text="I search.")
    quoting.observe((3,), text="Wait, let me re-check.")
    quoting.finish(StopReason.ANSWER)
    assert trajectory_metrics(quoting)["reflection/ratio"] == 0.0
    assert trajectory_metrics(quoting)["reflection/phrases_per_1k_tokens"] == 0.0


def test_a_phrase_does_not_span_turns() -> None:
    trajectory = Trajectory(prompt_ids=(1,))
    trajectory.act(Completion((1,), (-0.1,), FinishReason.EOS), text="They think")
    trajectory.observe((2,), text="")
    trajectory.act(Completion((3,), (-0.1,), FinishReason.EOS), text="again of Lyon.")
    trajectory.finish(StopReason.ANSWER)
    assert trajectory_metrics(trajectory)["reflection/ratio"] == 0.0


# docs/reflection.md


def table_of_the_docs() -> dict[str, list[str]]:
    page = (Path(__file__).parents[2] / "docs" / "reflection.md").read_text("utf-8")
    table = page.partition("<!-- table: lexicon -->")[2].partition("<!-- end -->")[0]
    rows = re.findall(r"^\| ([^|]+) \| (\".+\") \|$", table, re.MULTILINE)
    return {family: re.findall(r'"([^"]+)"', examples) for family, examples in rows}


def test_the_table_in_the_docs_has_the_families_of_the_lexicon() -> None:
    assert list(table_of_the_docs()) == list(LEXICON)


@pytest.mark.parametrize("family", LEXICON)
def test_the_table_in_the_docs_is_correct_and_complete(family: str) -> None:
    examples = table_of_the_docs()[family]
    for example in examples:
        assert family in [found.family for found in find_reflections(example)], example
    for phrase in LEXICON[family]:
        pattern = re.compile(rf"(?<!\w)(?:{spell_out(phrase)})(?!\w)", re.IGNORECASE)
        assert any(map(pattern.search, examples)), f"docs/reflection.md has no example of {phrase}"


def test_hostile_text_takes_linear_time() -> None:
    for piece in ("wait" + " " * 20, "let me just also ", "upon on ", "re-", "i ", "hm", "it is worth ", "after "):
        once, often = (seconds_to_read(piece * (8_000 // len(piece) * n)) for n in (1, 4))
        assert often < 12 * once + 0.2, piece
    assert seconds_to_read("wait" + " " * 20_000) < 5


def seconds_to_read(text: str) -> float:
    start = time.process_time()
    count_reflections(text)
    return time.process_time() - start
