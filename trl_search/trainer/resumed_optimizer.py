"""The optimizer of a resumed run: its state and settings are the checkpoint's, its learning rates follow this run's
schedule. Warns where the two differ.

    max_steps 4, linear:  1  .75  .5  .25  0       a finished run
    max_steps 8, linear:                   .5  .375  .25  .125    resumed

transformers would take the first resumed step at 0.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.training_args import OptimizerNames

from trl_search.common.errors import UserError

logger = logging.getLogger(__name__)

# Adam's settings in a checkpoint, and the keys that set them.
_KEYS = {"weight_decay": "weight_decay", "betas": "adam_beta1 and adam_beta2", "eps": "adam_epsilon"}


class ResumesOptimizer(Trainer):
    """A mixin that warns if a run has other settings of the optimizer than the checkpoint it resumes. List it before
    TRL's trainer."""

    _peak_rates: Sequence[float] = ()  # of each parameter group, at the start of the training
    _settings: Sequence[Mapping[str, Any]] = ()  # of each parameter group that has parameters, likewise

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Records the settings before a checkpoint is loaded, which DeepSpeed does long before transformers; a user's
        optimizer may have its own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        groups = getattr(self.optimizer, "param_groups", ())  # DeepSpeed's dummy optimizer has none
        if not self._settings:
            self._peak_rates = [float(group.get("initial_lr", group["lr"])) for group in groups]
            filled = [group for group in groups if group["params"]]
            self._settings = [{name: group[name] for name in group if name != "params"} for group in filled]
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._refuse_another_optimizer()
            self._warn_of_other_settings()
            self._continue_on_this_schedule(checkpoint)

    def _loaded_and_ours(self) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """The settings of each parameter group that the checkpoint left, and those at the start."""
        loaded = getattr(self.optimizer, "param_groups", ())
        # DeepSpeed leaves out groups without parameters.
        filled = loaded if len(loaded) == len(self._settings) else [group for group in loaded if group["params"]]
        return list(zip(filled, self._settings, strict=False))

    def _refuse_another_optimizer(self) -> None:
        """Refuses a checkpoint without the settings of this optimizer, which the first step would miss after its
        rollout."""
        missing = [name for group, before in self._loaded_and_ours() for name in before if name not in group]
        if missing:
            raise UserError(
                f"optim: {OptimizerNames(self.args.optim).value} cannot continue this checkpoint, which another "
                f"optimizer wrote ({missing[0]} is missing): resume with the optim of the first run, or start a new "
                "run with the checkpoint as model_name_or_path"
            )

    def _possible_rates(self) -> set[float]:
        """The peak learning rates that a checkpoint of this run can have."""
        return set(self._peak_rates or [self.args.learning_rate])

    def _warn_of_other_settings(self) -> None:
        """Warns of the settings that loading the checkpoint has replaced."""
        loaded = getattr(self.optimizer, "param_groups", ())
        replaced: dict[str, tuple[Any, Any]] = {}
        for group, before in self._loaded_and_ours():
            for name, key in _KEYS.items():
                if name == "betas" and "max_momentum" in group:  # a user's OneCycleLR moves them in every step
                    continue
                # FSDP2 loads a tuple as a list.
                value = tuple(group[name]) if isinstance(group.get(name), list) else group.get(name)
                if value != before.get(name):
                    replaced.setdefault(key, (before.get(name), value))
        others = {float(group.get("initial_lr", group["lr"])) for group in loaded} - self._possible_rates()
        if others:
            replaced["learning_rate"] = (self.args.learning_rate, ", ".join(f"{rate:g}" for rate in sorted(others)))
        for key, (given, theirs) in replaced.items():
            if self.is_world_process_zero():
                logger.warning(
                    "%s: %s has no effect: a resumed run continues with that of its checkpoint, %s. To train on with "
                    "another one, start a new run with the checkpoint as model_name_or_path",
                    key,
                    given,
                    theirs,
                )

    def _continue_on_this_schedule(self, checkpoint: str) -> None:
        """Sets the learning rates to those of this run's schedule, from which another max_steps can differ."""
        schedule: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate wraps it
        if not isinstance(schedule, LambdaLR):  # others, as that of reduce_lr_on_plateau, know no number of steps
            return
        optimizer: Any = self.optimizer
        left = [group["lr"] for group in optimizer.param_groups]
        due = [
            peak * share(schedule.last_epoch)
            for peak, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        if len(left) != len(due) or all(map(math.isclose, left, due)):
            return
        for group, rate in zip(optimizer.param_groups, due, strict=True):
            group["lr"] = rate
        schedule._last_lr = due  # for the logs
        if self.is_world_process_zero():
            state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
            logger.warning(
                "the learning rate goes from %g, with which %s ended, to %g, because this run has another schedule: "
                "that one had max_steps=%d, and perhaps another lr_scheduler_type or warmup_steps. To train on "
                "without a jump, start a new run with the checkpoint as model_name_or_path",
                left[0],
                checkpoint,
                due[0],
                state.max_steps,
            )
