"""The overview in a real browser: the results of the run, charts with alarms, comparisons, every screen size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.report_browser import SIZES, Page
from tests.support.report_runs import write_run
from trl_search.records.folder import read_run
from trl_search.records.report.page import write_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was evaluated before and after training, with an alarm at steps 3 and 4."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "first", steps=6)
    with (folder / "metrics.jsonl").open("a") as file:
        for step in (3, 4):
            file.write(json.dumps({"step": step, "alarm/reward": 1.0}) + "\n")
    measured = {"em_ci95": 0.03, "em_interval": [0.7, 0.8], "questions": 200, "f1": 0.8, "searches": 1.7}
    rows = {"one-shot RAG": {"em": 0.3}, "search, before GRPO": {"em": 0.1, "f1": 0.2}}
    rows["search, after GRPO"] = {"em": 0.75, **measured}
    (folder / "results.json").write_text(json.dumps({"rows": rows, "seconds": 100.0}))
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> Path:
    return write_report([read_run(folder)], folder / "report.html")


@pytest.fixture(scope="module")
def several(folder: Path) -> Path:
    others = [
        write_run(folder.parent / name, steps=4, seed=i, beta=0.01) for i, name in enumerate(("second", "third"))
    ]
    return write_report([read_run(path) for path in (folder, *others)], folder.parent / "several.html")


def chart(page: Page, title: str) -> Any:
    return page.page.locator(f".card[aria-label='{title}']")


def test_the_overview_begins_with_the_results_of_the_run(browser: Any, report: Path) -> None:
    page = Page(browser, report, tab="overview")
    assert page.text(".headline").startswith(
        "Held-out exact match rose from 0.100 to 0.700 on 200 questions, 2.3 times"
    )
    names = page.page.locator(".fact dt").all_inner_texts()
    values = page.page.locator(".fact dd:first-of-type").all_inner_texts()
    facts = dict(zip(names, values, strict=True))
    assert facts["Held-out exact match"] == "0.100 → 0.700" and facts["One-shot RAG"] == "0.300"
    assert (facts["Steps"], facts["Model"], facts["Recipe"]) == ("6", "tiny", "quickstart")
    page.close()


def test_charts_show_their_values(browser: Any, report: Path, folder: Path) -> None:
    page = Page(browser, report, tab="overview")
    history = read_run(folder).history
    card = chart(page, "Reward")
    assert card.locator("canvas").count() == 1
    assert "step 6" in " ".join(card.locator(".u-legend").inner_text().split())
    over = card.locator(".u-over").bounding_box()
    page.page.mouse.move(over["x"] + over["width"] * 2 / 6, over["y"] + 60)
    page.page.wait_for_function(
        "() => document.querySelector(\".card[aria-label='Reward'] .u-legend .u-value\").textContent === '2'"
    )
    assert card.locator(".u-value").all_inner_texts()[:2] == ["2", f"{history[1]['reward']:.3g}"]
    # All charts show the same step.
    assert chart(page, "Entropy").locator(".u-value").all_inner_texts() == ["2", f"{history[1]['entropy']:.3g}"]
    assert chart(page, "Reflection and exact match").locator("canvas").count() == 1
    page.page.click("#tab-setup")
    assert "config.learning_rate" in page.text("#setup")
    page.close()


def test_alarms_are_shown_above_the_charts_and_as_a_band_on_their_chart(browser: Any, report: Path) -> None:
    page = Page(browser, report, tab="overview")
    assert page.text(".alarms").split("\n") == ["1 alarm", "reward at 2 steps from 3"]
    band = """title => { const canvas = document.querySelector(`.card[aria-label='${title}'] canvas`);
        const at = x => [...canvas.getContext('2d').getImageData(x * canvas.width, canvas.height / 2, 1, 1).data];
        const over = document.querySelector(`.card[aria-label='${title}'] .u-over`).getBoundingClientRect();
        const left = (over.left - canvas.getBoundingClientRect().left) / canvas.clientWidth;
        return [1.7, 3.3].map(step => at(left + over.width / canvas.clientWidth * step / 6)[3] > 0) }"""
    assert page.page.evaluate(band, "Reward") == [False, True]
    assert page.page.evaluate(band, "Entropy") == [False, False]
    page.complaints.clear()  # the browser warns when its canvas is read
    assert "the policy gets worse on its training reward: go back to" in chart(page, "Reward").inner_text()
    page.page.click(".alarms button")
    page.page.click("#tab-trajectories")
    assert not page.page.locator(".alarms").is_visible(), "alarms are shown only on the overview"
    page.close()


def test_a_click_on_a_point_opens_the_trajectories_of_its_step(browser: Any, report: Path) -> None:
    page = Page(browser, report, tab="overview")
    over = chart(page, "Reward").locator(".u-over").bounding_box()
    page.page.mouse.click(over["x"] + over["width"] * 5 / 6, over["y"] + 60)
    page.found("8 of 48")
    assert all(text.startswith("step 5") for text in page.listed("> .facts"))
    assert "from=5" in page.page.url and "to=5" in page.page.url
    page.page.go_back()
    page.page.wait_for_selector("#overview:not([hidden])")
    page.close()


def test_a_run_without_reflection_has_no_reflection_figure(browser: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "silent", steps=2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    silent = [{name: 0.0 if "reflect" in name else value for name, value in row.items()} for row in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in silent))
    page = Page(browser, write_report([read_run(folder)], tmp_path / "report.html"), tab="overview")
    assert chart(page, "Reward").count() == 1 and "eflect" not in page.text("#overview")
    page.close()


def test_three_runs_have_different_colours(browser: Any, several: Path) -> None:
    page = Page(browser, several, tab="overview")
    names = page.page.locator(".compared tbody th").all_inner_texts()
    assert [name.strip() for name in names] == ["first", "second", "third"]
    colours = page.page.eval_on_selector_all(
        ".compared .run-mark", "all => all.map(one => getComputedStyle(one).color)"
    )
    legend = (
        "all => all.map(one => [one.textContent, one.closest('tr').querySelector('.u-marker').style.borderTopColor])"
    )
    labels = page.page.eval_on_selector_all(".card[aria-label='Entropy'] .u-series:not(:first-child) .u-label", legend)
    assert labels == [list(pair) for pair in zip(("first", "second", "third"), colours, strict=True)]
    assert len(set(colours)) == 3
    page.page.click("#tab-trajectories")
    page.found("112 trajectories")
    page.page.select_option("[name=run]", "1")
    page.found("32 of 112")
    page.page.wait_for_function("() => document.querySelector('.where').textContent.startsWith('second')")
    page.page.click("#tab-setup")
    assert "config.beta" in page.page.locator("#setup table").first.inner_text()
    assert "config.num_generations" not in page.page.locator("#setup table").first.inner_text()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
def test_every_screen_size_scrolls_only_vertically_and_is_readable(
    browser: Any, several: Path, size: str, scheme: str
) -> None:
    page = Page(browser, several, tab="overview", scheme=scheme, size=size)
    paper = {"light": "rgb(247, 247, 245)", "dark": "rgb(19, 21, 24)"}[scheme]
    assert page.style("body", "backgroundColor") == paper
    for tab in ("setup", "overview", "trajectories", "trajectories?open=0.2.1", "trajectories?open=0.2.1&view=group"):
        page.page.goto(f"{page.url}#{tab}")
        page.page.wait_for_selector(".columns" if "group" in tab else f"#{tab.partition('?')[0]}:not([hidden])")
        assert page.page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0], tab
        assert page.contrast() >= 4.5, tab
    page.close()


def test_a_phone_shows_the_list_or_one_trajectory(browser: Any, report: Path) -> None:
    page = Page(browser, report, size="phone")
    page.found("48 trajectories")
    assert page.page.locator(".list").is_visible() and not page.page.locator(".detail").is_visible()
    assert not page.page.locator("[name=outcome]").is_visible()
    page.page.click(".more")
    page.page.select_option("[name=outcome]", "correct")
    page.page.click(".row >> nth=1")
    page.page.wait_for_selector(".detail h2")
    assert not page.page.locator(".list").is_visible()
    page.page.click(".back")
    assert page.page.locator(".list").is_visible() and page.page.input_value("[name=outcome]") == "correct"
    page.close()
