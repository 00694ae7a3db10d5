"""Charts contain the data of the runs, and figures contain the charts; both are read back, and images are opened."""

from __future__ import annotations

import json
import math
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from PIL import Image

from trl_search.common.errors import UserError
from trl_search.records.alarm_rules import RULES
from trl_search.records.folder import Run
from trl_search.records.report.charts import (
    SMOOTH_ABOVE,
    Alarm,
    Chart,
    charts_of,
    curve,
    metrics_of,
    points,
    run_names,
    running_mean,
    smoothing_window,
)
from trl_search.records.report.figures import COLOURS, draw_curves, draw_figures, sheet
from trl_search.records.report.panels import PANELS

SETS = ("nq", "hotpotqa")


def history(steps: int = 6, *, shift: float = 0.0, kl: bool = True) -> list[dict]:
    """The log of a run with two held-out sets, evaluated at every second step."""
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


def run_of(rows: list[dict], folder: str = "/runs/seed_0", **results: dict) -> Run:
    return Run(Path(folder), {}, rows, [], [], {name.replace("_", " "): row for name, row in results.items()})


def charts(*histories: list[dict], **results: dict) -> dict[str, Chart]:
    """The charts of runs named a, b, ... by title."""
    runs = [run_of(rows, **results) for rows in histories]
    return {chart.title: chart for chart in charts_of(runs, "abcdefghijklmnop"[: len(runs)])}


def axis_of(chart: Chart):
    [axis] = sheet([chart]).axes
    return axis


def axes_of(figure) -> dict:
    return {axis.get_title(loc="left"): axis for axis in figure.axes}


def drawn(axis) -> list[tuple[str, str, list, list]]:
    """Colour, dashes, steps and values of each line."""
    return [
        (line.get_color(), line.get_linestyle(), list(line.get_xdata()), list(line.get_ydata()))
        for line in axis.get_lines()
    ]


# The data of a chart


def test_a_missing_number_is_a_gap_and_the_last_log_of_a_step_counts() -> None:
    rows = [
        {"step": 3, "kl": 0.3},
        {"step": 1, "kl": 0.1},
        {"step": 2, "kl": None},
        {"step": 4},
        {"step": 3, "kl": 0.5},
    ]
    rows += [{"step": 5, "kl": math.inf}, {"step": 6, "kl": "much"}]
    assert curve(rows, "kl") == {1: 0.1, 2: None, 3: 0.5, 5: None, 6: None}
    assert points(rows, "kl") == {1: 0.1, 3: 0.5}


def test_a_star_matches_all_datasets_and_unused_stop_reasons_are_left_out() -> None:
    named = {panel.title: metrics_of(panel, [history()]) for panel in PANELS}
    assert named["Exact match per dataset"] == [("eval/hotpotqa/em", "hotpotqa"), ("eval/nq/em", "nq")]
    assert [label for _, label in named["How trajectories end"]] == ["answer", "search budget"]
    assert named["Gradient norm"] == []


def test_trls_evaluations_of_several_sets_are_lines_of_one_chart() -> None:
    rows = [{"step": 1, "eval_nq_reward": 0.1, "eval_nq_reward_std": 0.2}, {"step": 1, "eval_popqa_reward": 0.3}]
    [found] = charts(rows).values()
    assert found.title == "Reward of evaluations"
    assert [(line.label, line.values) for line in found.lines] == [("nq", [0.1]), ("popqa", [0.3])]


def test_a_single_dataset_has_no_chart_per_dataset() -> None:
    rows = [{"step": 1, "eval/em": 0.1, "eval/nq/em": 0.1}]
    assert list(charts(rows)) == ["Held-out answers"]


def test_panels_have_different_titles_and_no_metric_twice() -> None:
    assert len({panel.title for panel in PANELS}) == len(PANELS)
    metrics = [metric for panel in PANELS for metric, _ in panel.lines]
    assert len(set(metrics)) == len(metrics)


def test_each_alarm_is_on_the_chart_of_its_metric() -> None:
    drawn = {alarm: [metric for metric, _ in panel.lines] for panel in PANELS for alarm in panel.alarms}
    assert drawn.keys() == {rule.name for rule in RULES}
    for rule in RULES:
        watched = rule.metric.split(", ")
        assert any(fnmatch(metric, line) for metric in watched for line in drawn[rule.name]), rule.name


