"""The report in a real browser, from a file, without a network: what it shows, what it does when it is used, and that
what a model wrote stays text."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.report_runs import trajectory, write_run, write_trajectories
from trl_search.records.folder import read_run, read_trajectories
from trl_search.records.report.page import write_report

pytestmark = pytest.mark.slow

# A browser that phones nobody.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
# Generous: what takes a reader's patience, and not what a loaded machine takes.
INTERACTION_S = 2.0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the extra dev has it")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        reason = "there is no chromium on this machine"
        if os.environ.get("CI"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield started
        started.close()


class Page:
    """A report that is open in the browser, with what it logged and what it asked for."""

    def __init__(self, browser: Any, file: Path, *, tab: str = "trajectories", scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": 1400, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = file.resolve().as_uri()
        self.page.goto(f"{self.url}#{tab}")
        self.page.wait_for_selector("html[data-ready]")

    def close(self) -> None:
        self.context.close()
        assert self.complaints == []
        assert [url for url in self.requests if url.partition("#")[0] != self.url] == []

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def found(self, text: str) -> None:
        """Waits until the list says how many it shows."""
        self.page.wait_for_function("text => document.querySelector('.found').textContent === text", arg=text)

    def detail(self, question: str) -> None:
        self.page.wait_for_function("text => document.querySelector('.detail h2')?.textContent === text", arg=question)

    def listed(self, what: str) -> list[str]:
        return self.page.locator(f".row {what}").all_inner_texts()

    def style(self, selector: str, name: str) -> str:
        return self.page.eval_on_selector(selector, "(at, name) => getComputedStyle(at)[name]", name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose last step is one trajectory of everything: two searches, hostile text, wide characters."""
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
    """The report as it is when its trajectories have just been opened; one page, as opening it is what takes time."""
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
        assert opened.style(".swatch.trained", "backgroundColor") == colours[1], "as the legend has it"
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
    assert headers == ["Turn 1 · policy", "World", "Turn 2 · policy"]
    # A tag is cut into tokens wherever the tokenizer cuts it: its pieces are marked one by one.
    for family, tag in (
        ("think", "<think>"),
        ("call", "<tool_call>"),
        ("answer", "<answer>"),
        ("world", "</tool_resp"),
    ):
        assert tag in "".join(opened.page.locator(f".text .tag.{family}").all_text_contents())


def test_what_a_model_wrote_stays_text(opened: Page, folder: Path) -> None:
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
    assert allowed == "TypeError", "the policy lets no string become a script"
    opened.complaints.clear()


def test_a_token_says_what_it_is(opened: Page, folder: Path) -> None:
    row = read_trajectories(read_run(folder)).to_pylist()[-1]
    opened.page.fill("[name=query]", "onerror")
    opened.detail(row["question"])
    opened.page.hover(".text .t[data-i='4']")
    assert opened.text("#tip code") == json.dumps(row["tokens"][4], ensure_ascii=False)
    assert "trained (mask 1)" in opened.text("#tip") and "logprob −0.004" in opened.text("#tip")
    opened.page.hover(f".text .t[data-i='{row['turns'][1]['start'] + 1}']")
    assert "masked (mask 0)" in opened.text("#tip") and "no logprob" in opened.text("#tip")
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
    opened.found(f"{sum(ok and not row['searches'] for ok, row in zip(right, rows, strict=True))} of 49")
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


def test_the_group_of_a_trajectory(opened: Page, folder: Path) -> None:
    rows = read_trajectories(read_run(folder)).to_pylist()
    assert opened.page.locator(".group button").all_inner_texts() == [f"{row['reward']:.2f}" for row in rows[:4]]
    opened.page.click(".group button >> nth=2")
    opened.page.wait_for_selector("#row-2.selected")


def test_themes(browser: Any, report: Path) -> None:
    light, dark = "rgb(247, 247, 245)", "rgb(19, 21, 24)"
    page = Page(browser, report, scheme="dark")
    assert page.style("body", "backgroundColor") == dark and contrast(page) >= 4.5
    page.page.emulate_media(color_scheme="light")
    assert page.style("body", "backgroundColor") == light and contrast(page) >= 4.5
    page.page.click("#theme")
    assert page.style("body", "backgroundColor") == dark, "the reader's choice comes before the system's"
    page.page.reload()
    page.page.wait_for_selector("html[data-ready]")
    assert page.style("body", "backgroundColor") == dark, "and is kept"
    page.close()


def contrast(page: Page) -> float:
    """The lowest contrast of text with what lies behind it, as WCAG counts it, over tokens, tags and the list."""
    return page.page.evaluate(
        """() => {
          const light = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4))
            .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
          const behind = at => { const own = getComputedStyle(at).backgroundColor;
            return own === 'rgba(0, 0, 0, 0)' && at.parentElement ? behind(at.parentElement) : own; };
          const ratios = [...document.querySelectorAll(
            '.t, .tag, .row span, .numbers dt, .where span, .turn span, .hint, #subtitle, .count span, .legend span')]
            .map(at => [light(getComputedStyle(at).color), light(behind(at))]).map(([a, b]) =>
              (Math.max(a, b) + .05) / (Math.min(a, b) + .05));
          return Math.min(...ratios);
        }"""
    )


