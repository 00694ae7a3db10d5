"""The terminal output of a training: one bar, and one line per step with the most telling metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from trl_search.records.alarm_rules import ALARM_PREFIX

# Metric -> its name in the line. Metrics that a step did not log are left out.
SHOWN = {
    "reward": "reward",
    "eval/em": "held-out EM",
    "loss": "loss",
    "search/searches": "searches",
    "search/malformed_calls": "malformed",
    "stop/answer": "answered",
    "tokens/model": "tokens",
    "entropy": "entropy",
    "kl": "kl",
    "step_time": "seconds",
}


def step_line(step: int, max_steps: int, logs: Mapping[str, Any]) -> str:
    """One line for one step.

    Example:
        >>> step_line(3, 12, {"reward": 0.5, "search/searches": 0.72, "step_time": 5.1})
        'step  3/12  reward 0.500  searches 0.720  seconds 5.10'
    """
    shown = "  ".join(f"{name} {logs[key]:#.3g}" for key, name in SHOWN.items() if logs.get(key) is not None)
    fired = [name for name, value in logs.items() if name.startswith(ALARM_PREFIX) and value]
    alarms = ", ".join(name.removeprefix(ALARM_PREFIX) for name in fired)
    return f"step {step:>{len(str(max_steps))}}/{max_steps}  {shown}" + (f"  ALARM {alarms}" if alarms else "")


class StepLines(ProgressCallback):
    """transformers' bar, hidden without a terminal, with our line in place of a dump of every metric."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, desc="Training", dynamic_ncols=True, disable=None)
        self.current_step = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # Without `loss` it is an evaluation or the summary at the end.
        if state.is_world_process_zero and logs and "loss" in logs:
            tqdm.write(step_line(state.global_step, state.max_steps, logs))