def test_alarms_that_fired_are_on_their_chart_with_their_steps() -> None:
    rows = history()
    for row in rows:
        row |= {"alarm/reward": float(row["step"] in (3, 4)), "alarm/entropy_rise": 0.0}
    found = charts(rows)
    rule = next(rule for rule in RULES if rule.name == "reward")
    assert found["Reward"].alarms == [Alarm("reward", 0, [3, 4], rule.means, rule.advice)]
    assert found["Entropy"].alarms == []
    axis = axis_of(found["Reward"])
    bands = sorted((patch.get_x(), patch.get_x() + patch.get_width()) for patch in axis.patches)
    assert bands == [(2.5, 3.5), (3.5, 4.5)]
    assert "alarm: reward" in [text.get_text() for text in axis.get_legend().get_texts()]


def test_the_held_out_chart_includes_the_evaluations_before_and_after_training() -> None:
    before, after, rag = {"em": 0.1, "f1": 0.2}, {"em": 0.9, "f1": 0.95}, {"em": 0.4}
    results = {"search, before GRPO": before, "search, after GRPO": after, "one-shot RAG": rag}
    for rows, steps, values in (
        ([{"step": 1, "reward": 0.5}, {"step": 5, "reward": 0.5}], [0, 5], [0.1, 0.9]),
        ([{"step": 2, "eval/em": 0.3}, {"step": 4, "eval/em": 0.8}], [0, 2, 4], [0.1, 0.3, 0.8]),  # logged at the end
    ):
        run = Run(Path("/a"), {}, rows, [], [], results)
        chart = next(chart for chart in charts_of([run], ["a"]) if chart.title == "Held-out answers")
        em, rag_line = chart.lines[0], chart.lines[-1]
        assert (em.steps, em.values) == (steps, values)
        assert (rag_line.label, rag_line.level, rag_line.values) == ("one-shot RAG", True, [0.4, 0.4])
        level = {line.get_label(): list(line.get_ydata()) for line in axis_of(chart).get_lines()}
        assert level["one-shot RAG"] == [0.4, 0.4]


# A chart


def test_compared_runs_have_different_colours_and_a_chart_per_metric() -> None:
    first, second, third = history(), history(shift=0.5), history(shift=0.7, kl=False)
    found = charts(first, second, third)
    assert "Reward" not in found and "Reward: mean" in found
    axis = axis_of(found["Reward: mean"])
    steps = [1, 2, 3, 4, 5, 6]
    expected = [
        (COLOURS[i], "-", steps, [row["reward"] for row in rows]) for i, rows in enumerate((first, second, third))
    ]
    assert drawn(axis) == expected
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "b", "c"]
    # A metric that one run lacks is drawn for the others, in their colours.
    assert [line.run for line in found["KL"].lines] == [0, 1]


def test_the_ninth_run_has_the_first_colour_and_is_dashed() -> None:
    axis = axis_of(charts(*[history(shift=i / 10) for i in range(9)])["Entropy"])
    first, ninth = drawn(axis)[0], drawn(axis)[8]
    assert first[0] == ninth[0] and (first[1], ninth[1]) == ("-", "--")


def test_a_single_line_has_the_title_as_its_name() -> None:
    assert axis_of(charts(history())["KL"]).get_legend() is None


def test_gaps_in_the_log_are_gaps_in_the_line() -> None:
    rows = history()
    rows[2]["entropy"] = None
    [(_, _, steps, values)] = drawn(axis_of(charts(rows)["Entropy"]))
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [math.isnan(value) for value in values] == [False, False, True, False, False, False]


def test_a_long_run_is_smoothed_with_the_raw_line_behind() -> None:
    steps = SMOOTH_ABOVE + 20
    rows = [{"step": step, "entropy": float(step % 2)} for step in range(1, steps + 1)]
    axis = axis_of(charts(rows)["Entropy"])
    pale, smooth = axis.get_lines()
    assert list(pale.get_ydata()) == [row["entropy"] for row in rows] and pale.get_alpha() < 0.5
    assert list(smooth.get_ydata()) == running_mean([row["entropy"] for row in rows], 5)
    assert axis.get_xlabel() == "step (mean of 5; pale: each one)"
    assert smoothing_window(SMOOTH_ABOVE) == 1 and smoothing_window(331) % 2 == 1


def test_the_running_mean_is_centred_and_skips_gaps() -> None:
    assert running_mean([1.0, 2.0, 6.0], 3) == [1.5, 3.0, 4.0]
    assert running_mean([1.0, None, 3.0], 3) == [1.0, None, 3.0] and running_mean([None], 3) == [None]


