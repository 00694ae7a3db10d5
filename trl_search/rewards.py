"""Rewards: plain functions in TRL's signature, found by name, that read what the *model* wrote.

    reward(prompts, completions, completion_ids=None, golden_answers=[...], **kwargs) -> list[float | None]

A completion is what TRL hands over: a list of chat messages (`assistant` is the model's, `tool` is the world's), or a
plain string, all of it the model's. `None` leaves a sample out of that reward.

A recipe names rewards: a name below, a name that an installed package adds, or an import path:

    reward_funcs: [em, format, my_package.rewards.brevity]

A package adds rewards through the entry-point group `trl_search.rewards`:

    [project.entry-points."trl_search.rewards"]
    brevity = "my_package.rewards:brevity"

`@declare` says which dataset columns a reward needs, so that a run stops before its first step and not in it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import entry_points
from typing import Any, TypeVar

from trl_search.errors import UserError, unknown_name
from trl_search.reflection import count_reflections
from trl_search.text import contains_answer, exact_match, f1_score, golden_list, last_answer
from trl_search.wellformed import format_score

Reward = Callable[..., Any]
RewardT = TypeVar("RewardT", bound=Reward)
Completion = str | Sequence[dict[str, Any]] | dict[str, Any]

ENTRY_POINT_GROUP = "trl_search.rewards"
REFLECTION_CAP = 3


def declare(*, required_columns: Sequence[str] = (), default_weight: float = 1.0) -> Callable[[RewardT], RewardT]:
    """Marks a reward function with what the trainer should know of it; the function itself is unchanged.

    Args:
        required_columns (`Sequence[str]`, *optional*, defaults to `()`):
            Dataset columns that it takes as keywords.
        default_weight (`float`, *optional*, defaults to `1.0`):
            Its weight where `reward_weights` is not given. At 0 it is tracked and not trained on.

    Example:
        >>> @declare(required_columns=["golden_answers"])
        ... def brevity(completions, golden_answers, **kwargs): ...
    """

    def mark(reward: RewardT) -> RewardT:
        vars(reward).update(required_columns=tuple(required_columns), default_weight=default_weight)
        return reward

    return mark


def required_columns(reward: Reward) -> tuple[str, ...]:
    """The dataset columns that a reward declares; none where it declares nothing."""
    return tuple(getattr(reward, "required_columns", ()))


def default_weight(reward: Reward) -> float:
    """The weight that a reward declares; 1.0 where it declares none."""
    return float(getattr(reward, "default_weight", 1.0))


def check_columns(rewards: Iterable[Reward], columns: Iterable[str]) -> None:
    """Raises a `UserError` where the dataset lacks a column that a reward needs."""
    present = set(columns)
    for reward in rewards:
        for column in required_columns(reward):
            if column not in present:
                raise _missing_column(getattr(reward, "__name__", str(reward)), column, present)


@declare(required_columns=["golden_answers"])
def em(
    prompts: Any = None,
    completions: Sequence[Completion] = (),
    completion_ids: Any = None,
    golden_answers: Sequence[Any] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """Exact match: 1.0 where the last `<answer>` that the model wrote equals a gold answer, both normalised, else 0.0.

    A row without gold answers gets `None`.

    Example:
        >>> em(completions=["<answer>The Beatles!</answer>"], golden_answers=[["Beatles"]])
        [1.0]
    """
    rows = _rows("em", completions, golden_answers, kwargs)
    return [_against(golden, _answer(completion), exact_match) for completion, golden in rows]


@declare(required_columns=["golden_answers"])
def f1(
    prompts: Any = None,
    completions: Sequence[Completion] = (),
    completion_ids: Any = None,
    golden_answers: Sequence[Any] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """SQuAD's F1 between the last `<answer>` that the model wrote and the best gold answer; 0.0 without an answer.

    A row without gold answers gets `None`.

    Example:
        >>> f1(completions=["<answer>Marie Curie</answer>"], golden_answers=[["Marie Skłodowska Curie"]])
        [0.8]
    """
    rows = _rows("f1", completions, golden_answers, kwargs)
    return [_against(golden, _answer(completion), f1_score) for completion, golden in rows]


@declare(required_columns=["golden_answers"])
def retrieval(
    prompts: Any = None,
    completions: Sequence[Completion] = (),
    completion_ids: Any = None,
    golden_answers: Sequence[Any] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """1.0 where a gold answer stands, whole words and normalised, in something that was retrieved, else 0.0.

    It reads tool messages alone: writing the answer into the query does not pay. It says little about gold answers
    that occur in any text, such as "yes" or a bare year. A row without gold answers gets `None`.

    Example:
        >>> messages = [{"role": "assistant", "content": "…"}, {"role": "tool", "content": "Curie, born in Warsaw"}]
        >>> retrieval(completions=[messages], golden_answers=[["Warsaw"]])
        [1.0]
    """
    rows = _rows("retrieval", completions, golden_answers, kwargs)
    return [_against(golden, "\n".join(_texts(completion, "tool")), contains_answer) for completion, golden in rows]


def format(
    prompts: Any = None,
    completions: Sequence[Completion] = (),
    completion_ids: Any = None,
    **kwargs: Any,
) -> list[float | None]:
    """Whether the trajectory is well-formed, under any protocol. In proportion to Search-R1 v0.3's format reward:

    - 0.0: the last turn holds no closed `<answer>`, or the model wrote a `<tool_response>` or `<information>` itself;
    - 0.5: it answers, but something is malformed;
    - 1.0: tags are balanced and none lies inside another; every turn but the last ends in its one call (`<tool_call>`
      or `<search>`, not empty, JSON that parses if it is JSON); the last ends in the one answer, which is not empty.

    It never looks at whether the answer is right: trained on alone, it teaches the form and nothing else.

    Example:
        >>> format(completions=["<think> easy </think> <answer> Paris </answer>", "<answer> Paris", "Paris"])
        [1.0, 0.0, 0.0]
    """
    return [format_score(_texts(completion, "assistant")) for completion in completions]


@declare(default_weight=0.0)
def reflection(
    prompts: Any = None,
    completions: Sequence[Completion] = (),
    completion_ids: Any = None,
    **kwargs: Any,
) -> list[float | None]:
    """Reflective phrases in what the model wrote, at most `REFLECTION_CAP`, scaled to [0, 1].

    Off by default: its weight is 0, so it is tracked and not trained on. **It is easily gamed.** It counts phrases,
    not thought: "wait, wait, wait," costs six tokens and earns all of it, whatever the answer. The seed saw reflective
    phrases and scores grow together; nothing says that paying for the phrases raises the score. If you do train on it,
    keep its weight below half of the answer's, and read some completions.

    Example:
        >>> reflection(completions=["Wait, let me double-check.", "Paris."])
        [0.6666666666666666, 0.0]
    """
    counts = (sum(map(count_reflections, _texts(completion, "assistant"))) for completion in completions)
    return [min(count, REFLECTION_CAP) / REFLECTION_CAP for count in counts]


BUILT_IN: dict[str, Reward] = {"em": em, "f1": f1, "format": format, "reflection": reflection, "retrieval": retrieval}


def resolve_rewards(specs: str | Reward | Sequence[str | Reward]) -> list[Reward]:
    """Turns what a recipe or a script gives into reward functions.

    Args:
        specs (`str`, `Callable` or a list of both):
            A name (built in, or added by an installed package), an import path (`package.module.function`, also with
            `:`), or the function itself, which is returned as it is.

    Returns:
        `list[Callable]`: one function for each, in order.

    Example:
        >>> resolve_rewards(["em", my_reward])
        [<function em>, <function my_reward>]
    """
    listed = [specs] if isinstance(specs, str) or callable(specs) else list(specs)
    if not listed:
        raise UserError("no reward is given: name at least one, as in `reward_funcs: [em, format]`")
    names = [spec for spec in listed if isinstance(spec, str)]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise UserError(f"reward {min(repeated)!r} is named twice: name it once, and give it more in `reward_weights`")
    return [_resolve(spec) for spec in listed]


def available_rewards() -> list[str]:
    """The names that `resolve_rewards` knows: built in, then added by installed packages."""
    return [*BUILT_IN, *sorted({point.name for point in entry_points(group=ENTRY_POINT_GROUP)} - BUILT_IN.keys())]


def _resolve(spec: str | Reward) -> Reward:
    if callable(spec):
        return spec
    if not isinstance(spec, str):
        raise UserError(f"a reward is a name or a function, not {type(spec).__name__}: {spec!r}")
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    for point in entry_points(group=ENTRY_POINT_GROUP, name=spec):
        try:
            return _callable(point.load(), spec)
        except (ImportError, AttributeError) as error:
            package = point.dist.name if point.dist else "unknown"
            raise UserError(
                f"reward {spec!r} of package {package!r} ({point.value}) cannot be imported: {error}"
            ) from error
    if "." in spec or ":" in spec:
        return _import(spec)
    raise unknown_name("reward", spec, available_rewards())


def _import(path: str) -> Reward:
    module_name, _, name = path.replace(":", ".").rpartition(".")
    # A console script does not look in the folder that it is started from; `python script.py` beside the module does.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return _callable(getattr(importlib.import_module(module_name), name), path)
    except (ImportError, AttributeError) as error:
        raise UserError(f"reward {path!r} cannot be imported: {error}") from error


def _callable(value: Any, name: str) -> Reward:
    if not callable(value):
        raise UserError(f"reward {name!r} is not a function but {type(value).__name__}")
    reward: Reward = value
    return reward


def _rows(
    name: str, completions: Sequence[Completion], golden_answers: Sequence[Any] | None, others: dict[str, Any]
) -> Iterable[tuple[Completion, list[str]]]:
    if golden_answers is None:
        # Columns come as lists, one value a completion; TRL's own keywords (trainer_state, log_metric) do not.
        raise _missing_column(
            name, "golden_answers", [key for key, value in others.items() if isinstance(value, list)]
        )
    return zip(completions, map(golden_list, golden_answers), strict=True)


def _missing_column(reward: str, column: str, present: Iterable[str]) -> UserError:
    found = ", ".join(sorted(present)) or "none"
    return UserError(
        f"reward {reward!r} needs the dataset column {column!r}, and the columns are: {found}. Add the column, or "
        "leave the reward out of `reward_funcs`."
    )


def _against(golden: list[str], text: str | None, score: Callable[[str, list[str]], float]) -> float | None:
    if not golden:
        return None
    return 0.0 if text is None else float(score(text, golden))


def _texts(completion: Completion, role: str) -> list[str]:
    return [_content(message) for message in _messages(completion) if message.get("role", "assistant") == role]


def _messages(completion: Completion) -> Sequence[dict[str, Any]]:
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    return [completion] if isinstance(completion, dict) else completion


def _content(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)  # [{"type": "text", "text": …}, …]
    # Stock TRL parses calls out of the text; written back, one reader serves both.
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    return content + "".join(f"\n<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


def _answer(completion: Completion) -> str | None:
    return last_answer(_texts(completion, "assistant"))
