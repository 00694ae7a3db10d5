"""A report with 2,000 trajectories of 4,000 tokens in a real browser stays fast."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.report_browser import Page
from tests.support.report_runs import write_run, write_trajectories
from trl_search.records.folder import read_run, read_trajectories
from trl_search.records.report.page import write_report


def patience_s() -> float:
    """The seconds that a reader would wait on idle cores, times the processes that now wait for each core."""
    return 2.0 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@pytest.mark.slow
def test_two_thousand_trajectories_stay_quick(browser: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "long", steps=1, a_step=80, words=5400)
    rows = read_trajectories(read_run(folder)).to_pylist()
    for step in range(2, 26):
        again = [{**row, "step": step, "question": row["question"].replace("step 1", f"step {step}")} for row in rows]
        write_trajectories(folder, step, again)
    assert sum(len(row["tokens"]) for row in rows) > 80 * 4_000
    file = write_report([read_run(folder)], tmp_path / "long.html")
    assert file.stat().st_size < 80e6
    page = Page(browser, file)
    page.found("2,000 trajectories")
    assert page.page.locator(".row").count() < 40, "rows outside the view must not be drawn"

    def quick(do: str, value: str, found: str) -> None:
        started = time.monotonic()
        page.page.select_option(do, value) if do != "[name=query]" else page.page.fill(do, value)
        page.found(found)
        assert time.monotonic() - started < patience_s(), (do, value)

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
    assert time.monotonic() - started < patience_s()
    started = time.monotonic()
    page.page.keyboard.press("g")
    page.page.wait_for_selector(".columns")
    assert page.page.locator(".column").count() == 4 and time.monotonic() - started < patience_s()
    page.close()
