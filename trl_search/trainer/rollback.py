"""Resumes from the best checkpoint with half the learning rate after a collapse (`on_collapse: rollback`).

    step 60: an alarm has lasted ten logs, or held-out EM has halved ─► the training stops
             best checkpoint: step 40     ─► back to it: weights, optimizer, data order; learning rate × 0.5
             step 95: an alarm again      ─► back to the best checkpoint, learning rate × 0.25
             step 130: an alarm again     ─► the training ends

The best checkpoint has the highest held-out EM (`evaluate_every`). The peak learning rate of every parameter group is
halved, so warm-up and decay continue from their step.

What was rolled back stands in `records/rollbacks.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_search.common.errors import UserError
from trl_search.records.rollbacks import record_rollback, rollbacks_of
from trl_search.trainer.callbacks.alarms import CollapseAlarm
from trl_search.trainer.resume import checkpoint_to_resume, warn_of_missing_optimizer
from trl_search.trainer.resumed_adapter import refuse_another_adapter
from trl_search.trainer.resumed_optimizer import ResumesOptimizer

logger = logging.getLogger(__name__)

MAX_ROLLBACKS = 2
FACTOR = 0.5


class RollsBack(ResumesOptimizer):
    """A mixin that rolls back after a collapse. List it before TRL's trainer."""

    _buffered_inputs: Any
    _step: int
    _metrics: Any
    _pending_extra_logs: Any
    _pending_metrics: Any

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as [`~transformers.Trainer.train`]; after a collapse, trains again from the best checkpoint.

        Raises:
            UserError: if rollback is used with DeepSpeed and the user's own optimizer.
        """
        folder = Path(self.args.output_dir or ".")
        if resume_from_checkpoint is None:  # transformers leaves this key of the configuration to scripts
            resume_from_checkpoint = self.args.resume_from_checkpoint
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, folder)
        refuse_another_adapter(self.model, checkpoint)
        if self.is_world_process_zero():
            warn_of_missing_optimizer(checkpoint)
        if getattr(self.args, "on_collapse", "warn") != "rollback":
            return self._train_from(checkpoint, *args, **kwargs)
        if self.is_deepspeed_enabled and self.optimizer is not None:
            raise UserError(
                "on_collapse=rollback makes a new optimizer under DeepSpeed, and cannot make yours: leave "
                "`optimizers` out, or set on_collapse=stop"
            )
        keeps_best = any(getattr(one, "keeps_best", False) for one in self.callback_handler.callbacks)
        if self.args.metric_for_best_model is None and not keeps_best:
            logger.warning(
                "on_collapse=rollback cannot go back, because no callback keeps a best checkpoint, and a collapse "
                "will end the training: add EvaluateEvery(steps, held_out) and BestCheckpoint(held_out), which "
                "`trl-search train` does with evaluate_every"
            )
        rollbacks, to = self._rollbacks_before(folder) if checkpoint else (0, 0)
        output = self._train_after(rollbacks, to, checkpoint, *args, **kwargs)
        for number in range(rollbacks + 1, MAX_ROLLBACKS + 1):
            alarm = self._alarm()
            if alarm is None or not alarm.collapsed:
                break
            if reason := _no_way_back(self.state, alarm):
                logger.warning("the training ends here, because %s", reason)
                break
            best, to = self.state.best_model_checkpoint, self.state.best_global_step or 0
            rate = self._rates_after(number)[0]
            logger.warning("rollback %d of %d: back to %s, learning rate %.3g", number, MAX_ROLLBACKS, best, rate)
            if self.is_world_process_zero():
                record_rollback(folder, step=self.state.global_step, to=to)
            self._leave_deepspeed()
            output = self._train_after(number, to, best, *args, **kwargs)
        return output

    def _train_after(self, rollbacks: int, to: int, checkpoint: str | None, *args: Any, **kwargs: Any) -> Any:
        """Trains with the learning rate after `rollbacks` rollbacks; the last one went back to step `to`."""
        if not rollbacks:
            return self._train_from(checkpoint, *args, **kwargs)
        if alarm := self._alarm():
            alarm.counts_after = to
        callback = _LearningRate(self, rollbacks)
        self.add_callback(callback)
        try:
            return self._train_from(checkpoint, *args, **kwargs)
        finally:
            self.remove_callback(callback)

    def _train_from(self, checkpoint: str | None, *args: Any, **kwargs: Any) -> Any:
        """Trains without what an earlier training of this process left, as a new process would: TRL's batch from the
        abandoned policy, its position in that batch, and metrics of a step that did not end."""
        self._buffered_inputs, self._step = None, 0
        self._metrics["train"].clear()
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()
        return super().train(checkpoint, *args, **kwargs)

    def _leave_deepspeed(self) -> None:
        """Gives up DeepSpeed's engine, which serves one training. The next one makes another of the bare model."""
        if self.is_deepspeed_enabled:
            engine: Any = self.deepspeed
            engine.destroy()  # otherwise its hooks stay in the model
            self.deepspeed = self.optimizer = self.lr_scheduler = None
            self.model_wrapped = self.accelerator.unwrap_model(engine)

    def _possible_rates(self) -> set[float]:
        return {rate for number in range(MAX_ROLLBACKS + 1) for rate in self._rates_after(number)}

    def _rates_after(self, rollbacks: int) -> list[float]:
        return [rate * FACTOR**rollbacks for rate in self._peak_rates or [self.args.learning_rate]]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Skips the epoch if the last step is done; otherwise transformers would take an extra step after a resume."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _rollbacks_before(self, folder: Path) -> tuple[int, int]:
        """The number of rollbacks so far, and the step to which the last one went back."""
        rollbacks = rollbacks_of(folder)
        before = len(rollbacks), rollbacks[-1]["to"] if rollbacks else 0
        # Without the broadcast, hosts that share no folder would train with different learning rates.
        return broadcast_object_list([before])[0] if self.accelerator.num_processes > 1 else before

    def _alarm(self) -> CollapseAlarm | None:
        return getattr(self, "collapse_alarm", None)


def _no_way_back(state: TrainerState, alarm: CollapseAlarm) -> str:
    """Why the best checkpoint is nothing to roll back to; empty if it is."""
    if state.best_model_checkpoint is None:
        return "there is no best checkpoint to roll back to"
    if state.best_metric is not None and alarm.watch.is_halved_since_start(state.best_metric):
        return (
            "held-out EM was more than twice as high before training as in the best checkpoint: start again with a "
            "lower learning_rate"
        )
    if (state.best_global_step or 0) >= state.max_steps:
        return "the best checkpoint is that of the last step"
    return ""


class _LearningRate(TrainerCallback):
    """Replaces the learning rate that was loaded from a checkpoint."""

    def __init__(self, trainer: RollsBack, rollbacks: int) -> None:
        self.trainer, self.rollbacks = trainer, rollbacks

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of: Any) -> None:
        set_learning_rates(of["optimizer"], of["lr_scheduler"], self.trainer._rates_after(self.rollbacks))


def set_learning_rates(optimizer: Any, scheduler: Any, rates: Sequence[float]) -> None:
    """Sets the peak learning rate of each parameter group, and keeps the position in the schedule. Equal rates apply
    to any number of groups."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    if len(set(rates)) == 1:  # DeepSpeed leaves out empty groups, such as a LoRA adapter's biases
        rates = [rates[0]] * len(optimizer.param_groups)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        before = group.get("initial_lr", group["lr"])
        group["lr"] = group["lr"] * rate / before if before else rate
        group["initial_lr"] = rate
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = list(rates)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
