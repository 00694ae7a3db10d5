"""After a collapse, training resumes from the best checkpoint with half the learning rate (`on_collapse: rollback`).

    step 60: an alarm has lasted ten logs ─► the training stops
             best checkpoint: step 40     ─► back to it: weights, optimizer, data order; learning rate × 0.5
             step 95: an alarm again      ─► back to the best checkpoint, learning rate × 0.25
             step 130: an alarm again     ─► the training ends

The best checkpoint has the highest held-out EM (`evaluate_every`). The learning rate of the configuration is halved,
so warm-up and decay continue from their step.

`rollbacks.json` in the folder of the run records each one, so a killed run goes on with its learning rate and with the
rollbacks that it has left, and not from a checkpoint that was given up:

    {"rollbacks": [{"step": 60, "to": 40, "at": "2026-11-27T07:02:11.408113+00:00"}]}
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_search.common.files import read_object, write_json
from trl_search.records.folder import ROLLBACKS_FILE

logger = logging.getLogger(__name__)

MAX_ROLLBACKS = 2
FACTOR = 0.5


class RollsBack(Trainer):
    """A trainer that goes back after a collapse. Stands before TRL's trainer."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as [`~transformers.Trainer.train`] does, and again from the best checkpoint after a collapse."""
        if getattr(self.args, "on_collapse", "warn") != "rollback":
            return super().train(resume_from_checkpoint, *args, **kwargs)
        before = self._rollbacks_before() if resume_from_checkpoint else 0
        output = self._train_after(before, resume_from_checkpoint, *args, **kwargs)
        for number in range(before + 1, MAX_ROLLBACKS + 1):
            best = self.state.best_model_checkpoint
            if not self._collapsed():
                break
            if best is None:
                logger.warning("there is no best checkpoint to go back to, so the training ends here")
                break
            rate = self.args.learning_rate * FACTOR**number
            logger.warning("rollback %d of %d: back to %s, learning rate %.3g", number, MAX_ROLLBACKS, best, rate)
            if self.is_world_process_zero():
                step, to = self.state.global_step, self.state.best_global_step
                record_rollback(Path(self.args.output_dir or "."), step=step, to=to or 0)
            self._buffered_inputs = None  # TRL's batches of the policy that is given up
            output = self._train_after(number, best, *args, **kwargs)
        return output

    def _train_after(self, rollbacks: int, checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        """Trains with the learning rate that so many rollbacks leave."""
        if not rollbacks:
            return super().train(checkpoint, *args, **kwargs)
        callback = _LearningRate(self.args.learning_rate * FACTOR**rollbacks)
        self.add_callback(callback)
        try:
            return super().train(checkpoint, *args, **kwargs)
        finally:
            self.remove_callback(callback)

    def _rollbacks_before(self) -> int:
        count = len(rollbacks_of(Path(self.args.output_dir or ".")))
        # Hosts that share no folder would train with different learning rates.
        return int(broadcast_object_list([count])[0]) if self.accelerator.num_processes > 1 else count

    def _collapsed(self) -> bool:
        alarm = getattr(self, "collapse_alarm", None)
        return alarm is not None and bool(alarm.collapsed)


def record_rollback(folder: Path, *, step: int, to: int) -> None:
    """Adds a rollback from one step to another to the record of the run."""
    at = datetime.datetime.now(datetime.UTC).isoformat()
    rollbacks = [*rollbacks_of(folder), {"step": step, "to": to, "at": at}]
    write_json(folder / ROLLBACKS_FILE, {"rollbacks": rollbacks})


def rollbacks_of(folder: Path) -> list[dict[str, Any]]:
    """The rollbacks of the run in a folder, oldest first."""
    path = folder / ROLLBACKS_FILE
    return list(read_object(path, "move it away")["rollbacks"]) if path.is_file() else []


def is_given_up(step: int, written_at: float, rollbacks: Sequence[dict[str, Any]]) -> bool:
    """Whether the run has gone back behind a checkpoint of that step, since it was written (a file's time)."""
    return any(
        step > one["to"] and written_at < datetime.datetime.fromisoformat(one["at"]).timestamp() for one in rollbacks
    )


class _LearningRate(TrainerCallback):
    """Replaces the learning rate that a checkpoint brought back."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of: Any) -> None:
        set_learning_rate(of["optimizer"], of["lr_scheduler"], self.rate)


def set_learning_rate(optimizer: Any, scheduler: Any, rate: float) -> None:
    """Sets the peak learning rate of every parameter group; where the schedule is at is kept."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    for group in optimizer.param_groups:
        before = group.get("initial_lr", group["lr"])
        group["lr"] = group["lr"] * rate / before if before else rate
        group["initial_lr"] = rate
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [rate] * len(scheduler.base_lrs)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
