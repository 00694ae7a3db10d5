"""The report of one run, or of two, as one HTML file that opens offline and asks nobody for anything.

What a run holds was written by a model and by the web, so none of it is ever markup: it travels as gzip in base64,
which has no `<`, and the page's scripts put it on the screen as text nodes. A Content-Security-Policy allows the
scripts and styles that are in the file, by their hashes, and nothing else; not even they may write HTML.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import trl_search
from trl_search.common.errors import UserError
from trl_search.common.files import written_whole
from trl_search.records.folder import Run
from trl_search.records.report.figures import run_names
from trl_search.records.report.panels import PANELS, History, curve, lines_of, points
from trl_search.records.report.reflection import correlate, reflection_points, words
from trl_search.records.report.trajectories import PageTrajectories, page_trajectories

ALARM_PREFIX = "alarm/"
MAX_TRAJECTORIES = 2000
# In the head of each page, so that only a page of ours is written over.
MARK = b'<meta name="generator" content="trl-search report'
STYLES = ("uplot/uPlot.min.css", "report.css")
# theme.js runs before anything is drawn. The library keeps its own element, and with it its licence.
HEAD_SCRIPTS = ("theme.js",)
SCRIPTS = ("dom.js", "data.js", "charts.js", "list.js", "detail.js", "main.js")


def write_report(
    runs: Sequence[Run], output: str | Path, *, max_trajectories: int = MAX_TRAJECTORIES, force: bool = False
) -> Path:
    """
    Writes the report of a run, or of two that are to be compared, as one HTML file.

    Args:
        runs (`Sequence[Run]`): One or two; what they left half-written is named at the top of the page.
        output (`str` or `Path`): The file. A report that is there is replaced, another file is not.
        max_trajectories (`int`, *optional*, defaults to 2000): How many to carry, of all runs together.
        force (`bool`, *optional*, defaults to `False`): Replaces whatever is there.

    Returns:
        `Path`: the file that was written.

    Example:
        >>> write_report([read_run("runs/quickstart")], "report.html")
        PosixPath('report.html')
    """
    output = Path(output)
    check_output(output, force=force)
    page = build_page(runs, max_trajectories=max_trajectories)
    # Whoever has the old page open, or runs out of disk, keeps a whole one.
    with written_whole(output) as unfinished:
        unfinished.write_text(page, encoding="utf-8", newline="\n")
    return output


def check_output(output: Path, *, force: bool) -> None:
    """Raises `UserError` where `output` is something that a report must not replace."""
    if output.is_dir():
        raise UserError(f"{output} is a folder: name a file, such as {output / 'report.html'}")
    if output.exists() and not force:
        with output.open("rb") as file:
            if MARK not in file.read(1024):
                raise UserError(f"{output} is there and is no report of ours: choose another --output, or say --force")


def build_page(runs: Sequence[Run], *, max_trajectories: int = MAX_TRAJECTORIES) -> str:
    """The report as a string; see `write_report`."""
    names = run_names(runs)
    if max_trajectories < 0:
        raise UserError(f"--max_trajectories is {max_trajectories}: give 0 for none, or more")
    try:
        import jinja2
    except ImportError as error:
        raise UserError('the report needs jinja2: pip install "trl-search[report]"') from error

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
        title=" and ".join(names),
        version=trl_search.__version__,
        policy=_content_security_policy([*head_scripts, *scripts], styles),
        head_scripts=head_scripts,
        scripts=scripts,
        styles=styles,
        licence=_asset("uplot/LICENSE"),
        data={name: _packed(value) for name, value in data.items()},
    )


def _meta(runs: Sequence[Run], names: Sequence[str], trajectories: PageTrajectories) -> dict[str, Any]:
    histories: list[History] = [run.history for run in runs]
    panels = []
    for panel in PANELS:
        lines = [
            {"label": line.label, "metric": line.metric, "runs": [_series(run.history, line.metric) for run in runs]}
            for line in lines_of(panel, histories)
        ]
        if lines:
            panels.append({"title": panel.title, "note": panel.note, "lines": lines})
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": [
            {
                "name": name,
                "folder": str(run.folder),
                "problems": run.problems,
                "left_out": note,
                "info": _without_nan(run.info),
                "reflection": _reflection(run),
                "alarms": _alarms(run.history),
            }
            for run, name, note in zip(runs, names, trajectories.notes, strict=True)
        ],
        "panels": panels,
        "prompts": trajectories.prompts,
        "rewards": trajectories.rewards,
        "block": len(trajectories.blocks[0]) if trajectories.blocks else 1,
    }


def _series(history: History, metric: str) -> list[list[Any]]:
    """Steps and values; None where what was logged is no finite number."""
    values = curve(history, metric)
    return [list(values), [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.values()]]


def _reflection(run: Run) -> dict[str, Any]:
    """The seed's figure: reflective-phrase ratio against EM over the checkpoints, and what can be said of it."""
    series = reflection_points(run)
    return {
        "steps": [point.step for point in series.points],
        "ratio": [point.ratio for point in series.points],
        "em": [point.em for point in series.points],
        "words": words(series, correlate(series.points)),
    }


def _alarms(history: History) -> list[list[Any]]:
    """Name, first step and number of steps of each alarm that rang."""
    names = sorted({name for row in history for name in row if name.startswith(ALARM_PREFIX)})
    rang = {name: [step for step, value in points(history, name).items() if value] for name in names}
    return [[name.removeprefix(ALARM_PREFIX), steps[0], len(steps)] for name, steps in rang.items() if steps]


def _without_nan(value: Any) -> Any:
    """JSON as Python writes it has NaN and infinities; a browser's has not."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


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
            # A string never becomes markup, in our code or in the library's.
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


def _source_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