def test_curves_and_their_values(browser: Any, report: Path, folder: Path) -> None:
    page = Page(browser, report, tab="curves")
    history = read_run(folder).history
    card = page.page.locator(".card[aria-label='Reward']")
    assert card.locator("canvas").count() == 1
    assert "step 6" in " ".join(card.locator(".u-legend").inner_text().split())
    over = card.locator(".u-over").bounding_box()
    page.page.mouse.move(over["x"] + over["width"] * 0.2, over["y"] + 60)
    page.page.wait_for_function(
        "() => document.querySelector(\".card[aria-label='Reward'] .u-legend .u-value\").textContent === '2'"
    )
    values = card.locator(".u-value").all_inner_texts()
    assert values[:2] == ["2", f"{history[1]['reward']:.4g}"]
    # The same step in all charts.
    entropy = page.page.locator(".card[aria-label='Entropy'] .u-value").all_inner_texts()
    assert entropy == ["2", f"{history[1]['entropy']:.4g}"]
    assert page.page.locator(".card[aria-label='Reflection and exact match'] canvas").count() == 1
    page.page.click("#tab-setup")
    assert "config.learning_rate" in page.text("#setup")
    page.close()


def test_two_runs(browser: Any, folder: Path) -> None:
    second = write_run(folder.parent / "second", steps=4, seed=1, beta=0.01)
    file = write_report([read_run(folder), read_run(second)], folder.parent / "two.html")
    page = Page(browser, file, tab="curves")
    assert page.text(".runs").split() == ["first", "solid", "second", "dashed"]
    markers = page.page.eval_on_selector_all(
        ".card[aria-label='Entropy'] .u-marker",
        "all => all.map(one => [one.style.borderTopStyle, one.style.borderTopColor])",
    )
    legend = page.page.locator(".card[aria-label='Entropy'] .u-label").all_text_contents()
    assert legend == ["step", "entropy", "\u200b"]
    (solid, colour), (dashed, other) = markers[-2:]
    assert (solid, dashed) == ("solid", "dashed") and colour == other
    page.page.click("#tab-trajectories")
    page.found("81 trajectories")
    page.page.select_option("[name=run]", "1")
    page.found("32 of 81")
    page.page.wait_for_function("() => document.querySelector('.where').textContent.startsWith('second')")
    page.page.click("#tab-setup")
    assert "config.beta" in page.page.locator("#setup table").first.inner_text()
    assert "config.num_generations" not in page.page.locator("#setup table").first.inner_text()
    page.close()


def test_what_could_not_be_read_is_said_first(browser: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "killed", steps=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    page = Page(browser, write_report([read_run(folder)], tmp_path / "report.html"), tab="curves")
    assert "1 part of this run could not be read" in page.text("#notices") and "line 3" in page.text("#notices")
    page.close()


def test_a_narrow_window_scrolls_one_way_only(opened: Page) -> None:
    opened.page.set_viewport_size({"width": 390, "height": 800})
    for tab in ("setup", "curves", "trajectories"):
        opened.page.click(f"#tab-{tab}")
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390, tab
    opened.page.set_viewport_size({"width": 1400, "height": 900})


def test_two_thousand_trajectories_stay_quick(browser: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "long", steps=1, a_step=80, words=1150)
    rows = read_trajectories(read_run(folder)).to_pylist()
    for step in range(2, 26):
        again = [{**row, "step": step, "question": row["question"].replace("step 1", f"step {step}")} for row in rows]
        write_trajectories(folder, step, again)
    assert sum(len(row["tokens"]) for row in rows) > 70_000
    file = write_report([read_run(folder)], tmp_path / "long.html")
    assert file.stat().st_size < 20e6
    page = Page(browser, file)
    page.found("2,000 trajectories")
    assert page.page.locator(".row").count() < 40, "rows out of sight are not drawn"

    def quick(do: str, value: str, found: str) -> None:
        started = time.monotonic()
        page.page.select_option(do, value) if do != "[name=query]" else page.page.fill(do, value)
        page.found(found)
        assert time.monotonic() - started < INTERACTION_S, (do, value)

    quick("[name=query]", "step 17?", "80 of 2,000")
    quick("[name=query]", "", "2,000 trajectories")
    right = 25 * sum(row["answer"] == "Mira Talvane" for row in rows)
    quick("[name=outcome]", "correct", f"{right:,} of 2,000")
    quick("[name=outcome]", "", "2,000 trajectories")
    quick("[name=sort]", "tokens", "2,000 trajectories")
    page.page.evaluate("document.querySelector('.list').scrollTo(0, 1e6)")
    page.page.wait_for_selector(".row[aria-posinset='2000']")
    started = time.monotonic()
    page.page.click(".row[aria-posinset='2000']")
    longest = max(len(row["tokens"]) for row in rows)
    page.page.wait_for_function("n => document.querySelectorAll('.text .t').length === n", arg=longest)
    assert time.monotonic() - started < INTERACTION_S
    page.close()
