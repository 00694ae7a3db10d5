"""Alarms on collapse: a run that stopped searching, stopped being rewarded or lost its language is named, early.

    logs of a run ─► Watch: the median of the last 5, against the lowest and highest such median so far ─► RULES
                 ─► CollapseAlarm: `alarm/<name>` 0 or 1 in every log and tracker, a warning once, a stop on request

Each rule compares a run with what the same run has been, so none needs to know the task. Rules of `drift` fire long
before a collapse, on changes that may also be wanted; they warn and end no run. All rules are silent on healthy
runs and loud on collapses that were recorded (`tests/support/data/histories.json`, made by
`benchmarks/alarms.py`); what fired when is in docs/monitoring.md. Medians, because one log of a healthy run may show
anything: a KL of 1e3 from one token.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

WINDOW = 5  # logs whose median is compared
SETTLED = 3  # logs whose median is the first baseline
STOP_AFTER = 10  # logs in a row that an alarm lasts before `stop_on_collapse` ends the run
PREFIX = "alarm/"


@dataclass
class Level:
    """Where a metric is, and the lowest and highest that it has been in this run; all are medians of recent logs."""

    values: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    low: float = math.inf
    high: float = -math.inf

    def add(self, value: float) -> None:
        self.values.append(value)
        if len(self.values) >= SETTLED:
            self.low, self.high = min(self.low, self.now), max(self.high, self.now)

    @property
    def now(self) -> float:
        return statistics.median(self.values)

    @property
    def known(self) -> bool:
        return len(self.values) == WINDOW


@dataclass(frozen=True)
class Rule:
    """One thing that goes wrong.

    Attributes:
        name (`str`): Logged as `alarm/<name>`.
        metric (`str`): What is watched; a run that does not log it has no such alarm.
        means (`str`), advice (`str`): What is told.
        rises (`float`, *optional*): Fires above this many times the metric's lowest level and above `beyond`.
        falls (`float`, *optional*): Fires below this share of the metric's highest level and below `beyond`, once
            that level has been at least `worth`.
        unless_solved (`bool`): Not where the reward is as high as it has been: then there is nothing left to learn.
        drift (`bool`): Comes before a collapse and may also be wanted, so it is told and ends no run.
    """

    name: str
    metric: str
    means: str
    advice: str
    rises: float | None = None
    falls: float | None = None
    beyond: float = math.inf
    worth: float = 0.0
    unless_solved: bool = False
    drift: bool = False

    @property
    def condition(self) -> str:
        """When it fires, in words."""
        if self.rises is not None:
            said = f"above {self.beyond:g}" + (f" and {self.rises:g}× its lowest" if self.rises else "")
        else:
            said = f"below {self.falls:g}× its highest"
            said += f" and {self.beyond:g}" if math.isfinite(self.beyond) else ""
            said += f", once that was {self.worth:g}" if self.worth else ""
        return said + (", unless the reward is at its best" if self.unless_solved else "")

    def look(self, levels: Mapping[str, Level], row: Mapping[str, Any]) -> str:
        """What has happened; empty where nothing has."""
        level = levels.get(self.metric)
        if level is None or not level.known or (self.unless_solved and _solved(levels.get("reward"))):
            return ""
        if self.rises is not None and level.now > max(self.rises * level.low, self.beyond):
            return f"{self.metric} rose from {level.low:.2g} to {level.now:.2g}"
        if self.falls is not None and level.now < min(self.falls * level.high, self.beyond):
            return f"{self.metric} fell from {level.high:.2g} to {level.now:.2g}" if level.high >= self.worth else ""
        return ""


@dataclass(frozen=True)
class NotFinite(Rule):
    """Fires at once, on the last log alone: a number that is not finite needs no second look."""

    metrics: tuple[str, ...] = ()

    @property
    def condition(self) -> str:
        return "not a finite number, in one log"

    def look(self, levels: Mapping[str, Level], row: Mapping[str, Any]) -> str:
        # TRL logs `None` for a metric that was NaN throughout.
        broken = [name for name in self.metrics if name in row and not _finite(row[name])]
        return f"{', '.join(broken)}: not a finite number" if broken else ""


RULES: tuple[Rule, ...] = (
    NotFinite(
        "not_finite",
        "loss, grad_norm, entropy, kl",
        "an update overflowed and was skipped (three in a row stop the run)",
        "go back to a checkpoint; lower learning_rate or max_grad_norm, train in bf16 instead of fp16",
        metrics=("loss", "grad_norm", "entropy", "kl"),
    ),
    Rule(
        "reward",
        "reward",
        "the policy gets worse at what it is trained on",
        "go back to the best checkpoint; lower learning_rate, take fewer optimizer steps a batch",
        falls=0.4,
        worth=0.1,
    ),
    Rule(
        "reward_variance",
        "reward_std",
        "rewards hardly differ any more: there is little to learn from",
        "look at completions for one answer to everything; raise temperature or num_generations",
        falls=0.2,
        worth=0.01,
        unless_solved=True,
    ),
    Rule(
        "silent_groups",
        "frac_reward_zero_std",
        "in hardly any group do two rewards differ: there is no gradient",
        "raise num_generations, or train on questions that the policy sometimes answers",
        rises=0.0,
        beyond=0.95,
        unless_solved=True,
    ),
    Rule(
        "searches",
        "search/searches",
        "the policy gives up searching",
        "if guessing pays as much as searching, begin with a cold start (trl-search sft) or give the retrieval reward "
        "a weight; look at retrieval/failed_queries and search/empty_retrievals",
        falls=0.3,
        worth=0.1,
    ),
    Rule(
        "turns",
        "search/turns",
        "trajectories end in their first turns",
        "look at completions: without an answer, the call's format is lost; with one, see alarm/searches",
        falls=0.5,
        worth=2.0,
    ),
    Rule(
        "answers",
        "stop/answer",
        "trajectories run into a budget instead of answering",
        "look at stop/* for which budget; a policy that babbles shows in tokens/model",
        falls=0.5,
        worth=0.2,
    ),
    Rule(
        "no_answer",
        "search/no_answer",
        "more and more trajectories end without an answer",
        "look at stop/* for how they end; lower learning_rate, go back to the best checkpoint",
        rises=3.0,
        beyond=0.2,
    ),
    Rule(
        "exact_queries",
        "search/quoted_queries",
        "the policy stops asking for exact phrases: queries get vaguer, long before the reward falls",
        "read the queries of the report; lower learning_rate, compare eval/em of the checkpoints before going on",
        falls=0.4,
        worth=0.1,
        drift=True,
    ),
    Rule(
        "repeated_queries",
        "search/repeated_queries",
        "the policy asks the same again and learns nothing from it",
        "read the queries of the report; look at search/empty_retrievals, lower max_searches",
        rises=2.0,
        beyond=0.3,
        drift=True,
    ),
    Rule(
        "thoughts",
        "tokens/per_turn",
        "the policy thinks less and less before it acts",
        "read the completions; lower learning_rate, use a loss with a constant length normaliser (loss_type: dr_grpo)",
        falls=0.4,
        worth=30.0,
        drift=True,
    ),
    Rule(
        "held_out",
        "eval/em",
        "held-out questions are answered worse than before, whatever the training reward says",
        "go back to the best checkpoint; read what is rewarded: the reward may be earned without a right answer",
        falls=0.75,
        worth=0.1,
        drift=True,
    ),
    Rule(
        "malformed",
        "search/malformed_calls",
        "the policy loses the format of its calls",
        "lower learning_rate, raise beta, or give the format reward a weight",
        rises=2.0,
        beyond=0.5,
    ),
    Rule(
        "duplicate_tags",
        "search/duplicate_tags",
        "the policy repeats its tags",
        "lower learning_rate, raise beta, or give the format reward a weight",
        rises=2.0,
        beyond=0.5,
    ),
    Rule(
        "entropy_rise",
        "entropy",
        "the policy loses its language",
        "lower learning_rate, raise beta; make sure that mask_observations is on",
        rises=2.0,
        beyond=0.3,
    ),
    Rule(
        "entropy_fall",
        "entropy",
        "the policy writes the same whatever it samples: it explores no more",
        "raise temperature, epsilon_high or entropy_coef; lower learning_rate",
        falls=0.1,
        beyond=0.01,
        unless_solved=True,
    ),
    Rule(
        "kl",
        "kl",
        "the policy runs away from its reference",
        "raise beta, lower learning_rate",
        rises=3.0,
        beyond=1.0,
    ),
)


DRIFT = {rule.name for rule in RULES if rule.drift}


class Watch:
    """The levels of one run. Fed with its training logs, oldest first.

    Example:
        >>> watch = Watch()
        >>> [watch.add(row) for row in trainer.state.log_history][-1]
        {'not_finite': '', ..., 'searches': 'search/searches fell from 1.7 to 0.1', ...}
    """

    def __init__(self) -> None:
        self.levels: dict[str, Level] = {}

    def add(self, row: Mapping[str, Any]) -> dict[str, str]:
        """What every rule finds after this log, `""` for nothing; a rule is left out until its metric is logged."""
        for metric in {rule.metric for rule in RULES} & set(row):
            if _finite(row[metric]):
                self.levels.setdefault(metric, Level()).add(row[metric])
        rules = [rule for rule in RULES if rule.metric in self.levels or isinstance(rule, NotFinite)]
        return {rule.name: rule.look(self.levels, row) for rule in rules}


def find_collapse(history: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What has collapsed at the end of a run, by rule, in words. `history` holds its training logs, oldest first.

    Example:
        >>> find_collapse(trainer.state.log_history)
        {'searches': 'search/searches fell from 1.7 to 0.1'}
    """
    watch, found = Watch(), dict[str, str]()
    for row in history:
        if is_training_log(row):
            found = watch.add(row)
    return {name: what for name, what in found.items() if what}


