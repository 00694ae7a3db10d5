"""The report in a real browser, from a file, without a network: what it shows, how it reacts, and that the text of a
model stays text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.calculator import ADD
from tests.support.report_browser import Page
from tests.support.report_runs import trajectory, write_run, write_trajectories
from trl_search.config.run_file import RUN_FILE
from trl_search.records.folder import read_run, read_trajectories
from trl_search.records.report.page import write_report

pytestmark = pytest.mark.slow

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose last step has one trajectory with two searches, hostile text and wide characters."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "first", steps=6, a_step=8)
    turns = [
        ("assistant", "<think> let me verify the naïve 🧭 reading </think>\n<tool_call> who </tool_call><|im_end|>"),
        ("tool", f"\n<tool_response>\n{HOSTILE} the mill\n</tool_response><|im_end|>\n"),
        ("assistant", f"<think> {HOSTILE} </think><answer> Bram </answer>"),
    ]
    row = trajectory(7, 0, turns, question=f"who wrote {HOSTILE}?", answer=f"Bram {HOSTILE}", reward=0.0)
    write_trajectories(folder, 7, [row | {"rewards/em": 0.0, "advantage": -0.5, "stop_reason": "search_budget"}])
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> Path:
    return write_report([read_run(folder)], folder / "report.html")


@pytest.fixture(scope="module")
def shared(browser: Any, report: Path) -> Iterator[Page]:
    page = Page(browser, report)
    yield page
    page.close()


@pytest.fixture
def opened(shared: Page) -> Page:
    """The report with the trajectories tab open. All tests share one page, because opening it takes time."""
    shared.page.click("[name=reset]")
    shared.found("49 trajectories")
    shared.page.evaluate("document.querySelector('.list').scrollTo(0, 0)")
    shared.page.click("#row-0")
    shared.page.evaluate("document.activeElement.blur()")
    shared.page.wait_for_selector("#row-0.selected")
    return shared


def test_every_token_has_the_colour_of_its_mask(browser: Any, opened: Page, folder: Path) -> None:
    rows = read_trajectories(read_run(folder)).to_pylist()
    for number in (0, 3, len(rows) - 1):
        opened.page.evaluate("number => document.querySelector('.list').scrollTo(0, number * 62)", number)
        opened.page.click(f"#row-{number}")
        opened.detail(rows[number]["question"])
        shown = opened.page.eval_on_selector_all(
            ".text .t", "all => all.map(one => [one.textContent, getComputedStyle(one).backgroundColor])"
        )
        colours = {1: "rgb(211, 231, 253)", 0: "rgb(239, 239, 236)"}
        assert opened.style(".swatch.trained", "backgroundColor") == colours[1], "differs from the legend"
        assert [token for token, _ in shown] == rows[number]["tokens"]
        assert [colour for _, colour in shown] == [colours[bit] for bit in rows[number]["mask"]]
        said = opened.text(".legend")
        assert f"Trained {sum(rows[number]['mask'])} tokens" in said
        assert f"Masked {len(rows[number]['mask']) - sum(rows[number]['mask'])} tokens" in said
    runs = opened.page.eval_on_selector_all(".strip i", "all => all.map(one => [one.className, +one.style.flexGrow])")
    counts = [turn["end"] - turn["start"] for turn in rows[-1]["turns"]]
    assert runs == [["trained", counts[0]], ["masked", counts[1]], ["trained", counts[2]]]


def test_turns_and_tags_are_marked(opened: Page) -> None:
    opened.page.click(".row:has-text('1 search')")
    opened.page.wait_for_selector(".turn[data-role=tool]")
    assert opened.listed(".facts")[0].startswith("step 1")
    headers = opened.page.locator(".turn header b").all_inner_texts()
    assert headers == ["Turn 1 · policy", "Tool result", "Turn 2 · policy"]
    # A tag may be split into several tokens: each piece is marked.
    for family, tag in (
        ("think", "<think>"),
        ("call", "<tool_call>"),
        ("answer", "<answer>"),
        ("tool", "</tool_resp"),
    ):
        assert tag in "".join(opened.page.locator(f".text .tag.{family}").all_text_contents())


def test_the_text_of_a_model_stays_text(opened: Page, folder: Path) -> None:
    opened.page.fill("[name=query]", "onerror")
    opened.found("1 of 49")
    opened.detail(f"who wrote {HOSTILE}?")
    assert HOSTILE in opened.text(".text") and HOSTILE in opened.text(".answers")
    assert opened.page.locator("img").count() == 0
    assert opened.page.title() == "first · trl-search report"
    allowed = opened.page.evaluate(
        "() => { const script = document.createElement('script'); "
        "try { script.text = 'document.title = 1' } catch (error) { return error.name } document.body.append(script) }"
    )
    assert allowed == "TypeError", "a string could become a script"
    opened.complaints.clear()


def test_a_token_shows_its_details(opened: Page, folder: Path) -> None:
    row = read_trajectories(read_run(folder)).to_pylist()[-1]
    opened.page.fill("[name=query]", "onerror")
    opened.detail(row["question"])
    opened.page.hover(".text .t[data-i='4']")
    assert opened.text("#tip code") == json.dumps(row["tokens"][4], ensure_ascii=False)
    assert "trained (mask 1)" in opened.text("#tip") and "log-prob −0.004" in opened.text("#tip")
    opened.page.hover(f".text .t[data-i='{row['turns'][1]['start'] + 1}']")
    assert "masked (mask 0)" in opened.text("#tip") and "no log-prob" in opened.text("#tip")
    assert opened.page.locator("mark").all_text_contents() and set(
        "".join(opened.page.locator("mark").all_text_contents())
    ) <= set("onerror")


def test_filters(opened: Page, folder: Path) -> None:
    rows = read_trajectories(read_run(folder)).to_pylist()
    right = [row["answer"] == "Mira Talvane" for row in rows]
    opened.found("49 trajectories")
    opened.page.select_option("[name=outcome]", "correct")
    opened.found(f"{sum(right)} of 49")
    assert set(opened.listed(".verdict")) == {"✓"}
    opened.page.select_option("[name=searched]", "no")
    opened.found(f"{sum(ok and not row['calls'] for ok, row in zip(right, rows, strict=True))} of 49")
    opened.page.click("[name=reset]")
    opened.found("49 trajectories")
    opened.page.fill("[name=from]", "3")
    opened.page.fill("[name=to]", "4")
    opened.found("16 of 49")
    opened.page.click("[name=reset]")
    opened.page.select_option("[name=stop]", "search_budget")
    opened.found("1 of 49")
    opened.page.fill("[name=query]", "nobody wrote this")
    opened.found("0 of 49")
    assert "No trajectory fits" in opened.text(".detail")
    opened.page.click("[name=reset]")
    opened.found("49 trajectories")


def test_sorting(opened: Page, folder: Path) -> None:
    rows = read_trajectories(read_run(folder)).to_pylist()
    opened.page.select_option("[name=sort]", "advantage")
    opened.page.click("[name=direction]")
    wanted = sorted((row["advantage"] for row in rows), reverse=True)[:5]
    shown = [float(text.replace("−", "-")) for text in opened.listed(".advantage")[:5]]
    assert shown == pytest.approx(wanted, abs=0.0051)
    opened.page.select_option("[name=sort]", "tokens")
    assert f"{max(len(row['tokens']) for row in rows)} tokens" in opened.listed(".facts")[0]


def test_the_keyboard(opened: Page) -> None:
    def selected() -> str:
        return opened.page.locator(".row.selected").get_attribute("id")

    opened.found("49 trajectories")
    assert selected() == "row-0"
    opened.page.keyboard.press("j")
    opened.page.keyboard.press("ArrowDown")
    assert selected() == "row-2"
    opened.page.keyboard.press("k")
    assert selected() == "row-1"
    opened.page.evaluate("document.querySelector('.list').scrollTo(0, 1e6)")
    opened.page.click("#row-47")
    opened.page.keyboard.press("j")
    opened.page.keyboard.press("j")
    assert selected() == "row-48" and opened.page.locator("#row-48").is_visible()
    opened.page.keyboard.press("/")
    opened.page.keyboard.type("jk")
    assert opened.page.input_value("[name=query]") == "jk"
    opened.page.keyboard.press("Escape")
    assert opened.page.evaluate("document.activeElement === document.body")


def test_the_group_of_a_trajectory_is_shown(opened: Page, folder: Path) -> None:
    rows = read_trajectories(read_run(folder)).to_pylist()
    assert opened.page.locator(".group button[aria-pressed]").all_inner_texts() == [
        f"{row['reward']:.2f}" for row in rows[:4]
    ]
    opened.page.click(".group button >> nth=2")
    opened.page.wait_for_selector("#row-2.selected")


def test_themes(browser: Any, report: Path) -> None:
    light, dark = "rgb(247, 247, 245)", "rgb(19, 21, 24)"
    page = Page(browser, report, scheme="dark")
    assert page.style("body", "backgroundColor") == dark and page.contrast() >= 4.5
    page.page.emulate_media(color_scheme="light")
    assert page.style("body", "backgroundColor") == light and page.contrast() >= 4.5
    page.page.click("#theme")
    assert page.style("body", "backgroundColor") == dark, "the reader's choice takes precedence over the system's"
    page.page.reload()
    page.page.wait_for_selector("html[data-ready]")
    assert page.style("body", "backgroundColor") == dark, "the choice is kept"
    page.close()


def test_unreadable_files_are_named_first(browser: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "killed", steps=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    page = Page(browser, write_report([read_run(folder)], tmp_path / "report.html"), tab="overview")
    assert "1 part of this run could not be read" in page.text("#notices") and "line 3" in page.text("#notices")
    page.close()


def test_a_link_opens_the_same_view(browser: Any, opened: Page, report: Path) -> None:
    opened.page.select_option("[name=outcome]", "correct")
    opened.page.fill("[name=from]", "2")
    opened.page.click(".row >> nth=2")
    opened.page.click(".heat-switch")
    seen, rows = opened.text(".where"), opened.text(".found")
    other = Page(browser, report, tab=opened.page.url.partition("#")[2])
    other.found(rows)
    other.page.wait_for_function("text => document.querySelector('.where').innerText === text", arg=seen)
    assert other.page.input_value("[name=outcome]") == "correct" and other.page.input_value("[name=from]") == "2"
    assert other.page.locator("#trajectories.heat").count() == 1
    other.close()
    opened.page.click(".heat-switch")


def test_a_link_to_a_missing_trajectory_opens_the_first_one(browser: Any, report: Path) -> None:
    page = Page(browser, report, tab="trajectories?open=0.99.99&sort=nonsense")
    page.found("49 trajectories")
    page.page.wait_for_selector("#row-0.selected")
    page.close()


def test_golden_answers_are_marked_in_tool_results_and_can_be_filtered(browser: Any, folder: Path) -> None:
    other = write_run(folder.parent / "gold", steps=1, a_step=4)
    texts = ["by Mira Talvane, and Miranda Talvane", "by nobody"]
    rows = [trajectory(2, i, [("assistant", "Mira Talvane"), ("tool", text)]) for i, text in enumerate(texts)]
    write_trajectories(other, 2, rows)
    page = Page(browser, write_report([read_run(other)], other / "report.html"))
    page.page.fill("[name=from]", "2")
    page.page.select_option("[name=gold]", "yes")
    page.found("1 of 6")
    page.page.wait_for_selector("mark.gold")
    assert "".join(page.page.locator("mark.gold").all_text_contents()) == "Mira Talvane"
    assert page.text(".answers").endswith("retrieved") and page.page.locator(".row .gold-found").count() == 1
    page.page.select_option("[name=gold]", "no")
    page.found("1 of 6")
    page.page.wait_for_function("() => !document.querySelector('mark.gold')")
    page.close()


def test_probabilities_are_shown_as_colour(opened: Page, folder: Path) -> None:
    rows = read_trajectories(read_run(folder)).to_pylist()
    number = min(range(len(rows)), key=lambda i: min(rows[i]["logprobs"]))
    row = rows[number]
    opened.page.evaluate("number => document.querySelector('.list').scrollTo(0, number * 62)", number)
    opened.page.click(f"#row-{number}")
    opened.detail(row["question"])
    opened.page.click(".heat-switch")
    shown = opened.page.eval_on_selector_all(".text .t.trained", "all => all.map(one => +one.dataset.heat)")
    logprobs = [value for value, bit in zip(row["logprobs"], row["mask"], strict=True) if bit]
    assert shown == [sum(math.exp(round(value, 3)) < least for least in (0.9, 0.5, 0.2, 0.05)) for value in logprobs]
    colours = [opened.style(f".heat-legend [data-heat='{i}']", "backgroundColor") for i in range(5)]
    assert len(set(colours)) == 5 and opened.style(".text .t[data-heat='1']", "backgroundColor") == colours[1]
    opened.page.click(".heat-switch")
    assert opened.style(".text .t.trained", "backgroundColor") == "rgb(211, 231, 253)"


def test_the_side_by_side_view_shows_where_the_members_of_a_group_differ(browser: Any, tmp_path: Path) -> None:
    texts = ["I need the founder of A", "I need the founder of B", "I guess C", "I guess C"]
    folder = write_run(tmp_path / "run", steps=1, a_step=4)
    rows = [trajectory(2, i, [("assistant", text)], reward=i / 4, answer=text[-1]) for i, text in enumerate(texts)]
    write_trajectories(folder, 2, rows)
    page = Page(browser, write_report([read_run(folder)], tmp_path / "report.html"), tab="trajectories?open=0.2.0")
    page.page.click(".side-by-side")
    page.page.wait_for_selector(".columns")
    assert page.page.locator(".column .reward").all_inner_texts() == ["0.75", "0.50", "0.25", "0.00"]
    assert page.page.locator(".column .shared").all_text_contents() == [*texts[:1:-1], *["I need the founder of "] * 2]
    said = [" ".join(text.split()) for text in page.page.locator(".column .fork").all_text_contents()]
    assert said == ["= no. 2", "= no. 3", "↳ parts from no. 0", "↳ parts from no. 1"]
    assert "view=group" in page.page.url
    page.page.click(".column >> nth=1 >> header button")
    page.page.wait_for_function("() => document.querySelector('.where').innerText.includes('no. 2')")
    page.page.keyboard.press("g")
    page.page.wait_for_selector(".columns")
    page.page.click(".back")
    page.page.wait_for_selector(".strip")
    page.close()


def test_a_trajectory_links_to_the_same_question_at_other_steps(browser: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=1, a_step=4)
    for step in (2, 5):
        write_trajectories(
            folder, step, [trajectory(step, i, [("assistant", "x")], reward=step / 10) for i in range(2)]
        )
    page = Page(browser, write_report([read_run(folder)], tmp_path / "report.html"), tab="trajectories?open=0.2.0")
    assert page.text(".asked summary") == "The same question was asked 2 times"
    assert page.page.locator(".asked .group").all_inner_texts() == ["step 2\n0.20\n0.20", "step 5\n0.50\n0.50"]
    page.page.click(".asked button >> nth=3")
    page.page.wait_for_function("() => document.querySelector('.where').innerText.startsWith('step 5')")
    page.close()


def test_calls_are_named_after_the_tool_of_the_run(browser: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "adds", steps=1, a_step=1)
    info = json.loads((folder / RUN_FILE).read_text())
    (folder / RUN_FILE).write_text(json.dumps({**info, "environment": {"tools": [ADD]}}))
    row = {**trajectory(1, 0, [("assistant", "two"), ("tool", "3")]), "searches": 0, "calls": 2}
    write_trajectories(folder, 1, [row])
    opened = Page(browser, write_report([read_run(folder)], folder / "report.html"))
    assert "2 calls of add" in opened.listed(".facts")[0]
    assert "calls of add" in opened.text(".numbers") and "searches" not in opened.text("#trajectories").lower()
    opened.close()
