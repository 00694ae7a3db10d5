"""Comparison of answers, against a reference that uses no regular expressions and against cases by hand."""

from __future__ import annotations

import itertools
import string
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trl_search.rewards.answers import contains_answer, exact_match, extract_answer, f1_score, normalize_answer

# Words that conflict with the rules, and any other Unicode.
awkward = st.one_of(
    st.text(),
    st.lists(st.sampled_from(["a", "An", "THE", "the.", "U.S.", "l'été", "İ", "_", "\u00a0", "x", "y", "a-b"])).map(
        " ".join
    ),
)


def reference_normalize(text: str) -> str:
    """Lower-cases, deletes punctuation, blanks articles among the runs of word characters, collapses white space."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    runs = ("".join(run) for _, run in itertools.groupby(kept, key=lambda c: c.isalnum() or c == "_"))
    return " ".join("".join(" " if run in {"a", "an", "the"} else run for run in runs).split())


def reference_f1(prediction: str, golden: str) -> float:
    """SQuAD's F1, which pairs words one by one."""
    predicted, remaining = reference_normalize(prediction).split(), reference_normalize(golden).split()
    if not predicted or not remaining:
        return float(predicted == remaining)
    total, same = len(predicted) + len(remaining), 0
    for word in predicted:
        if word in remaining:
            remaining.remove(word)
            same += 1
    return 2 * same / total


@given(awkward)
@example("The a-an THE, a!")
@example("İstanbul's the\u00a0a")
def test_normalize_agrees_with_the_reference(text: str) -> None:
    assert normalize_answer(text) == reference_normalize(text)


@given(awkward, st.lists(awkward, max_size=4))
def test_exact_match_and_f1_agree_with_the_reference(prediction: str, golden: list[str]) -> None:
    assert exact_match(prediction, golden) == (reference_normalize(prediction) in map(reference_normalize, golden))
    expected = max((reference_f1(prediction, answer) for answer in golden), default=0.0)
    assert f1_score(prediction, golden) == pytest.approx(expected)
    assert not exact_match(prediction, golden) or f1_score(prediction, golden) == 1.0


@pytest.mark.parametrize(
    ("prediction", "golden", "equal"),
    [
        ("北京。", "北京", True),
        ("「北京」", " 北京 ", True),
        ("東京タワー（１９５８年）", "東京タワー 1958年", True),
        ("서울은", "서울", False),
        ("ภาษาไทย!", "ภาษาไทย", True),
        ("ภาษาไทย", "ภาษาไท", False),
        ("ﾄｰｷｮｰ", "トーキョー", True),
        ("東京", "京東", False),
    ],
)
def test_scripts_without_spaces_are_compared_letter_by_letter(prediction: str, golden: str, equal: bool) -> None:
    assert exact_match(prediction, [golden]) == equal
    assert (f1_score(prediction, [golden]) == 1.0) == (equal or sorted(prediction) == sorted(golden))


@pytest.mark.parametrize(
    ("text", "golden", "contained"),
    [
        ("他出生在北京市。", "北京", True),
        ("東京都は日本の首都です", "日本の首都", True),
        ("수도는 서울이다", "서울", True),
        ("เมืองหลวงคือกรุงเทพ", "กรุงเทพ", True),
        ("กิน", "กน", False),  # a letter keeps its vowel sign
        ("他出生在北京市。", "京北", False),
        ("《哈利·波特》由 J. K. Rowling 著", "J.K. Rowling", False),  # SQuAD's rule: "jk" is not "j k"
        ("iPhone手机在2007年发布", "2007年", True),
        ("A party in Lyon 北京", "art", False),
    ],
)
def test_an_answer_is_found_in_text_without_spaces(text: str, golden: str, contained: bool) -> None:
    assert contains_answer(text, [golden]) == contained


