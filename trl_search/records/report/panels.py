"""The panels of a report: which metrics are drawn together, with which labels.

A metric is a name or a pattern such as `eval/*/em`; the text that matches the star is the label of the line.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Panel:
    """One entry of `PANELS`."""

    section: str  # the heading above the chart
    title: str
    note: str  # how to read the chart, in one line
    lines: tuple[tuple[str, str], ...]  # metric or pattern, and label; the label of a pattern contains a star
    alarms: tuple[str, ...] = ()  # the alarms that watch these metrics (`trl_search/records/alarm_rules.py`)
    rare: bool = False  # leaves out lines that are always 0
    several: bool = False  # leaves out a chart with a single line, which another chart already shows


PANELS = (
    Panel(
        "Results", "Held-out answers", "mean over datasets, from before training (step 0)",
        (("eval/em", "exact match"), ("eval/f1", "F1")), ("held_out", "held_out_gap", "held_out_halved"),
    ),
    Panel(
        "Results", "Reward", "weighted sum, mean over trajectories",
        (("reward", "mean"), ("reward_std", "standard deviation within groups")),
        ("never_rewarded", "reward", "reward_variance"),
    ),
    Panel("Results", "Single rewards", "each before its weight", (("rewards/*/mean", "*"),), ("never_right",)),
    Panel(
        "Results", "Reward of evaluations", "of TRL (eval_strategy), mean over trajectories",
        (("eval_reward", "mean"), ("eval_*_reward", "*")),
    ),
    Panel("Results", "Exact match per dataset", "held-out questions", (("eval/*/em", "*"),), several=True),
    Panel(
        "Behaviour", "Calls and turns", "per trajectory",
        (("search/searches", "searches"), ("tools/calls", "calls of other tools"), ("search/turns", "turns"),
         ("eval/searches", "calls, held out")),
        ("searches", "tool_calls", "turns"),
    ),
    Panel(
        "Behaviour", "Length", "tokens per trajectory",
        (("tokens/model", "model, trained"), ("tokens/per_turn", "model, per turn"),
         ("tokens/observation", "retrieved, masked")), ("thoughts",),
    ),
    Panel(
        "Behaviour", "Queries", "share of the queries of a trajectory",
        (("search/quoted_queries", "with an exact phrase"), ("search/repeated_queries", "repeated")),
        ("exact_queries", "repeated_queries"), rare=True,
    ),
    Panel(
        "Behaviour", "How trajectories end", "share of trajectories",
        (("stop/*", "*"), ("search/no_answer", "without an answer")), ("answers", "no_answer"), rare=True,
    ),
    Panel(
        "Behaviour", "Warning signs", "per trajectory; what never happened is left out",
        (("search/malformed_calls", "malformed calls"), ("search/near_calls", "nearly right calls"),
         ("search/duplicate_tags", "duplicate tags"), ("search/empty_retrievals", "empty searches"),
         ("search/failed_rollouts", "failed trajectories")),
        ("malformed", "duplicate_tags"), rare=True,
    ),
    Panel(
        "Behaviour", "Reflection", "share of trajectories with a reflective phrase",
        (("reflection/ratio", "training"), ("eval/reflection_ratio", "held out")), rare=True,
    ),
    Panel(
        "Behaviour", "Reflective phrases", "per 1,000 model tokens",
        (("reflection/phrases_per_1k_tokens", "phrases"),), rare=True,
    ),
    Panel(
        "Optimisation", "Groups without signal", "share of groups in which all rewards are equal",
        (("frac_reward_zero_std", "groups"),), ("silent_groups",),
    ),
    Panel(
        "Optimisation", "Entropy", "of the policy, nats per token", (("entropy", "entropy"),),
        ("entropy_rise", "entropy_fall"),
    ),
    Panel("Optimisation", "KL", "to the reference model", (("kl", "KL"),), ("kl",)),
    Panel("Optimisation", "Gradient norm", "before clipping", (("grad_norm", "norm"),)),
    Panel("Optimisation", "Loss", "of GRPO near zero by design; of a cold start it falls",
        (("loss", "loss"),), ("not_finite",),
    ),
    Panel(
        "Time", "Time", "seconds of the step and of its rollout, and per trajectory for generation and search",
        (("step_time", "step"), ("time/rollout_s", "rollout"), ("time/generation_s", "generation"),
         ("time/search_s", "search")),
    ),
)  # fmt: skip
