"""The reflection figure: its points, its numbers against scipy and by hand, and its text if it claims nothing."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from trl_search.records.folder import Run
from trl_search.records.report.figures import draw_figures, reflection_figure
from trl_search.records.report.reflection import (
    Coefficient,
    ReflectionPoint,
    any_reflection,
    correlate,
    reflection_points,
    words,
)


def run_of(history: list[dict], name: str = "seed_0") -> Run:
    return Run(Path("/runs") / name, {}, history, [], [])


def checkpoints(ratios: list[float], ems: list[float]) -> list[ReflectionPoint]:
    return [ReflectionPoint(10 * i, *pair) for i, pair in enumerate(zip(ratios, ems, strict=True), start=1)]


RATIOS = [0.02, 0.05, 0.04, 0.09, 0.12, 0.11, 0.16]
EMS = [0.11, 0.18, 0.24, 0.22, 0.31, 0.33, 0.34]


# Points


def test_an_evaluation_with_its_own_ratio_is_used() -> None:
    history = [
        {"step": 1, "reflection/ratio": 0.9},
        {"step": 2, "reflection/ratio": 0.9, "eval/em": 0.2, "eval/reflection_ratio": 0.05},
        {"step": 4, "reflection/ratio": 0.9, "eval/em": None, "eval/reflection_ratio": 0.06},  # a NaN in the log
        {"step": 6, "reflection/ratio": 0.9, "eval/em": 0.3},  # never filled in from training
        {"step": 8, "eval/em": 0.4, "eval/reflection_ratio": 0.07},
    ]
    assert reflection_points(run_of(history)) == [
        ReflectionPoint(2, 0.05, 0.2),
        ReflectionPoint(8, 0.07, 0.4),
    ]


# Numbers


def test_pearson_equals_scipys_with_fishers_interval() -> None:
    levels = correlate(checkpoints(RATIOS, EMS)).levels
    expected = stats.pearsonr(RATIOS, EMS)
    low, high = expected.confidence_interval(0.95)
    assert levels.n == 7 and levels.problem == ""
    assert levels.pearson == Coefficient(*map(pytest.approx, (expected.statistic, low, high)))
    line = stats.linregress(RATIOS, EMS)
    assert (levels.slope, levels.intercept) == (pytest.approx(line.slope), pytest.approx(line.intercept))


def test_spearman_equals_scipys_with_the_wider_interval() -> None:
    spearman = correlate(checkpoints(RATIOS, EMS)).levels.spearman
    rho = stats.spearmanr(RATIOS, EMS).statistic
    # Ranks 1 3 2 4 6 5 7 and 1 2 4 3 5 6 7: sum of squares 0+1+4+1+1+1+0 = 8, so 1 - 6*8/(7*48).
    assert rho == pytest.approx(1 - 6 * 8 / (7 * 48))
    half = 1.959963985 * math.sqrt((1 + rho**2 / 2) / 4)
    assert spearman is not None and spearman.low is not None and spearman.high is not None
    assert (spearman.value, spearman.low, spearman.high) == (
        pytest.approx(rho),
        pytest.approx(math.tanh(math.atanh(rho) - half)),
        pytest.approx(math.tanh(math.atanh(rho) + half)),
    )


def test_the_spearman_interval_has_the_right_coverage() -> None:
    """For 200 samples of 20 points, about 95 % of the intervals contain the rho of the population."""
    draw, rho = random.Random(0), 6 / math.pi * math.asin(0.6 / 2)  # the rho of a bivariate normal with r = .6
    covered = 0
    for _ in range(200):
        x = [draw.gauss(0, 1) for _ in range(20)]
        y = [0.6 * value + 0.8 * draw.gauss(0, 1) for value in x]
        found = correlate(checkpoints(x, y)).levels.spearman
        assert found is not None and found.low is not None and found.high is not None
        covered += found.low <= rho <= found.high
    assert 0.91 <= covered / 200 <= 0.99


def test_two_rising_series_correlate_in_levels_but_not_in_changes() -> None:
    draw = random.Random(3)
    ratios = [0.02 * i + draw.uniform(0, 0.01) for i in range(30)]
    ems = [0.1 + 0.02 * i + draw.uniform(0, 0.01) for i in range(30)]
    correlation = correlate(checkpoints(ratios, ems))
    assert correlation.levels.pearson is not None and correlation.levels.pearson.value > 0.99
    changes = correlation.differences
    assert changes.n == 29 and changes.pearson is not None and changes.pearson.low is not None
    assert changes.pearson.low < 0 < changes.pearson.high
    expected = stats.pearsonr(
        [after - before for before, after in itertools.pairwise(ratios)],
        [after - before for before, after in itertools.pairwise(ems)],
    )
    assert changes.pearson.value == pytest.approx(expected.statistic)


@pytest.mark.parametrize(
    ("ratios", "ems", "problem"),
    [
        ([], [], "0 checkpoints, and an interval takes 4 or more"),
        ([0.1], [0.2], "1 checkpoint, and an interval takes 4 or more"),
        ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4], "3 checkpoints, and an interval takes 4 or more"),
        ([0.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4], "the reflective share is the same over all 4 checkpoints"),
        ([0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.5, 0.5], "the EM is the same over all 4 checkpoints"),
    ],
)
def test_without_enough_data_no_correlation_is_claimed(ratios: list[float], ems: list[float], problem: str) -> None:
    points = checkpoints(ratios, ems)
    correlation = correlate(points)
    assert correlation.levels.problem == problem
    assert correlation.levels.pearson is None and correlation.levels.slope is None
    text = " ".join(words(points, correlation))
    assert (problem in text and "no correlation is claimed" in text) or "nothing to compare" in text


def test_four_checkpoints_have_levels_and_no_changes() -> None:
    correlation = correlate(checkpoints(RATIOS[:4], EMS[:4]))
    assert correlation.levels.pearson is not None
    assert correlation.differences.problem == "3 changes between checkpoints, and an interval takes 4 or more"


def test_complete_agreement_has_no_interval() -> None:
    """Fisher's interval would be [1, 1] for any number of points."""
    points = checkpoints([0.1, 0.2, 0.3, 0.4], [0.2, 0.4, 0.6, 0.8])
    correlation = correlate(points)
    for found in (correlation.levels.pearson, correlation.levels.spearman):
        assert found is not None and found.value == pytest.approx(1) and (found.low, found.high) == (None, None)
    text = words(points, correlation)[0]
    assert "complete agreement: no interval" in text