@pytest.mark.parametrize(("value", "bottom"), [(0.2, 0.0), (0.0, 0.0), (-0.3, None)])
def test_axes_begin_at_zero_unless_values_are_negative(value: float, bottom: float | None) -> None:
    axis = axis_of(charts([{"step": 1, "loss": value}, {"step": 2, "loss": value}])["Loss"])
    low, high = axis.get_ylim()
    assert (low == bottom if bottom is not None else low < value) and low <= value < high


# The sheet


def test_the_sheet_contains_only_charts_with_data() -> None:
    found = charts(history(kl=False))
    figure = sheet(list(found.values()), title="seed_0")
    assert list(axes_of(figure)) == list(found)
    assert "KL" not in found and "Exact match per dataset" in found and figure.get_suptitle() == "seed_0"


def test_labels_do_not_overlap() -> None:
    """No text on the drawn sheet overlaps another, with seven datasets, baselines, and long run names."""
    rows = history()
    for row in rows[1::2]:
        row |= {f"eval/{name}/em": 0.5 for name in ("2wikimultihopqa", "bamboogle", "musique", "popqa", "triviaqa")}
    one = Run(Path("/a"), {}, rows, [], [], {"direct answer, no search": {"em": 0.1}, "one-shot RAG": {"em": 0.4}})
    names = ["qwen3b_masked_seed_0", "qwen3b_mask_off_seed_0"]
    compared = charts_of([one, run_of(history(shift=0.1), "/b")], names)[:2]
    for found in (charts_of([one], ["a"]), compared):
        figure = sheet(found)
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


@pytest.mark.parametrize("rows", [[], [{"step": 1, "reward": None}], [{"step": 1, "reward": math.nan}]])
def test_an_empty_log_gives_a_sheet_that_says_so(rows: list[dict], tmp_path: Path) -> None:
    figure = sheet(charts_of([run_of(rows)], ["a"]))
    assert not figure.axes and figure.texts[0].get_text() == "Nothing is logged yet."
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert draw_curves(tmp_path, tmp_path / "curves.png").stat().st_size > 0


# The images


def test_every_chart_becomes_an_image_and_global_settings_stay(tmp_path: Path) -> None:
    import matplotlib

    before, loaded = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    kept = ("step", "reward", "eval/em", "eval/reflection_ratio", "stop/answer")
    rows = [{key: row[key] for key in row if key in kept} for row in history()]
    written = draw_figures([run_of(rows)], tmp_path / "figures")
    assert [path.name for path in written] == [
        "overview.png",
        "held-out_answers.png",
        "reward.png",
        "how_trajectories_end.png",
        "reflection.png",
        "reflection_and_em.png",
    ]
    assert dict(matplotlib.rcParams) == before and ("matplotlib.pyplot" in sys.modules) == loaded
    for path in written[:-1]:
        picture = Image.open(path).convert("RGB")
        colours = {colour for _, colour in picture.getcolors(1 << 24)}
        assert picture.width >= 900 and (0x2F, 0x6D, 0xB3) in colours and (255, 255, 255) in colours


def test_each_run_that_reflects_gets_a_reflection_figure(tmp_path: Path) -> None:
    rows = [{"step": 2, "eval/em": 0.1, "eval/reflection_ratio": 0.2}]
    silent = [{"step": 2, "eval/em": 0.1, "eval/reflection_ratio": 0.0}]
    runs = [run_of(rows, "/runs/a/qwen"), run_of(rows, "/runs/b/qwen"), run_of(silent, "/runs/c/qwen")]
    names = {path.name for path in draw_figures(runs, tmp_path)}
    assert {name for name in names if name.startswith("reflection_and_em")} == {
        "reflection_and_em_a_qwen.png",
        "reflection_and_em_b_qwen.png",
    }


def test_runs_are_named_by_the_part_of_the_path_that_differs() -> None:
    assert run_names([run_of([], "/runs/seed_0")]) == ["seed_0"]
    assert run_names([run_of([], "/runs/seed_0/qwen"), run_of([], "/runs/seed_1/qwen")]) == [
        "seed_0/qwen",
        "seed_1/qwen",
    ]


@pytest.mark.parametrize(
    ("folders", "message"),
    [([], "0 were given"), ([f"/{i}" for i in range(17)], "17 were given"), (["/a", "/b", "/a"], "/a is given twice")],
)
def test_runs_that_cannot_be_compared_are_refused(folders: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        draw_figures([run_of([], folder) for folder in folders], tmp_path / "out")
    assert not (tmp_path / "out").exists()
