"""Finds rewards by name. A reward is a function with TRL's signature:

    reward(completions, golden_answers=[...], **columns) -> list[float | None]

A completion is a list of chat messages (the policy writes `assistant`, the environment `tool`), or a string that the
policy wrote. `None` gives a trajectory no score for that reward.

A recipe names a built-in reward, a reward of an installed package, or an import path:

    reward_funcs: [em, format, my_package.rewards.brevity]

A package adds rewards through the entry-point group `trl_search.rewards`:

    [project.entry-points."trl_search.rewards"]
    brevity = "my_package.rewards:brevity"

`@declare` names the dataset columns that a reward needs; a run without them stops before its first step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trl_search.common.errors import UserError
from trl_search.common.registry import Registry, is_python_file
from trl_search.rewards.built_in import BUILT_IN
from trl_search.rewards.declaration import Reward

REWARDS = Registry("reward", "trl_search.rewards", {name: f"trl_search.rewards.built_in:{name}" for name in BUILT_IN})


def resolve_rewards(specs: str | Reward | Sequence[str | Reward]) -> list[Reward]:
    """Turns the rewards of a recipe or a script into functions.

    Args:
        specs (`str`, `Callable` or a list of both): A name (built in, or added by an installed package), an import
            path (`package.module.function`, also with `:`), or a function, which is returned unchanged.

    Returns:
        `list[Callable]`: one function per reward, in order.

    Raises:
        UserError: for an empty list, an unknown reward, or a duplicate.
    """
    listed = listed_rewards(specs)
    if not listed:
        raise UserError("reward_funcs is empty: name at least one reward, as in `reward_funcs: [em, format]`")
    names = [spec for spec in listed if isinstance(spec, str)]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise UserError(
            f"reward {min(repeated)!r} is named twice: name it once, and raise its weight in `reward_weights`"
        )
    return [_resolve(spec) for spec in listed]


def listed_rewards(specs: Any) -> list[Any]:
    """One reward or several, as a list.

    Raises:
        UserError: for a mapping, and for a value that is neither a name nor a function.
    """
    if isinstance(specs, str) or callable(specs):
        return [specs]
    if isinstance(specs, Mapping):
        weights = list(specs.values())
        raise UserError(
            f"reward_funcs is a mapping: set reward_funcs={list(specs)!r}, and reward_weights={weights!r} in the "
            "configuration"
        )
    if not isinstance(specs, Iterable):
        raise UserError(f"a reward is a name or a function, not {type(specs).__name__}: {specs!r:.80}")
    return list(specs)


def names_a_model(spec: Any) -> bool:
    """Whether a reward is the name of a reward model, a hub id or a folder, which TRL loads."""
    return isinstance(spec, str) and "/" in spec and not is_python_file(spec)


def _resolve(spec: str | Reward) -> Reward:
    if callable(spec):
        return spec
    if not isinstance(spec, str):
        raise UserError(f"a reward is a name or a function, not {type(spec).__name__}: {spec!r:.80}")
    reward: Reward = REWARDS.find(spec)
    if not callable(reward):
        raise UserError(f"reward {spec!r} is not a function but {type(reward).__name__}")
    return reward
