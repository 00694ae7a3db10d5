"""After a collapse, training resumes from the best checkpoint with half the learning rate (`on_collapse: rollback`).

    step 60: an alarm has lasted ten logs ─► the training stops
             best checkpoint: step 40     ─► back to it: weights, optimizer, data order; learning rate × 0.5
             step 95: an alarm again      ─► back to the best checkpoint, learning rate × 0.25
             step 130: an alarm again     ─► the training ends

The best checkpoint has the highest held-out EM (`evaluate_every`). The learning rate of the configuration is halved,
so warm-up and decay continue from their step.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

MAX_ROLLBACKS = 2
FACTOR = 0.5


class RollsBack(Trainer):
    """A trainer that goes back after a collapse. Stands before TRL's trainer."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as [`~transformers.Trainer.train`] does, and again from the best checkpoint after a collapse."""
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        for number in range(1, MAX_ROLLBACKS + 1):
            best = self.state.best_model_checkpoint
            if getattr(self.args, "on_collapse", "warn") != "rollback" or not self._collapsed():
                break
            if best is None:
                logger.warning("there is no best checkpoint to go back to, so the training ends here")
                break
            rate = self.args.learning_rate * FACTOR**number
            logger.warning("rollback %d of %d: back to %s, learning rate %.3g", number, MAX_ROLLBACKS, best, rate)
            self._buffered_inputs = None  # TRL's batches of the policy that is given up
            callback = _LearningRate(rate)
            self.add_callback(callback)
            try:
                output = super().train(best, *args, **kwargs)
            finally:
                self.remove_callback(callback)
        return output

    def _collapsed(self) -> bool:
        alarm = getattr(self, "collapse_alarm", None)
        return alarm is not None and bool(alarm.collapsed)


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