@given(awkward)
def test_every_answer_matches_itself(answer: str) -> None:
    assert exact_match(answer, [answer]) and f1_score(answer, [answer]) == 1.0


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The U.S. Senate", "us senate"),  # punctuation is deleted, not replaced by a space
        ("a well-known the-atre", "wellknown theatre"),  # and it is deleted before the articles
        ("a.n answer", "answer"),
        ("Theodore and Ana", "theodore and ana"),
        ("«Été»", "«été»"),  # only ASCII punctuation
        ("the", ""),
        ("«the»", "« »"),  # an article leaves a space
    ],
)
def test_normalize_by_hand(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


# By hand from SQuAD's rule: lower-case, delete ASCII punctuation, articles to spaces, collapse white space.
ADVERSARIAL = [
    # articles: whole words only, anywhere, after the punctuation is deleted
    ("The Beatles", "Beatles", True),
    ("Beatles, The", "the beatles", True),
    ("An apple a day", "apple day", True),
    ("Theatre", "atre", False),
    ("A.", "", True),
    ("a-ha", "aha", True),
    ("Vitamin A", "vitamin", True),
    ("the The", "The", True),
    ("Thea", "a", False),
    # punctuation: deleted, not replaced by a space; only ASCII's
    ("U.S.A.", "USA", True),
    ("U. S. A.", "USA", False),
    ("well-known", "well known", False),
    ("O'Neil", "ONeil", True),
    ("O\u2019Neil", "ONeil", False),  # a typographic apostrophe is not ASCII
    ("\u201cHeroes\u201d", "Heroes", False),
    ("AC/DC", "acdc", True),
    ("C++", "C#", True),
    ("100%", "$100", True),
    ("snake_case", "snakecase", True),
    # numbers: as text
    ("1,000", "1000", True),
    ("3.14", "314", True),
    ("-5", "5", True),
    ("7", "seven", False),
    ("007", "7", False),
    ("1990s", "1990's", True),
    ("10 000", "10000", False),
    ("\u0661", "1", False),  # an Arabic-Indic digit
    # yes and no: no special case
    ("Yes.", "yes", True),
    ("yes, it is", "yes", False),
    ("no", "No!", True),
    ("no", "none", False),
    ("True", "yes", False),
    # Unicode: compared unchanged, neither folded nor composed
    ("Z\u00dcRICH", "z\u00fcrich", True),
    ("Zurich", "Z\u00fcrich", False),
    ("caf\u00e9", "cafe\u0301", False),
    ("\u0130stanbul", "istanbul", False),  # lower() leaves a combining dot
    ("STRASSE", "stra\u00dfe", False),
    ("\u6771\u4eac", "\u6771\u4eac", True),
    ("the\u6771\u4eac", "\u6771\u4eac", False),  # there is no word boundary between them
    # white space: all of Unicode's, collapsed
    ("New\u00a0York", "New York", True),
    ("New\u3000\n\tYork ", "New York", True),
    ("New\u200bYork", "New York", False),  # a zero-width space is not a space
    # empty: texts of which nothing is left are equal
    ("", "", True),
    ("...", "the", True),
    ("", "x", False),
    ("x", "", False),
]


@pytest.mark.parametrize(("prediction", "golden", "equal"), ADVERSARIAL)
def test_exact_match_by_hand(prediction: str, golden: str, equal: bool) -> None:
    assert exact_match(prediction, [golden]) is equal
    assert exact_match(golden, ["something else", prediction]) is equal  # symmetric, and any golden answer counts
    assert (reference_normalize(prediction) == reference_normalize(golden)) is equal


@given(
    st.lists(st.sampled_from(["mira", "été", "1969", "東京", "theo", "x"]), min_size=1),
    st.lists(st.sampled_from(["the", "A", "an.", "!", "'", " ", "\u00a0"])),
    st.randoms(use_true_random=False),
)
def test_articles_punctuation_case_and_spaces_never_matter(words: list[str], noise: list[str], rng) -> None:
    decorated = [*words]
    for extra in noise:
        decorated.insert(rng.randrange(len(decorated) + 1), extra)
    prediction = " ".join(word.upper() if rng.random() < 0.5 and word.isascii() else word for word in decorated)
    assert exact_match(prediction, [" ".join(words)])
    assert not exact_match(prediction, [" ".join([*words, "y"])])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> Paris </answer>", "Paris"),
        ("<answer>Lyon</answer> … <answer>\nParis\n</answer> done", "Paris"),  # the last one
        ("<answer>Lyon <answer>Paris</answer>", "Paris"),
        ("<answer>Paris</answer> </answer>", "Paris"),
        ("<answer>Paris</answer> <answer>Lyon", "Paris"),
        ("<answer></answer>", ""),
        ("<answer>a < b > c</answer>", "a < b > c"),
        ("Paris", None),
        ("<answer>Paris", None),
        ("</answer>Paris<answer>", None),
        ("<Answer>Paris</Answer>", None),
    ],
)
def test_the_last_answer_is_extracted(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@given(st.text(), st.text().filter(lambda text: "<" not in text))
def test_a_closed_answer_at_the_end_is_always_extracted(before: str, answer: str) -> None:
    assert extract_answer(f"{before}<answer>{answer}</answer>") == answer.strip()


def test_extraction_takes_linear_time_on_hostile_text() -> None:
    start = time.process_time()
    assert extract_answer("<answer>" * 100_000) is None
    assert extract_answer("<answer>" + "<" * 500_000) is None
    assert time.process_time() - start < 2


def test_containment_is_by_whole_words() -> None:
    assert contains_answer("Curie was born in Warsaw, Poland.", ["Lyon", "the WARSAW"])
    assert contains_answer("the U.S. Senate", ["us"])
    assert not contains_answer("A party in Lyon", ["art"])
    assert not contains_answer("Poland Warsaw", ["Warsaw Poland"])
    assert not contains_answer("anything", ["The", "!!!"])
    assert not contains_answer("anything", [])


def test_a_golden_string_is_one_answer() -> None:
    assert exact_match("Paris", "Paris") and not exact_match("P", "Paris")


@pytest.mark.parametrize(
    ("prediction", "golden", "squad", "hotpotqa"),
    [
        ("yes it is", "yes", 0.5, 0.0),
        ("Yes.", "yes", 1.0, 1.0),
        ("no", "no one", 2 / 3, 0.0),
        ("the red car", "red car", 1.0, 1.0),
    ],
)
def test_yes_and_no_are_scored_as_in_squad_or_hotpotqa(prediction, golden, squad, hotpotqa):
    assert f1_score(prediction, golden) == pytest.approx(squad)
    assert f1_score(prediction, golden, yes_no=True) == pytest.approx(hotpotqa)
