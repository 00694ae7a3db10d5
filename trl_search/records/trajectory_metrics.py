"""The metrics of a rollout batch: a row per trajectory, averaged over all ranks. docs/metrics.md lists them.

Metrics of searches are left out if the environment has no search, metrics of other calls if it has no other tool.

`retrieval/<name>` counts the retriever's work for a rollout batch, over all ranks: `queries`, `failed_queries`,
`batches` and `search_s` for every retriever; for `http` and `web` also `requests`, `failures`, `retries`,
`failures/<endpoint>` and more.

TRL logs further metrics: `rewards/<name>/mean`, `entropy`, `kl`, `frac_reward_zero_std` (groups without signal).
"""

from __future__ import annotations

import re
from collections.abc import Collection

from trl_search.rewards.reflective_phrases import count_reflections
from trl_search.rewards.tag_structure import duplicate_tags
from trl_search.types import Answer, Search, StopReason, Trajectory

_QUOTED = re.compile(r'["“«][^"”»]+["”»]')


_OF_SEARCHES = ("search/searches", "search/quoted_queries", "search/repeated_queries", "search/empty_retrievals")


def idle_metrics(tools: Collection[str]) -> set[str]:
    """The metrics that would be 0 in every step, because the policy lacks the tools that they count.

    Example:
        >>> idle_metrics(["search"])
        {'tools/calls'}
    """
    idle = set() if "search" in tools else set(_OF_SEARCHES)
    return idle if set(tools) - {"search"} else idle | {"tools/calls"}


def trajectory_metrics(trajectory: Trajectory) -> dict[str, float]:
    """The numbers of one trajectory, under the same keys for every trajectory."""
    phrases = sum(map(count_reflections, trajectory.spoken))
    queries = [query for action in trajectory.actions if isinstance(action, Search) for query in action.queries]
    different = len({query.strip().lower() for query in queries})
    answered = any(isinstance(action, Answer) for action in trajectory.actions)
    return {
        "search/searches": float(trajectory.searches),
        "search/turns": float(len(trajectory.spoken)),
        "search/malformed_calls": float(trajectory.malformed),
        "search/near_calls": float(trajectory.near_calls),
        "search/duplicate_tags": float(duplicate_tags(trajectory.spoken)),
        "search/quoted_queries": sum(map(bool, map(_QUOTED.search, queries))) / max(1, len(queries)),
        "search/repeated_queries": (len(queries) - different) / max(1, len(queries)),
        "search/no_answer": float(not answered and not trajectory.failed),
        "search/empty_retrievals": float(sum(not passages for passages in trajectory.passages)),
        "search/failed_rollouts": float(trajectory.failed),
        "tools/calls": float(trajectory.calls - trajectory.searches),
        "tokens/model": float(trajectory.model_tokens),
        "tokens/per_turn": trajectory.model_tokens / max(1, len(trajectory.spoken)),
        "tokens/observation": float(trajectory.observation_tokens),
        "tokens/nonfinite_logprobs": float(trajectory.nonfinite_logprobs),
        "time/generation_s": trajectory.generation_s,
        "time/search_s": trajectory.search_s,
        "reflection/ratio": float(phrases > 0),
        "reflection/phrases_per_1k_tokens": 1000 * phrases / max(1, trajectory.model_tokens),
        **{f"stop/{reason.value}": float(trajectory.stop_reason is reason) for reason in StopReason},
    }
