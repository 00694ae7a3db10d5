"""Keeps the checkpoint with the highest held-out EM as `output_dir/best`.

    step 20: eval/em 0.81, the highest so far ─► checkpoint-20 is saved, whatever save_strategy says
                                              ─► once it is complete: best -> checkpoint-20, atomically

It is a complete checkpoint: it loads as a model, and training can resume from it. `best` is a symbolic link that moves
after every rank has written its part, so it never points to an incomplete checkpoint. `state.best_model_checkpoint`
keeps `save_total_limit` from deleting it. A checkpoint that was saved only because it was the best is deleted when a
better one is saved.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_search.common.errors import UserError
from trl_search.common.files import read_object, write_json
from trl_search.config.refused_keys import refuse_two_best
from trl_search.evaluation.outcomes import evaluation_of
from trl_search.trainer.callbacks.held_out import HeldOut, HeldOutResult
from trl_search.trainer.resume import is_whole

logger = logging.getLogger(__name__)

LINK = "best"
RECORD = "held_out_result.json"


class BestCheckpoint(TrainerCallback):
    """Saves a checkpoint whenever a held-out evaluation is the best so far. Add it after [`EvaluateEvery`].

    Raises:
        UserError: if the trainer has another criterion for the best checkpoint.
    """

    keeps_best = True  # `rollback.py` looks for a callback that does

    def __init__(self, held_out: HeldOut) -> None:
        self.held_out = held_out
        refuse_two_best(held_out.trainer.args)
        self._asked: int | None = None  # the step whose checkpoint is saved only because it is the best
        self._beaten: Path | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restores the best checkpoint of a resumed run, and removes a link that another run left in this folder.

        Raises:
            UserError: if the path of the link is taken by a file or folder.
        """
        folder = Path(args.output_dir or ".")
        link = folder / LINK
        if link.exists() and not link.is_symlink():
            raise UserError(f"{link} exists, but the link to the best checkpoint has this name: move it away")
        best: Path | None = None
        if state.is_world_process_zero:
            best = _recorded(folder, state)
            if best is not None:
                _point(link, best)
            elif link.is_symlink():
                logger.warning(
                    "%s is removed, because it points to the best checkpoint of another run, %s", link, link.readlink()
                )
                link.unlink()
        if self.held_out.trainer.accelerator.num_processes > 1:
            best = broadcast_object_list([best])[0]
        state.best_model_checkpoint = None if best is None else str(best)
        if best is None:
            state.best_metric = state.best_global_step = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        result = self.held_out.last
        if result is None or result.step != state.global_step or not _better(result, state.best_metric):
            return
        self._beaten = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
        self._asked = None if control.should_save else state.global_step
        state.best_metric, state.best_global_step = result.average.em, state.global_step
        state.best_model_checkpoint = os.path.join(
            args.output_dir or ".", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        )
        control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        result = self.held_out.last
        if result is None or state.best_global_step != state.global_step or result.step != state.global_step:
            return
        self.held_out.trainer.accelerator.wait_for_everyone()  # every rank has written its part
        if state.is_world_process_zero:
            best = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            write_record(best, result, only_best=self._asked == state.global_step)
            _point(best.parent / LINK, best)
            if self._beaten is not None and self._beaten != best and _only_best(self._beaten):
                shutil.rmtree(self._beaten)
        # If it is saved again at this step, as at the end of an epoch, it becomes a regular checkpoint.
        self._asked = self._beaten = None


def write_record(checkpoint: Path, result: HeldOutResult, *, only_best: bool) -> None:
    """Writes the evaluation to the checkpoint. `only_best`: the checkpoint was saved only because it is the best."""
    record = {
        "step": result.step,
        "average": result.average.as_json(),
        "datasets": {name: evaluation.as_json() for name, evaluation in result.datasets.items()},
        "seconds": result.seconds,
        "only_best": only_best,
    }
    write_json(checkpoint / RECORD, record)


def read_best(folder: Path) -> HeldOutResult | None:
    """The evaluation of the best checkpoint of a run; `None` if there is none.

    Raises:
        UserError: if the file lacks a value.
    """
    path = folder / LINK / RECORD
    if not path.is_file():
        return None
    record = read_object(path, "move it away")
    if missing := {"step", "average", "datasets", "seconds"} - record.keys():
        raise UserError(f"{path} has no {', '.join(sorted(missing))}: move it away")
    datasets = {name: evaluation_of(values, str(path)) for name, values in record["datasets"].items()}
    return HeldOutResult(record["step"], evaluation_of(record["average"], str(path)), datasets, record["seconds"])


def _better(result: HeldOutResult, best: float | None) -> bool:
    return result.average.is_comparable and (best is None or result.average.em > best)


def _recorded(folder: Path, state: TrainerState) -> Path | None:
    """The best checkpoint of the resumed state, if it still exists. The folder may have moved."""
    if not state.global_step or not state.best_global_step:
        return None
    best = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
    return best if is_whole(best) else None


def _point(link: Path, checkpoint: Path) -> None:
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint.name, target_is_directory=True)
    os.replace(temporary, link)


def _only_best(checkpoint: Path) -> bool:
    try:
        return json.loads((checkpoint / RECORD).read_bytes())["only_best"] is True
    except (OSError, ValueError, KeyError):
        return False