numbers = st.floats(0, 1, allow_nan=False)


@given(st.lists(st.tuples(numbers, numbers), max_size=12))
@example([(0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (1.0, 1.1e-295)])  # its square underflows to 0
def test_the_numbers_are_finite_for_any_measurements(pairs: list[tuple[float, float]]) -> None:
    points = [ReflectionPoint(i, *pair) for i, pair in enumerate(pairs)]
    correlation = correlate(points)
    assert words(points, correlation)
    for association in (correlation.levels, correlation.differences):
        assert (association.pearson is None) == bool(association.problem)
        for found in (association.pearson, association.spearman):
            if found is not None and found.low is not None and found.high is not None:
                assert -1 <= found.low <= found.value + 1e-9 and found.value <= found.high + 1e-9 <= 1 + 1e-9


# The figure


def test_the_figure_shows_the_points_the_line_and_the_numbers() -> None:
    found = checkpoints(RATIOS, EMS)
    figure = reflection_figure(found, correlate(found), title="seed_0")
    axis = figure.axes[0]
    assert axis.collections[0].get_offsets().tolist() == [[x, y] for x, y in zip(RATIOS, EMS, strict=True)]
    (x0, x1), (y0, y1) = axis.get_lines()[0].get_data()
    assert (y1 - y0) / (x1 - x0) == pytest.approx(stats.linregress(RATIOS, EMS).slope)
    caption = figure.get_supxlabel().replace("\n", " ")
    assert f"r = {stats.pearsonr(RATIOS, EMS).statistic:.2f} [" in caption and "n = 7" in caption
    assert "n = 6" in caption and "although neither causes the other" in caption
    assert figure.get_suptitle() == "seed_0"


def test_the_image_of_a_run_is_written(tmp_path: Path) -> None:
    history = [
        {"step": 10 * i, "eval/em": em, "eval/reflection_ratio": ratio}
        for i, (ratio, em) in enumerate(zip(RATIOS, EMS, strict=True), start=1)
    ]
    path = draw_figures([run_of(history)], tmp_path / "new")[-1]
    picture = Image.open(path)
    assert path.name == "reflection_and_em.png" and picture.width == 960 and picture.height >= 600


def test_a_run_without_reflection_has_nothing_to_draw() -> None:
    nothing = reflection_points(run_of([{"step": 1, "reflection/ratio": 0.5}]))
    silent = reflection_points(run_of([{"step": 1, "eval/em": 0.5, "eval/reflection_ratio": 0.0}]))
    assert not any_reflection(nothing) and not any_reflection(silent)
    assert "--evaluate_every" in words(nothing, correlate(nothing))[0]
    assert any_reflection(reflection_points(run_of([{"step": 1, "eval/em": 0.5, "eval/reflection_ratio": 0.1}])))


def test_equal_numbers_have_the_same_rank() -> None:
    ratios, ems = [0.1, 0.2, 0.2, 0.3, 0.3, 0.3], [0.1, 0.3, 0.2, 0.2, 0.5, 0.4]
    spearman = correlate(checkpoints(ratios, ems)).levels.spearman
    assert spearman is not None and spearman.value == pytest.approx(stats.spearmanr(ratios, ems).statistic)


def test_a_constant_ratio_draws_points_and_no_line() -> None:
    found = checkpoints([0.1] * 5, EMS[:5])
    figure = reflection_figure(found, correlate(found))
    axis = figure.axes[0]
    assert len(axis.collections[0].get_offsets()) == 5 and not axis.get_lines()
    assert "no correlation is claimed" in figure.get_supxlabel()
    assert axis.get_xlabel() == "share of reflective trajectories, held-out"
