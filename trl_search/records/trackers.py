"""Sends to W&B and trackio, beside TRL's metrics: how the run was started, tables of trajectories with their loss
mask, and at the end the evaluations and the report.

TRL's `log_completions` table shows messages. These tables colour each piece of text by its mask: trained on (green) or
masked (grey). Text of models and web pages is escaped.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_search.config.grpo import SearchGRPOConfig
from trl_search.records.folder import REWARD_PREFIX, Run
from trl_search.records.run_log import RunLog
from trl_search.records.trajectory_log import TrajectoryLog

TABLE_ROWS = 16  # the parquet files have all trajectories
CONFIG_KEY, TABLE_KEY, PAGE_KEY = "trl_search", "trajectories", "trajectories_page"
RESULTS_KEY, REPORT_KEY = "results", "report"
_NUMBERS = ("step", "group", "index", "reward", "advantage", "searches", "malformed", "model_tokens")

# Half-transparent, to be readable on light and dark pages.
_STYLES = {True: "background:rgba(46,160,67,.28)", False: "color:#888"}
_LEGEND = (
    f'<p style="font:12px sans-serif;color:#888"><span style="{_STYLES[True]};color:initial">trained on</span> '
    f"&nbsp; masked: not in the loss</p>"
)


class TrackerTables(TrainerCallback):
    """The callback that sends the run's record and the tables to the trackers of `report_to`, on rank 0. It comes
    after the [`RunLog`], whose record goes into their config."""

    def __init__(self, run_log: RunLog, trajectory_log: TrajectoryLog) -> None:
        self.run_log, self.trajectory_log = run_log, trajectory_log
        self.sent = -1  # the last interval (step // trajectory_table_steps) whose table was sent

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.sent = -1
        self.trajectory_log.begin()
        if not state.is_world_process_zero:
            return
        # transformers has already sent all keys of `args`.
        record = {name: value for name, value in self.run_log.info.items() if name not in ("config", "format")}
        record["run_folder"] = str(Path(args.output_dir or ".").resolve())
        for tracker in running_trackers(args):
            tracker.config.update({CONFIG_KEY: record}, allow_val_change=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert isinstance(args, SearchGRPOConfig)
        every, table = args.trajectory_table_steps, self.trajectory_log.table
        # A step that reuses earlier rollouts has no new trajectories: wait for the next rollout.
        if table is None or not every or self.trajectory_log.step != state.global_step:
            return
        if state.global_step // every <= self.sent:
            return
        self.sent = state.global_step // every
        rows = table.slice(0, TABLE_ROWS).to_pylist()
        for tracker in running_trackers(args):
            tracker.log({**_tables(tracker, rows), "train/global_step": state.global_step})


def log_results(args: TrainingArguments, run: Run, report: Path | None) -> None:
    """Sends the evaluations and the report of a finished training to the trackers of `report_to`."""
    if "trackio" in (args.report_to or []):
        _resume_trackio(args)
    columns = ("em", "f1", "searches", "questions")
    step = max((row["step"] for row in run.history), default=0)
    for tracker in running_trackers(args):
        values: dict[str, Any] = {
            f"{RESULTS_KEY}/{name}_{when}": row[name]
            for when, row in (("before", run.before), ("after", run.after))
            for name in columns[:3]
            if row.get(name) is not None
        }
        if run.results:
            data = [[policy, *(row.get(name) for name in columns)] for policy, row in run.results.items()]
            values[RESULTS_KEY] = tracker.Table(columns=["policy", *columns], data=data)
        if report is not None:
            values[REPORT_KEY] = tracker.Html(report.read_text(encoding="utf-8"), **_options(tracker))
        if values:
            tracker.log({**values, "train/global_step": step})
        if tracker.__name__ == "trackio":
            tracker.finish()


def mask_html(tokens: Sequence[str], mask: Sequence[int]) -> str:
    """
    A trajectory as HTML, with the text that is trained on in colour.

    Example:
        >>> mask_html(["<b>", " Mira"], [1, 0])
        '<pre ...><span style="background:...">&lt;b&gt;</span><span style="color:#888"> Mira</span></pre>'
    """
    spans = (
        f'<span style="{_STYLES[trained]}">{html.escape(text)}</span>' for trained, text in stretches(tokens, mask)
    )
    return f'<pre style="white-space:pre-wrap;font-size:12px">{"".join(spans)}</pre>'


def mask_text(tokens: Sequence[str], mask: Sequence[int]) -> str:
    """A trajectory as plain text, with masked text in `⟦ ⟧`."""
    return "".join(text if trained else f"⟦{text}⟧" for trained, text in stretches(tokens, mask))


def stretches(tokens: Sequence[str], mask: Sequence[int]) -> Iterable[tuple[bool, str]]:
    """Joins neighbouring tokens with the same mask: yields `(trained, text)`."""
    for trained, pairs in itertools.groupby(zip(tokens, mask, strict=True), key=lambda pair: bool(pair[1])):
        yield trained, "".join(text for text, _ in pairs)


def _resume_trackio(args: TrainingArguments) -> None:
    """Reopens the trackio run, which transformers closed at the end of the training."""
    import trackio

    # trackio replaces the config of a resumed run, so its old config is passed again.
    config = next((run.config for run in trackio.Api().runs(args.project) if run.name == args.run_name), None)
    trackio.init(
        project=args.project,
        name=args.run_name,
        config={name: value for name, value in (config or {}).items() if not name.startswith("_")},
        space_id=args.trackio_space_id,
        resume="must",
        private=args.hub_private_repo,
        bucket_id=args.trackio_bucket_id,
    )


def running_trackers(args: TrainingArguments) -> list[Any]:
    """The modules of the trackers in `report_to` that are running."""
    found: list[Any] = []
    if "wandb" in (args.report_to or []):
        import wandb

        if wandb.run is not None:
            found.append(wandb)
    if "trackio" in (args.report_to or []):
        import trackio

        found.append(trackio)
    return found


def _options(tracker: Any) -> dict[str, Any]:
    """Options of `Html`. Without them, W&B replaces a text that is the name of a file by the file."""
    return {"inject": False, "data_is_not_path": True} if tracker.__name__ == "wandb" else {}


def _tables(tracker: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows as a table, and as a page with the mask in colour."""
    options = _options(tracker)
    shown = []
    for row in rows:
        cells = _cells(row)
        if tracker.__name__ == "wandb":
            cells["trajectory"] = tracker.Html(_LEGEND + mask_html(row["tokens"], row["mask"]), **options)
        else:  # trackio's tables show only text
            cells["trajectory"] = mask_text(row["tokens"], row["mask"])
        shown.append(cells)
    table = tracker.Table(columns=list(shown[0]), data=[list(cells.values()) for cells in shown])
    return {TABLE_KEY: table, PAGE_KEY: tracker.Html(_page(rows), **options)}


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    rewards = {name: row[name] for name in row if name.startswith(REWARD_PREFIX)}
    return {
        **{name: row[name] for name in _NUMBERS},
        **rewards,
        "stop_reason": row["stop_reason"],
        "question": row["question"],
        "golden_answers": " | ".join(row["golden_answers"]),
        "answer": row["answer"] or "",
    }


def _page(rows: Sequence[Mapping[str, Any]]) -> str:
    parts = [_LEGEND]
    for row in rows:
        reward = "none" if row["reward"] is None else f"{row['reward']:.3g}"
        facts = f"reward {reward}, advantage {row['advantage']:+.2f}, {row['searches']} searches, {row['stop_reason']}"
        summary = f"<summary><b>{html.escape(row['question'])}</b> {html.escape(facts)}</summary>"
        parts.append(f"<details>{summary}{mask_html(row['tokens'], row['mask'])}</details>")
    return "".join(parts)
