"""The report of one run, or of several runs to compare, as one HTML file that works offline.

The records of a run contain text of models and web pages, so they must never become markup. They are embedded as gzip
in base64, which has no `<`, and the page's scripts show them as text nodes. A Content-Security-Policy allows only the
scripts and styles in the file, by their hashes, and even these scripts cannot write HTML.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import trl_search
from trl_search.common.errors import UserError
from trl_search.common.files import finite_or_none, written_whole
from trl_search.records.folder import Run
from trl_search.records.report.charts import alarms_of, charts_of, run_names
from trl_search.records.report.reflection import any_reflection, correlate, reflection_points, words
from trl_search.records.report.summary import call_words, facts_of, headline
from trl_search.records.report.trajectories import PageTrajectories, page_trajectories, short_number

MAX_TRAJECTORIES = 2000
# Every page has this mark in its head. Only files with the mark are overwritten.
MARK = b'<meta name="generator" content="trl-search report'
STYLES = ("uplot/uPlot.min.css", "report.css")
# theme.js runs before anything is drawn.
HEAD_SCRIPTS = ("theme.js",)
SCRIPTS = (
    "dom.js", "data.js", "address.js", "charts.js", "overview.js", "filters.js", "list.js", "tokens.js", "detail.js",
    "group.js", "trajectories.js", "setup.js", "main.js",
)  # fmt: skip


def write_report(
    runs: Sequence[Run], output: str | Path, *, max_trajectories: int = MAX_TRAJECTORIES, overwrite: bool = False
) -> Path:
    """Writes the report of a run, or of several runs to compare, as one HTML file.

    Args:
        runs (`Sequence[Run]`): The runs. The top of the page names their half-written files.
        output (`str` or `Path`): The file. An older report is replaced, any other file is not.
        max_trajectories (`int`, *optional*, defaults to 2000): Most trajectories on the page, of all runs together.
        overwrite (`bool`, *optional*, defaults to `False`): Replaces any file.

    Returns:
        `Path`: the file.

    Raises:
        UserError: if the runs cannot be compared, or the file is not a report.
    """
    output = Path(output)
    check_output(output, overwrite=overwrite)
    page = build_page(runs, max_trajectories=max_trajectories)
    with written_whole(output) as unfinished:
        unfinished.write_text(page, encoding="utf-8", newline="\n")
    return output


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raises `UserError` if a report must not replace `output`."""
    if output.is_dir():
        raise UserError(f"{output} is a folder: name a file, such as {output / 'report.html'}")
    if output.is_file() and not overwrite:
        with output.open("rb") as file:
            if MARK not in file.read(1024):
                raise UserError(f"{output} is not a report: choose another --output, or replace it with --overwrite")


def build_page(runs: Sequence[Run], *, max_trajectories: int = MAX_TRAJECTORIES) -> str:
    """The report as a string; see `write_report`.

    Raises:
        UserError: for a negative `max_trajectories`.
    """
    names = run_names(runs)
    if max_trajectories < 0:
        raise UserError(f"--max_trajectories is {max_trajectories}: give 0 for none, or more")
    import jinja2

    trajectories = page_trajectories(runs, max_trajectories)
    data = {
        "meta": _meta(runs, names, trajectories),
        "rows": trajectories.rows,
        **{f"tokens-{i}": block for i, block in enumerate(trajectories.blocks)},
    }
    styles = ["\n".join(_asset(name) for name in STYLES)]
    head_scripts = [_asset(name) for name in HEAD_SCRIPTS]
    scripts = [_asset("uplot/uPlot.iife.min.js"), "\n".join(["'use strict';", *map(_asset, SCRIPTS)])]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(_asset("page.html.jinja")).render(
        title=" · ".join(names),
        version=trl_search.__version__,
        policy=_content_security_policy([*head_scripts, *scripts], styles),
        head_scripts=head_scripts,
        scripts=scripts,
        styles=styles,
        licence=_asset("uplot/LICENSE"),
        data={name: _packed(value) for name, value in data.items()},
    )


def _meta(runs: Sequence[Run], names: Sequence[str], trajectories: PageTrajectories) -> dict[str, Any]:
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": [
            {
                "name": name,
                "folder": str(run.folder),
                "problems": run.problems,
                "left_out": note,
                "headline": headline(run),
                "facts": [asdict(fact) for fact in facts_of(run)],
                "call_words": call_words(run),
                "info": finite_or_none(run.info),
                "reflection": _reflection(run),
                "alarms": [asdict(alarm) for alarm in alarms_of(run.history, number)],
            }
            for number, (run, name, note) in enumerate(zip(runs, names, trajectories.notes, strict=True))
        ],
        "charts": [_rounded(asdict(chart)) for chart in charts_of(runs, names)],
        "prompts": trajectories.prompts,
        "rewards": trajectories.rewards,
        "block": len(trajectories.blocks[0]) if trajectories.blocks else 1,
    }


def _rounded(chart: dict[str, Any]) -> dict[str, Any]:
    for line in chart["lines"]:
        for name in ("values", "mean"):
            line[name] = list(map(short_number, line[name]))
    return chart


def _reflection(run: Run) -> dict[str, Any] | None:
    """The data and the text of the reflection figure; `None` if the policy never reflected."""
    found = reflection_points(run)
    if not any_reflection(found):
        return None
    return {"points": [asdict(point) for point in found], "words": words(found, correlate(found))}


def _packed(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("utf-8", "surrogatepass"), compresslevel=6, mtime=0)).decode()


def _asset(name: str) -> str:
    return resources.files("trl_search.records.report").joinpath("static", name).read_text(encoding="utf-8")


def _content_security_policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(map(_source_hash, scripts))}",
            f"style-src {' '.join(map(_source_hash, styles))}",
            "base-uri 'none'",
            "form-action 'none'",
            # Neither our scripts nor the library's can turn a string into markup.
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


def _source_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