def is_training_log(row: Mapping[str, Any]) -> bool:
    """Whether a row is a step's own log: not an evaluation, nor the summary at the end."""
    return "loss" in row


class CollapseAlarm(TrainerCallback):
    """Puts the alarms into every log, and warns once for each until it has been quiet for a while.

    It must be called before the callbacks that report logs, as it writes `alarm/<name>` into what they report.

    Args:
        stop (`bool`, *optional*, defaults to `False`): Ends the training when an alarm has lasted `STOP_AFTER` logs.
    """

    def __init__(self, *, stop: bool = False) -> None:
        self.stop = stop
        self._restart()

    def _restart(self) -> None:
        self.watch = Watch()
        self.lasting: Counter[str] = Counter()  # alarm -> logs in a row in which it fired
        self.quiet: dict[str, int] = {}  # alarm that was told -> logs in a row since in which it did not

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run is compared with what it was before."""
        self._restart()
        for row in filter(is_training_log, state.log_history):
            self._update(row)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or not is_training_log(logs):
            return
        found, new = self._update(logs)
        flags = {f"{PREFIX}{name}": float(bool(what)) for name, what in found.items()}
        logs.update(flags)
        if state.log_history:  # made from the logs just before this call
            state.log_history[-1].update(flags)
        if state.is_world_process_zero:
            for rule in RULES:
                if rule.name in new:
                    said = f"{found[rule.name]}: {rule.means}. To do: {rule.advice}"
                    logger.warning("step %d, alarm %s: %s", state.global_step, rule.name, said)
        if self.stop:
            self._stop(state, control)

    def _update(self, row: Mapping[str, Any]) -> tuple[dict[str, str], set[str]]:
        """What every rule finds, and those that were quiet before."""
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
        lasting = [name for name, logs in self.lasting.items() if logs >= STOP_AFTER and name not in DRIFT]
        if PartialState().num_processes > 1:
            # Ranks that disagreed by a rounding would wait for each other for ever.
            lasting = broadcast_object_list([lasting])[0]
        if lasting and not control.should_training_stop:
            control.should_training_stop = True
            best = state.best_model_checkpoint or "none was kept, as evaluate_every is 0"
            if state.is_world_process_zero:
                logger.warning(
                    "step %d: training stops, as %s lasted %d logs (stop_on_collapse). The best checkpoint: %s",
                    state.global_step, ", ".join(lasting), STOP_AFTER, best,
                )  # fmt: skip


def _solved(reward: Level | None) -> bool:
    return reward is not None and reward.known and reward.now > max(0.9 * reward.high, 0.05)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
