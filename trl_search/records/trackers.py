"""What W&B and trackio get beside TRL's metrics: what the run was started with, and tables of trajectories in which
the mask can be seen.

TRL's own `log_completions` table shows messages; here every stretch of text is drawn as what it was to the loss:
trained on (green), or masked (grey, struck out of the loss). Text of models and web pages is escaped.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_search.config.grpo import SearchGRPOConfig
from trl_search.records.folder import REWARD_PREFIX
from trl_search.records.run_log import RunLog
from trl_search.records.trajectory_log import TrajectoryLog

TABLE_ROWS = 16  # of a table; the parquet files have them all
CONFIG_KEY, TABLE_KEY, PAGE_KEY = "trl_search", "trajectories", "trajectories_page"
_NUMBERS = ("step", "group", "index", "reward", "advantage", "searches", "malformed", "model_tokens")

# Half-transparent, so that it reads on a light and on a dark page.
_STYLES = {True: "background:rgba(46,160,67,.28)", False: "color:#888"}
_LEGEND = (
    f'<p style="font:12px sans-serif;color:#888"><span style="{_STYLES[True]};color:initial">trained on</span> '
    f"&nbsp; masked: not in the loss</p>"
)


class TrackerTables(TrainerCallback):
    """
    The callback that sends both, on rank 0, to those of `report_to`.

    Args:
        run_log (`RunLog`): Its record goes into the tracker's config. It has to be called before this one.
        trajectory_log (`TrajectoryLog`): Its trajectories go into the tables.
    """

    def __init__(self, run_log: RunLog, trajectory_log: TrajectoryLog) -> None:
        self.run_log, self.trajectory_log = run_log, trajectory_log
        self.sent = -1  # the last interval that had its table

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sent = -1
        if not state.is_world_process_zero:
            return
        # The config itself is there already: transformers sends every key of `args`, ours among them.
        record = {name: value for name, value in self.run_log.info.items() if name not in ("config", "format")}
        record["run_folder"] = str(Path(args.output_dir or ".").resolve())
        for tracker in _trackers(args):
            tracker.config.update({CONFIG_KEY: record}, allow_val_change=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert isinstance(args, SearchGRPOConfig)
        every, table = args.trajectory_table_steps, self.trajectory_log.table
        # A step that reuses the rollouts of an earlier one has no new trajectories: the next one's are sent.
        if table is None or not every or self.trajectory_log.step != state.global_step:
            return
        if state.global_step // every <= self.sent:
            return
        self.sent = state.global_step // every
        rows = table.slice(0, TABLE_ROWS).to_pylist()
        for tracker in _trackers(args):
            tracker.log({**_tables(tracker, rows), "train/global_step": state.global_step})


def mask_html(tokens: Sequence[str], mask: Sequence[int]) -> str:
    """
    A trajectory as HTML in which the trained stretches are coloured.

    Example:
        >>> mask_html(["<b>", " Mira"], [1, 0])
        '<pre ...><span style="background:...">&lt;b&gt;</span><span style="color:#888"> Mira</span></pre>'
    """
    spans = (
        f'<span style="{_STYLES[trained]}">{html.escape(text)}</span>' for trained, text in stretches(tokens, mask)
    )
    return f'<pre style="white-space:pre-wrap;font-size:12px">{"".join(spans)}</pre>'


def mask_text(tokens: Sequence[str], mask: Sequence[int]) -> str:
    """The same where there are no colours: masked stretches stand in `⟦ ⟧`."""
    return "".join(text if trained else f"⟦{text}⟧" for trained, text in stretches(tokens, mask))


def stretches(tokens: Sequence[str], mask: Sequence[int]) -> Iterable[tuple[bool, str]]:
    """Tokens side by side with the same mask, as one text: `(trained, text)`."""
    for trained, pairs in itertools.groupby(zip(tokens, mask, strict=True), key=lambda pair: bool(pair[1])):
        yield trained, "".join(text for text, _ in pairs)


def _trackers(args: TrainingArguments) -> list[Any]:
    """The modules of the trackers that are reported to and running."""
    found: list[Any] = []
    if "wandb" in (args.report_to or []):
        import wandb

        if wandb.run is not None:  # WANDB_DISABLED, for one
            found.append(wandb)
    if "trackio" in (args.report_to or []):
        import trackio

        found.append(trackio)
    return found


def _tables(tracker: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A table of the rows, and a page of the same with the mask in colours."""
    # wandb only: otherwise a text that is the name of a file would be replaced by that file.
    options = {"inject": False, "data_is_not_path": True} if tracker.__name__ == "wandb" else {}
    shown = []
    for row in rows:
        cells = _cells(row)
        if tracker.__name__ == "wandb":
            cells["trajectory"] = tracker.Html(_LEGEND + mask_html(row["tokens"], row["mask"]), **options)
        else:  # trackio's tables show text alone
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
