"""The alarm rules: which metric each rule watches, when it fires, and what it advises."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl_search.common.files import is_number

WINDOW = 5  # logs whose median is compared
SETTLED = 3  # logs whose median is the first baseline
ALARM_PREFIX = "alarm/"  # prefix of the metric that is 1 while a rule fires
EM_BEFORE = "eval/em_before"  # held-out EM before the first step
NEAR = 0.95  # a training reward above this share of its highest level is near it
HALF = 0.5  # held-out EM below this share of the best, or of that before training, is a collapse


@dataclass
class Level:
    """The current, lowest and highest level of a metric in this run. All are medians of recent logs."""

    values: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    low: float = math.inf
    high: float = -math.inf
    highest: float = -math.inf  # the highest single log, not a median
    logs: int = 0
    always_zero: bool = True

    def add(self, value: float) -> None:
        self.values.append(value)
        self.logs += 1
        self.highest = max(self.highest, value)
        self.always_zero &= value == 0
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
    """One kind of failure."""

    name: str  # logged as `alarm/<name>`
    metric: str  # the metric that the rule watches. The rule is inactive if the run does not log it.
    # means, advice: The text of the warning
    means: str
    advice: str
    rises: float | None = None  # fires above this many times the metric's lowest level and above `beyond`
    # Fires below this share of the metric's highest level and below `beyond`, if the highest level is at least `worth`
    falls: float | None = None
    beyond: float = math.inf
    worth: float = 0.0
    unless_solved: bool = False  # silent while the reward is at its best, because there is nothing left to learn
    # The change may precede a collapse but may also be wanted: the rule warns and never ends a run
    drift: bool = False
    at_once: bool = False  # `on_collapse` acts on the first log instead of waiting for ten

    def look(self, levels: Mapping[str, Level], row: Mapping[str, Any]) -> str:
        """What happened, in words; empty if the rule does not fire."""
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
    """Fires on a single log in which one of the metrics in `metric`, separated by commas, is not finite."""

    def look(self, levels: Mapping[str, Level], row: Mapping[str, Any]) -> str:
        # TRL logs `None` for a metric of which all values were NaN.
        broken = [name for name in self.metric.split(", ") if name in row and not is_number(row[name])]
        return f"{', '.join(broken)}: not a finite number" if broken else ""


@dataclass(frozen=True)
class NeverScored(Rule):
    """Fires from the third log on until a rollout scores. Such a run has no signal, but has not collapsed."""

    def look(self, levels: Mapping[str, Level], row: Mapping[str, Any]) -> str:
        level, spread = levels.get(self.metric), levels.get(f"{self.metric}_std")
        if level is None or level.logs < SETTLED or not level.always_zero or (spread and not spread.always_zero):
            return ""
        return f"{self.metric} was 0 in every rollout of the first {level.logs} logs"


@dataclass(frozen=True)
class Fell(Rule):
    """Fires on a single evaluation of which the whole 95 % interval is below `falls` times the best one."""

    while_reward_is_best: bool = False  # fires only while the training reward is near its highest, down to `HALF`

    def look(self, levels: Mapping[str, Level], row: Mapping[str, Any]) -> str:
        upper: Any = row.get(f"{self.metric}_upper")  # the upper end of the interval
        if not is_number(upper) or self.falls is None:
            return ""
        highest = max(levels[name].highest for name in (self.metric, EM_BEFORE) if name in levels)
        if highest < self.worth or upper >= self.falls * highest:
            return ""
        said = f"{self.metric} fell from {highest:.2g} to {row[self.metric]:.2g}"
        if not self.while_reward_is_best:
            return said
        reward = levels.get("reward")
        if reward is None or not reward.known or reward.now < NEAR * reward.high or upper < HALF * highest:
            return ""
        return f"{said}, while reward is at {reward.now:.2g}, near its highest"


_BEGIN = (
    "read the completions (trl-search report); begin with a cold start (trl-search sft; for your own tool, with "
    "your own script: docs/own-agent.md), train on easier questions (trl-search data filter)"
)
RULES: tuple[Rule, ...] = (
    NotFinite(
        "not_finite", "loss, grad_norm, entropy, kl",
        "an update was not finite and was skipped (three in a row stop the run)",
        "go back to a checkpoint; lower learning_rate or max_grad_norm, train in bf16 instead of fp16",
    ),
    NeverScored(
        "never_rewarded", "reward", "no rollout has scored, so there is nothing to learn from",
        f"{_BEGIN}, also reward a first step (format, retrieval), and test your own reward by hand",
    ),
    NeverScored(
        "never_right", "rewards/em/mean", "no rollout has given a right answer, whatever its other rewards",
        f"{_BEGIN}, and check that golden_answers have the form of a right answer", drift=True,
    ),
    Rule(
        "reward", "reward", "the policy gets worse on its training reward",
        "go back to the best checkpoint; lower learning_rate, take fewer optimizer steps per batch",
        falls=0.4, worth=0.1,
    ),
    Rule(
        "reward_variance", "reward_std", "rewards hardly differ within groups: there is little to learn from",
        "read the completions: if all are the same, raise temperature or num_generations; if calls "
        "are malformed, train the cold start for longer or lower temperature",
        falls=0.2, worth=0.01, unless_solved=True,
    ),
    Rule(
        "silent_groups", "frac_reward_zero_std", "nearly all groups have equal rewards: there is no gradient",
        "raise num_generations, or train on questions that the policy sometimes answers",
        rises=0.0, beyond=0.95, unless_solved=True,
    ),
    Rule(
        "searches", "search/searches", "the policy stops searching, usually because guessing pays as much",
        "begin with a cold start (trl-search sft), give the retrieval reward a weight, or set search_floor_steps; if "
        "searches find nothing, look at retrieval/failed_queries and search/empty_retrievals",
        falls=0.3, worth=0.1,
    ),
    Rule(
        "tool_calls", "tools/calls", "the policy stops calling its tools",
        "read the completions; if guessing pays as much as calling, begin with a cold start (trl-search sft), or "
        "reward what a call finds",
        falls=0.3, worth=0.1,
    ),
    Rule(
        "turns", "search/turns", "trajectories end in their first turns",
        "read the completions: without an answer, the call format is lost; with one, see alarm/searches and "
        "alarm/tool_calls",
        falls=0.5, worth=2.0,
    ),
    Rule(
        "answers", "stop/answer", "trajectories run into a budget instead of answering",
        "look at stop/* for which budget it is; if the policy rambles, tokens/model rises",
        falls=0.5, worth=0.2,
    ),
    Rule(
        "no_answer", "search/no_answer", "more and more trajectories end without an answer",
        "stop/* shows how they end; lower learning_rate, go back to the best checkpoint",
        rises=3.0, beyond=0.2,
    ),
    Rule(
        "exact_queries", "search/quoted_queries",
        "the policy stops searching for exact phrases: queries get vaguer, long before the reward falls",
        "read the queries of the report; lower learning_rate, compare eval/em of the checkpoints before going on",
        falls=0.4, worth=0.1, drift=True,
    ),
    Rule(
        "repeated_queries", "search/repeated_queries", "the policy repeats queries, which finds nothing new",
        "read the queries of the report; look at search/empty_retrievals, lower max_searches",
        rises=2.0, beyond=0.3, drift=True,
    ),
    Rule(
        "thoughts", "tokens/per_turn", "the policy thinks less and less before it acts",
        "read the completions; lower learning_rate, use a loss with a constant length normaliser (loss_type: dr_grpo)",
        falls=0.4, worth=30.0, drift=True,
    ),
    Rule(
        "held_out", "eval/em", "held-out EM falls, whatever the training reward does",
        "go back to the best checkpoint; read rewarded completions: they may earn the reward without a right answer",
        falls=0.75, worth=0.1, drift=True,
    ),
    Fell(
        "held_out_gap", "eval/em", "held-out EM is well below its best, while the training reward is near its own",
        "read rewarded completions: they may earn the reward without a right answer; lower learning_rate",
        falls=0.9, worth=0.1, drift=True, while_reward_is_best=True,
    ),
    Fell(
        "held_out_halved", "eval/em", "held-out EM is less than half of its best",
        "go back to the best checkpoint; lower learning_rate",
        falls=HALF, worth=0.1, at_once=True,
    ),
    Rule(
        "malformed", "search/malformed_calls", "the policy loses the format of its calls",
        "lower learning_rate, raise beta, or give the format reward a weight",
        rises=2.0, beyond=0.5,
    ),
    Rule(
        "duplicate_tags", "search/duplicate_tags", "the policy repeats its tags",
        "lower learning_rate, raise beta, or give the format reward a weight",
        rises=2.0, beyond=0.5,
    ),
    Rule(
        "entropy_rise", "entropy", "the policy loses its language",
        "lower learning_rate, raise beta; check that mask_observations is on",
        rises=2.0, beyond=0.3,
    ),
    Rule(
        "entropy_fall", "entropy", "the policy's samples are all alike: it no longer explores",
        "raise temperature, epsilon_high or entropy_coef; lower learning_rate",
        falls=0.1, beyond=0.01, unless_solved=True,
    ),
    Rule(
        "kl", "kl", "the policy moves too far from its reference", "raise beta, lower learning_rate",
        rises=3.0, beyond=1.0,
    ),
)  # fmt: skip


DRIFT = {rule.name for rule in RULES if rule.drift}
AT_ONCE = {rule.name for rule in RULES if rule.at_once}


def _solved(reward: Level | None) -> bool:
    return reward is not None and reward.known and reward.now > max(0.9 * reward.high, 0.05)
