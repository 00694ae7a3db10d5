"""Alarms that warn early of a collapse: the policy stops searching, gets no reward, or degenerates to garbled text.

    logs of a run ─► Watch: the median of the last 5 against the lowest and highest such median so far ─► RULES
                 ─► CollapseAlarm: `alarm/<name>` 0 or 1 in every log and tracker, one warning, optionally a stop

Each rule compares a run with its own past, so it is independent of the task. `drift` rules fire long before a
collapse, on changes that may be intended; they warn but never end a run. All rules are silent on recorded healthy runs
and fire on recorded collapses (`tests/support/data/histories.json`, made by `benchmarks/alarms.py`; docs/monitoring.md
lists them). Rules compare medians because a single log can be an outlier, such as a KL of 1e3 from one token.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_search.common.files import is_number
from trl_search.evaluation.outcomes import MAX_FAILED
from trl_search.records.alarm_rules import (
    ALARM_PREFIX,
    AT_ONCE,
    DRIFT,
    EM_BEFORE,
    HALF,
    RULES,
    WINDOW,
    Level,
    NotFinite,
)

logger = logging.getLogger(__name__)

AS_DRAWN = "refill/reward_before"  # with refill: the reward before questions are replaced
STOP_AFTER = 10  # logs in a row that an alarm lasts before `on_collapse` acts, unless its rule is `at_once`


class Watch:
    """Tracks the levels of the metrics of one run. Add its training logs, oldest first.

    Example:
        >>> watch = Watch()
        >>> [watch.add(row) for row in trainer.state.log_history][-1]
        {'not_finite': '', ..., 'searches': 'search/searches fell from 1.7 to 0.1', ...}
    """

    def __init__(self) -> None:
        self.levels: dict[str, Level] = {}

    def add(self, row: Mapping[str, Any]) -> dict[str, str]:
        """The finding of each rule after this log, `""` for none. A rule is left out until its metric is logged."""
        if AS_DRAWN in row:  # `reward` is biased: refill selected the groups by reward
            row = {**row, "reward": row[AS_DRAWN]}
        if is_number(row.get("eval/failed")) and row["eval/failed"] > MAX_FAILED:  # a search server was away
            row = {name: value for name, value in row.items() if name not in ("eval/em", "eval/em_upper")}
        for metric in {EM_BEFORE, *(rule.metric for rule in RULES)} & set(row):
            if is_number(row[metric]):
                self.levels.setdefault(metric, Level()).add(row[metric])
        rules = [rule for rule in RULES if rule.metric in self.levels or isinstance(rule, NotFinite)]
        return {rule.name: rule.look(self.levels, row) for rule in rules}

    def is_halved_since_start(self, em: float) -> bool:
        """Whether a held-out EM is below half of that before training."""
        start = self.levels.get(EM_BEFORE)
        return start is not None and em < HALF * start.highest


def is_training_log(row: Mapping[str, Any]) -> bool:
    """Whether a row is the log of a step, not an evaluation or the final summary."""
    return "loss" in row


class CollapseAlarm(TrainerCallback):
    """Adds the alarms to every log. It warns once per alarm, and again only after `WINDOW` logs without the alarm.
    With `stop`, an alarm that has lasted `STOP_AFTER` logs (one, if its rule is `at_once`) ends the training.

    It must run before the callbacks that report the logs, because it adds `alarm/<name>` to them.
    """

    def __init__(self, *, stop: bool) -> None:
        self.stop = stop
        self.counts_after = 0  # the step of the last rollback; the duration of alarms is counted from there
        self._restart()

    def _restart(self) -> None:
        self.collapsed: tuple[str, ...] = ()  # the alarms that ended the training
        self.watch = Watch()
        self.lasting: Counter[str] = Counter()  # alarm -> logs in a row in which it fired
        self.quiet: dict[str, int] = {}  # reported alarm -> logs in a row without it since then

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Replays the logs before the checkpoint, so that a resumed run is compared with them."""
        self._restart()
        for row in filter(is_training_log, state.log_history):
            self._update(row)
            if row.get("step", 0) <= self.counts_after:
                self.lasting.clear()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of: Any) -> None:
        logs: dict[str, Any] = of["logs"]
        if not logs or not is_training_log(logs):
            return
        found, new = self._update(logs)
        flags = {f"{ALARM_PREFIX}{name}": float(bool(what)) for name, what in found.items()}
        logs.update(flags)
        if state.log_history:  # its last row was copied from `logs` just before this call
            state.log_history[-1].update(flags)
        if state.is_world_process_zero:
            for rule in RULES:
                if rule.name in new:
                    said = f"{found[rule.name]}: {rule.means}. To do: {rule.advice}"
                    logger.warning("step %d, alarm %s: %s", state.global_step, rule.name, said)
        if self.stop:
            self._stop(state, control)

    def _update(self, row: Mapping[str, Any]) -> tuple[dict[str, str], set[str]]:
        """The finding of each rule, and the names of the alarms that are new."""
        found, new = self.watch.add(row), set()
        for name, what in found.items():
            if what:
                self.lasting[name] += 1
                if name not in self.quiet:
                    new.add(name)
                self.quiet[name] = 0
            else:
                self.lasting[name] = 0
                if name in self.quiet:
                    self.quiet[name] += 1
                    if self.quiet[name] == WINDOW:
                        del self.quiet[name]
        return found, new

    def _stop(self, state: TrainerState, control: TrainerControl) -> None:
        lasting = [
            name
            for name, logs in self.lasting.items()
            if name not in DRIFT and logs >= (1 if name in AT_ONCE else STOP_AFTER)
        ]
        if PartialState().num_processes > 1:
            # If ranks disagreed because of rounding, they would wait for each other forever.
            lasting = broadcast_object_list([lasting])[0]
        at_its_end = state.global_step >= state.max_steps > 0
        if lasting and (at_its_end or not control.should_training_stop):
            control.should_training_stop = True
            self.collapsed = tuple(lasting)
            best = state.best_model_checkpoint or "none was kept, as evaluate_every is 0"
            if state.is_world_process_zero:
                said = ", ".join(f"{name} ({self.lasting[name]} logs)" for name in lasting)
                logger.warning(
                    "step %d: the training stops (on_collapse) because of %s. The best checkpoint: %s",
                    state.global_step, said, best,
                )  # fmt: skip
