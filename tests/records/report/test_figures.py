"""The figures hold the data: what is drawn is read back from them, and pictures are opened."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from trl_search.common.errors import UserError
from trl_search.records.folder import Run
from trl_search.records.report.drawing import COLOURS, SMOOTH_ABOVE, running_mean, smoothing_window
from trl_search.records.report.figures import draw_curves, draw_figures, overview_figure, panel_figure, run_names
from trl_search.records.report.panels import PANELS, Panel, curve, lines_of, points

SETS = ("nq", "hotpotqa")


def history(steps: int = 6, *, shift: float = 0.0, kl: bool = True) -> list[dict]:
    """Of a run with two held-out sets, evaluated at every second step."""
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "reward": 0.1 * step + shift, "reward_std": 0.2, "entropy": 1 / step, "loss": -0.1}
        row |= {"search/searches": 1.5, "search/turns": 2.5, "tokens/model": 90.0, "tokens/observation": 300.0}
        row |= {"stop/answer": 0.75, "stop/search_budget": 0.25, "stop/turn_budget": 0.0, "stop/environment": 0.0}
        row |= {"reflection/ratio": 0.01 * step, "rewards/em/mean": 0.1 * step}
        if kl:
            row["kl"] = 0.001 * step
        if step % 2 == 0:
            row |= {f"eval/{name}/em": 0.1 * i + 0.05 * step for i, name in enumerate(SETS)}
            row |= {"eval/em": 0.05 + 0.05 * step, "eval/reflection_ratio": 0.02 * step}
        rows.append(row)
    return rows


def run_of(rows: list[dict], folder: str = "/runs/seed_0") -> Run:
    return Run(Path(folder), {}, rows, [], [])


def panel(title: str) -> Panel:
    return next(panel for panel in PANELS if panel.title == title)


def axes_of(figure) -> dict:
    return {axis.get_title(loc="left"): axis for axis in figure.axes}


def drawn(axis) -> list[tuple[str, str, list, list]]:
    """Colour, dash, steps and values of each line."""
    return [
        (line.get_color(), line.get_linestyle(), list(line.get_xdata()), list(line.get_ydata()))
        for line in axis.get_lines()
    ]


# The data of a panel


def test_a_number_that_is_none_is_a_gap_and_the_last_log_of_a_step_wins() -> None:
    rows = [
        {"step": 3, "kl": 0.3},
        {"step": 1, "kl": 0.1},
        {"step": 2, "kl": None},
        {"step": 4},
        {"step": 3, "kl": 0.5},
    ]
    rows += [{"kl": 9.0}, {"step": 5, "kl": math.inf}, {"step": 6, "kl": "much"}]
    found = curve(rows, "kl")
    assert list(found) == [1, 2, 3, 5, 6]
    assert [value for value in found.values() if not math.isnan(value)] == [0.1, 0.5]
    assert points(rows, "kl") == {1: 0.1, 3: 0.5}


def test_a_star_is_spelt_out_and_an_end_that_never_happens_left_out() -> None:
    rows = history()
    named = {panel.title: [(line.metric, line.label) for line in lines_of(panel, [rows])] for panel in PANELS}
    assert named["Exact match per dataset"] == [("eval/hotpotqa/em", "hotpotqa"), ("eval/nq/em", "nq")]
    assert [label for _, label in named["How trajectories end"]] == ["answer", "search budget"]
    assert named["Gradient norm"] == []


def test_panels_have_titles_of_their_own_and_no_metric_twice() -> None:
    assert len({panel.title for panel in PANELS}) == len(PANELS)
    metrics = [metric for panel in PANELS for metric, _ in panel.lines]
    assert len(set(metrics)) == len(metrics)


# A panel


def test_two_runs_share_colours_and_differ_in_dashes() -> None:
    first, second = history(), history(shift=0.5)
    figure = panel_figure(panel("Reward"), {"a": first, "b": second})
    [axis] = figure.axes
    steps = [1, 2, 3, 4, 5, 6]
    assert drawn(axis) == [
        (COLOURS[0], "-", steps, [row["reward"] for row in first]),
        (COLOURS[0], "--", steps, [row["reward"] for row in second]),
        (COLOURS[1], "-", steps, [0.2] * 6),
        (COLOURS[1], "--", steps, [0.2] * 6),
    ]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["mean", "std within groups"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_what_one_of_two_runs_lacks_is_drawn_of_the_other_in_its_dash() -> None:
    [axis] = panel_figure(panel("KL"), {"a": history(kl=False), "b": history()}).axes
    assert [(colour, dash) for colour, dash, _, _ in drawn(axis)] == [(COLOURS[0], "--")]
    assert axis.get_legend() is None  # one line is named by the title


def test_gaps_of_the_log_are_gaps_of_the_line() -> None:
    rows = history()
    rows[2]["entropy"] = None
    [axis] = panel_figure(panel("Entropy"), {"": rows}).axes
    [(_, _, steps, values)] = drawn(axis)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [math.isnan(value) for value in values] == [False, False, True, False, False, False]


def test_a_long_run_is_smoothed_and_shown_as_it_is_behind() -> None:
    steps = SMOOTH_ABOVE + 20
    rows = [{"step": step, "entropy": float(step % 2)} for step in range(1, steps + 1)]
    [axis] = panel_figure(panel("Entropy"), {"": rows}).axes
    pale, smooth = axis.get_lines()
    assert list(pale.get_ydata()) == [row["entropy"] for row in rows] and pale.get_alpha() < 0.5
    assert list(smooth.get_ydata()) == running_mean([row["entropy"] for row in rows], 5)
    assert axis.get_xlabel() == "step (mean of 5; pale: each one)"
    assert smoothing_window(SMOOTH_ABOVE) == 1 and smoothing_window(331) % 2 == 1


def test_the_running_mean_is_centred_and_passes_over_nan() -> None:
    assert running_mean([1.0, 2.0, 6.0], 3) == [1.5, 3.0, 4.0]
    assert running_mean([1.0, math.nan, 3.0], 3)[::2] == [1.0, 3.0] and math.isnan(running_mean([math.nan], 3)[0])


@pytest.mark.parametrize(("value", "bottom"), [(0.2, 0.0), (0.0, 0.0), (-0.3, None)])
def test_axes_begin_at_zero_unless_something_lies_below(value: float, bottom: float | None) -> None:
    [axis] = panel_figure(panel("Loss"), {"": [{"step": 1, "loss": value}, {"step": 2, "loss": value}]}).axes
    low, high = axis.get_ylim()
    assert (low == bottom if bottom is not None else low < value) and low <= value < high


# The sheet


def test_the_sheet_holds_the_panels_with_data_and_no_empty_ones() -> None:
    figure = overview_figure({"seed_0": history(kl=False)})
    titles = list(axes_of(figure))
    assert titles == [panel.title for panel in PANELS if lines_of(panel, [history(kl=False)])]
    assert "KL" not in titles and "Exact match per dataset" in titles and figure.get_suptitle() == "seed_0"


def test_labels_do_not_overlap() -> None:
    """As drawn: no text of the sheet lies over another, with seven data sets and two runs of long names."""
    rows = history()
    for row in rows[1::2]:
        row |= {f"eval/{name}/em": 0.5 for name in ("2wikimultihopqa", "bamboogle", "musique", "popqa", "triviaqa")}
    figure = overview_figure({"qwen3b_masked_seed_0": rows, "qwen3b_mask_off_seed_0": history(shift=0.1)})
    figure.draw_without_rendering()
    for axis in figure.axes:
        legend = axis.get_legend()
        texts = [axis.title, axis._left_title, axis.xaxis.label, *axis.texts, *axis.get_xticklabels()]
        texts += [*axis.get_yticklabels(), *(legend.get_texts() if legend else [])]
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
        for i, (name, box) in enumerate(boxes):
            for other, other_box in boxes[:i]:
                apart = box.x1 <= other_box.x0 + 1 or other_box.x1 <= box.x0 + 1
                apart |= box.y1 <= other_box.y0 + 1 or other_box.y1 <= box.y0 + 1
                assert apart, (axis.get_title(loc="left"), name, other)


def test_curves_of_a_run_show_what_was_measured_beside_the_log(tmp_path: Path) -> None:
    measured = {"one-shot RAG": SimpleNamespace(em=0.39), "search, after GRPO": SimpleNamespace(em=0.92)}
    levels = {row: result.em for row, result in measured.items()}
    for rows in (history(), [{"step": 1, "reward": 0.5}]):  # with held-out EM in the log, and without
        axis = axes_of(overview_figure({"": rows}, levels=levels))["Held-out answers"]
        level = {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}
        assert level["one-shot RAG"] == [0.39, 0.39] and level["search, after GRPO"] == [0.92, 0.92]
        assert axis.get_ylim()[1] > 0.92
    assert draw_curves([{"step": 1, "reward": 0.5}], tmp_path / "a.png", measured).exists()  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [[], [{"step": 1, "reward": None}], [{"step": 1, "reward": math.nan}], [{"note": 1}]])
def test_an_empty_log_gives_a_sheet_that_says_so(rows: list[dict], tmp_path: Path) -> None:
    figure = overview_figure({"": rows})
    assert not figure.axes and figure.texts[0].get_text() == "Nothing is logged yet."
    assert draw_curves(rows, tmp_path / "curves.png", {}).stat().st_size > 0


# The pictures


def test_every_panel_becomes_a_picture_and_nothing_global_changes(tmp_path: Path) -> None:
    import matplotlib

    before, loaded = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    rows = [{key: row[key] for key in row if key in ("step", "reward", "eval/em", "stop/answer")} for row in history()]
    written = draw_figures([run_of(rows)], tmp_path / "figures")
    assert [path.name for path in written] == [
        "overview.png",
        "reward.png",
        "held-out_answers.png",
        "how_trajectories_end.png",
        "reflection_and_em.png",
    ]
    assert dict(matplotlib.rcParams) == before and ("matplotlib.pyplot" in sys.modules) == loaded
    for path in written[:-1]:
        picture = Image.open(path).convert("RGB")
        colours = {colour for _, colour in picture.getcolors(1 << 24)}
        assert picture.width >= 900 and (0x2F, 0x6D, 0xB3) in colours and (255, 255, 255) in colours


def test_two_runs_get_a_reflection_figure_each(tmp_path: Path) -> None:
    rows = [{"step": 2, "eval/em": 0.1, "eval/reflection_ratio": 0.2}]
    written = draw_figures([run_of(rows, "/runs/a/qwen"), run_of(rows, "/runs/b/qwen")], tmp_path)
    assert {"reflection_and_em_a_qwen.png", "reflection_and_em_b_qwen.png"} <= {path.name for path in written}
    assert all(path.parent == tmp_path and path.exists() for path in written)


def test_runs_are_named_by_what_tells_them_apart() -> None:
    assert run_names([run_of([], "/runs/seed_0")]) == ["seed_0"]
    assert run_names([run_of([], "/runs/seed_0/qwen"), run_of([], "/runs/seed_1/qwen")]) == [
        "seed_0/qwen",
        "seed_1/qwen",
    ]


@pytest.mark.parametrize(
    ("folders", "message"), [([], "0 were given"), (["/a", "/b", "/c"], "3 were given"), (["/a", "/a"], "twice")]
)
def test_runs_that_cannot_be_compared_are_refused(folders: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        draw_figures([run_of([], folder) for folder in folders], tmp_path / "out")
    assert not (tmp_path / "out").exists()
