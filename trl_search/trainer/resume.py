"""Finds what a resumed run continues from: its checkpoint, its warmed-up model, and its earlier evaluations."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import logging
import re
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_search.common.errors import UserError
from trl_search.common.files import read_object
from trl_search.config.run_file import RUN_FILE
from trl_search.evaluation.outcomes import RESULTS_FILE, Evaluation, evaluation_of
from trl_search.records.folder import AFTER_ROW, BEST_ROW, ROLLBACKS_FILE
from trl_search.records.rollbacks import is_given_up, rollbacks_of

logger = logging.getLogger(__name__)


def checkpoint_to_resume(asked: str | bool | None, folder: Path) -> str | None:
    """The checkpoint to resume from: `last` or `True` means the newest complete one of the run in `folder`.

    Raises:
        UserError: if there is none.
    """
    if not asked:
        return None
    if asked != "last" and asked is not True:
        if not is_whole(Path(asked)):
            raise UserError(
                f"resume_from_checkpoint: {asked} is not a complete checkpoint, as it has no readable "
                f"{TRAINER_STATE_NAME}: give the path of another, or last for the newest in output_dir"
            )
        return asked
    name = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = {int(match[1]): path for path in folder.glob("*") if (match := name.fullmatch(path.name))}
    started, rollbacks = _started_at(folder), rollbacks_of(folder)
    for step, path in sorted(found.items(), reverse=True):
        if not is_whole(path):
            print(f"{path} is skipped, because it is incomplete")
        elif is_given_up(step, (path / TRAINER_STATE_NAME).stat().st_mtime, rollbacks):
            print(f"{path} is skipped, because the training was rolled back past it ({folder / ROLLBACKS_FILE})")
        elif (path / TRAINER_STATE_NAME).stat().st_mtime < started:
            print(f"{path} is skipped, because it is older than {folder / RUN_FILE} and so belongs to another run")
        else:
            return str(path)
    raise UserError(
        f"resume_from_checkpoint={asked}, but {folder} has no complete checkpoint of its run: give the path of one, "
        "or start again without resume_from_checkpoint; save_strategy and save_steps say when a run writes checkpoints"
    )


def warn_of_missing_optimizer(checkpoint: str | None) -> None:
    """Warns if a checkpoint has only the model (`save_only_model`), from which transformers resumes without a word."""
    if checkpoint is not None and not any(Path(checkpoint).glob("rng_state*")):
        logger.warning(
            "%s was saved with save_only_model, so it has neither optimizer nor learning-rate schedule: both begin "
            "anew. To continue them, resume from a checkpoint that was saved with save_only_model: false",
            checkpoint,
        )


class NamesDoneCheckpoint(TrainerCallback):
    """Warns if a resumed run has no step left, as transformers ends it without a word."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and 0 < state.max_steps <= state.global_step:
            by = f"max_steps={args.max_steps}" if args.max_steps > 0 else f"num_train_epochs={args.num_train_epochs:g}"
            logger.warning(
                "nothing is left to train: the checkpoint is of step %d, and this run ends at step %d (%s). To train "
                "on, resume with a higher one",
                state.global_step,
                state.max_steps,
                by,
            )


class LoadsTiedWeights(Trainer):
    """A mixin for models whose head is the embedding, as in the smaller Qwen2.5. Their checkpoints hold it once, and
    transformers would warn at each resume that the head is missing. List it before TRL's trainer."""

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = getattr(self.model, "all_tied_weights_keys", {})
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)


def checkpoint_folder(trainer: Any, trial: Any) -> Path:
    """The folder into which a trainer is about to write its checkpoint."""
    return Path(trainer._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}")


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete: the trainer's state is written last."""
    try:
        return isinstance(json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes()), dict)
    except (OSError, ValueError):
        return False


def how_to_resume(folder: Path) -> str:
    """How to continue after an interrupt: from a checkpoint of this run, else from the start."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            checkpoint = checkpoint_to_resume("last", folder)
    except UserError:
        return "no checkpoint was written yet (save_steps), so the same command starts from the beginning"
    return f"the same command with --resume_from_checkpoint last continues from {checkpoint}"


def _started_at(folder: Path) -> float:
    """The start of the run in `folder` as a timestamp, which resuming does not change; 0 if it is unknown."""
    path = folder / RUN_FILE
    text = read_object(path, "move it away").get("started_at") if path.is_file() else None
    return datetime.datetime.fromisoformat(text).timestamp() if text else 0.0


def measured_before(folder: Path) -> dict[str, Evaluation]:
    """The evaluations that a run made before its training. A resumed run repeats only later ones."""
    path = folder / RESULTS_FILE
    rows = read_object(path, "move it away").get("rows", {}) if path.is_file() else {}
    return {
        row: evaluation_of(values, str(path))
        for row, values in rows.items()
        if not row.startswith((AFTER_ROW, BEST_ROW))
    }


def warmed_up_model(warm_folder: Path, name: str, checkpoint: str, *, needed: bool) -> str:
    """The model that a resumed run starts from: the warmed-up one if it still exists, else `name`.

    Raises:
        UserError: if it is needed and missing.
    """
    if (warm_folder / "config.json").is_file():
        return str(warm_folder)
    if needed:
        raise UserError(
            f"the run to resume had a warm start, but {warm_folder} has no model: copy warm_start there from the run "
            f"folder of {checkpoint}, or start again without resume_from_checkpoint"
        )
    return name
