"""The output of a training on the terminal: headings of its phases, a progress bar, and one line of metrics per step.

    ── GRPO: 12 steps on 1,500 questions
    step  3/12  reward 0.500  searches 0.720  seconds 5.10

`trl-search train`, `trl-search sft` and scripts with `SearchGRPOTrainer` print the same; a notebook shows a table. The
bar appears only in a terminal; a file gets the headings and the lines.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.text import Text
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length
from transformers.utils import is_in_notebook

from trl_search.records.alarm_rules import ALARM_PREFIX

# Metric -> name in the line. Metrics that a step did not log are left out.
SHOWN = {
    "reward": "reward",
    "eval/em": "held-out EM",
    "loss": "loss",
    "search/searches": "searches",
    "tools/calls": "calls",
    "search/malformed_calls": "malformed",
    "stop/answer": "answered",
    "tokens/model": "tokens",
    "entropy": "entropy",
    "kl": "kl",
    "step_time": "seconds",
}


def announce(phase: str, said: str) -> None:
    """Prints the heading of a phase of the run, on the main process."""
    if PartialState().is_main_process:
        Console(highlight=False, soft_wrap=True).print(Text.assemble("\n", (f"── {phase}", "bold"), f": {said}"))


def counted(number: int, noun: str) -> str:
    """The number with its noun: `1 step`, `1,500 questions`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def show_steps(trainer: Trainer) -> None:
    """Makes a trainer print our metrics per step instead of all. With `disable_tqdm`, nothing is changed."""
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
        trainer.add_callback(step_table() if is_in_notebook() else StepLines())


def shown(logs: Mapping[str, Any]) -> dict[str, str]:
    """The metrics of a step, or of an evaluation by TRL, under their short names, and the alarms that fired."""
    names = SHOWN | {key: f"held-out reward{f' {match[1]}' if match[1] else ''}" for key, match in _rewards(logs)}
    numbers = {name: _rounded(logs[key]) for key, name in names.items() if logs.get(key) is not None}
    fired = [name for name, value in logs.items() if name.startswith(ALARM_PREFIX) and value]
    alarms = ", ".join(name.removeprefix(ALARM_PREFIX) for name in fired)
    return numbers | ({"ALARM": alarms} if alarms else {})


def step_line(step: int, max_steps: int, logs: Mapping[str, Any]) -> str:
    """One line for one step.

    Example:
        >>> step_line(3, 12, {"reward": 0.5, "search/searches": 0.72, "step_time": 5.1})
        'step  3/12  reward 0.500  searches 0.720  seconds 5.10'
    """
    numbers = "  ".join(f"{name} {value}" for name, value in shown(logs).items())
    return f"step {step:>{len(str(max_steps))}}/{max_steps}  {numbers}"


class StepLines(ProgressCallback):
    """transformers' progress bar, hidden without a terminal, with our line instead of all metrics."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, desc="Training", disable=None, **_bar_size())
        self.current_step = 0

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self.prediction_bar is None and state.is_world_process_zero and has_length(eval_dataloader):
            leave = self.training_bar is None
            self.prediction_bar = tqdm(total=len(eval_dataloader), leave=leave, disable=None, **_bar_size())
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        # Logs without `loss` are evaluations, of which the rewards are shown, or the final summary.
        if state.is_world_process_zero and logs and ("loss" in logs or _rewards(logs)):
            tqdm.write(step_line(state.global_step, state.max_steps, logs))


def _rounded(value: float) -> str:
    """Three digits, without an exponent or a trailing point above 100: 0.720, 5.10, 173, 1,520."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _rewards(logs: Mapping[str, Any]) -> list[tuple[str, re.Match[str]]]:
    """The rewards of evaluations by TRL: `eval_reward`, or `eval_<name>_reward` of several sets."""
    return [(key, match) for key in logs if (match := re.fullmatch(r"eval_(?:(.+)_)?reward", key))]


def _bar_size() -> dict[str, Any]:
    """tqdm's options for its size. In a terminal of unknown size, such as `script`'s, tqdm needs a fixed size."""
    try:
        known = min(os.get_terminal_size(sys.stderr.fileno())) > 0
    except (OSError, ValueError, AttributeError):  # no terminal, or a user's object with `write` only
        known = True
    return {"dynamic_ncols": True} if known else {"ncols": 80, "nrows": 24}


def step_table() -> TrainerCallback:
    """transformers' table for notebooks, with our columns. It needs IPython, which a notebook has."""
    from transformers.utils.notebook import NotebookProgressCallback, NotebookTrainingTracker

    class StepTable(NotebookProgressCallback):
        def on_train_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            self.training_tracker = NotebookTrainingTracker(state.max_steps, ["step"])

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if self.training_tracker is not None and logs and "loss" in logs:
                self.training_tracker.write_line({"step": state.global_step, **shown(logs)})

    return StepTable()
