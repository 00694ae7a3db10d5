"""What a resumed run takes over: its checkpoint, its warmed-up model, and its earlier evaluations."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import re
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_search.common.errors import UserError
from trl_search.common.files import read_object
from trl_search.config.run_file import RUN_FILE
from trl_search.evaluation.outcomes import RESULTS_FILE, Evaluation, evaluation_of
from trl_search.records.folder import AFTER_ROW, BEST_ROW, ROLLBACKS_FILE
from trl_search.records.rollbacks import is_given_up, rollbacks_of


def checkpoint_to_resume(asked: str | bool | None, folder: Path) -> str | None:
    """The checkpoint to resume from: `last`, or `True`, takes the newest whole one of the folder's run.

    Raises:
        UserError: if there is none.
    """
    if not asked:
        return None
    if asked != "last" and asked is not True:
        if not is_whole(Path(asked)):
            raise UserError(
                f"resume_from_checkpoint: {asked} is no checkpoint that was written to its end, as it holds no "
                f"{TRAINER_STATE_NAME} that can be read: give the path of one, or last, the newest of output_dir"
            )
        return asked
    name = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = {int(match[1]): path for path in folder.glob("*") if (match := name.fullmatch(path.name))}
    started, rollbacks = _started_at(folder), rollbacks_of(folder)
    for step, path in sorted(found.items(), reverse=True):
        if not is_whole(path):
            print(f"{path} was not written to its end: it is skipped")
        elif is_given_up(step, (path / TRAINER_STATE_NAME).stat().st_mtime, rollbacks):
            print(f"{path} is of the training that collapsed ({folder / ROLLBACKS_FILE}): it is skipped")
        elif (path / TRAINER_STATE_NAME).stat().st_mtime < started:
            print(f"{path} is older than the run of {folder / RUN_FILE}, so it belongs to another run: it is skipped")
        else:
            return str(path)
    raise UserError(
        f"resume_from_checkpoint={asked}, and {folder} holds no checkpoint of its run that was written to its end: "
        "give the path of one, or leave resume_from_checkpoint out"
    )


def checkpoint_folder(trainer: Any, trial: Any) -> Path:
    """The folder that a trainer is about to write its checkpoint into."""
    return Path(trainer._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}")


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the trainer's state comes last."""
    try:
        return isinstance(json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes()), dict)
    except (OSError, ValueError):
        return False


def how_to_resume(folder: Path) -> str:
    """What to do after an interrupt: a checkpoint of this run is resumed, else the run begins anew."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            checkpoint = checkpoint_to_resume("last", folder.absolute())
    except UserError:
        return "no checkpoint is written yet (save_steps): the same command begins anew"
    return f"the same command with --resume_from_checkpoint last goes on from {checkpoint}"


def _started_at(folder: Path) -> float:
    """When the run of a folder began, as a file's time; resuming does not change it. 0 where that is unknown."""
    path = folder / RUN_FILE
    text = read_object(path, "move it away").get("started_at") if path.is_file() else None
    return datetime.datetime.fromisoformat(text).timestamp() if text else 0.0


def measured_before(folder: Path) -> dict[str, Evaluation]:
    """The evaluations that a resumed run made before its training. Later ones are made again."""
    path = folder / RESULTS_FILE
    rows = read_object(path, "move it away").get("rows", {}) if path.is_file() else {}
    return {
        row: evaluation_of(values, str(path))
        for row, values in rows.items()
        if not row.startswith((AFTER_ROW, BEST_ROW))
    }


def warmed_up_model(warm_folder: Path, name: str, checkpoint: str, *, needed: bool) -> str:
    """The model that a resumed run starts from: the warmed-up one if it still exists, else `name`.

    Args:
        needed (`bool`): Whether the run needs it. The checkpoint of a full fine-tuning has all weights; that of an
            adapter lacks its base model, and no checkpoint has the reference model.

    Raises:
        UserError: if it is needed and missing.
    """
    if (warm_folder / "config.json").is_file():
        return str(warm_folder)
    if needed:
        raise UserError(
            f"the run to resume was warmed up, and {warm_folder} holds no model: copy warm_start there from the "
            f"folder of the run that {checkpoint} is of, or start anew without resume_from_checkpoint"
        )
    return name
