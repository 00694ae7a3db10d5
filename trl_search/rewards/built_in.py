"""The built-in rewards. Each accepts all keywords that TRL passes and uses those in its signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trl_search.rewards.answers import contains_answer, exact_match, f1_score
from trl_search.rewards.completions import Completion, answer_of, texts_of
from trl_search.rewards.declaration import Reward, declare, missing_column
from trl_search.rewards.golden_answers import golden_list
from trl_search.rewards.reflective_phrases import count_reflections
from trl_search.rewards.tag_structure import format_score

REFLECTION_CAP = 3
OVERLONG_SHARE = 0.2  # of the budget; DAPO's 4,096 of 20,480 tokens
Scores = list[float | None]
Golden = Sequence[Any] | None


@declare(required_columns=["golden_answers"])
def em(completions: Sequence[Completion], golden_answers: Golden = None, **columns: Any) -> Scores:
    """Exact match: 1.0 if the policy's last `<answer>` equals a gold answer after normalisation, else 0.0.

    A row without gold answers gets `None`.

    Example:
        >>> em(completions=["<answer>The Beatles!</answer>"], golden_answers=[["Beatles"]])
        [1.0]
    """
    return _scores("em", exact_match, map(answer_of, completions), golden_answers, columns)


@declare(required_columns=["golden_answers"])
def f1(completions: Sequence[Completion], golden_answers: Golden = None, **columns: Any) -> Scores:
    """SQuAD's F1 between the policy's last `<answer>` and the best gold answer; 0.0 without an answer.

    A row without gold answers gets `None`.

    Example:
        >>> f1(completions=["<answer>Marie Curie</answer>"], golden_answers=[["Marie Skłodowska Curie"]])
        [0.8]
    """
    return _scores("f1", f1_score, map(answer_of, completions), golden_answers, columns)


@declare(required_columns=["golden_answers"])
def retrieval(completions: Sequence[Completion], golden_answers: Golden = None, **columns: Any) -> Scores:
    """1.0 if the observations contain a gold answer (whole words, normalised), else 0.0.

    It reads only tool messages, so the policy gains nothing by writing the answer into the query. It says little about
    gold answers that occur in many texts, such as "yes" or a year. A row without gold answers gets `None`.

    Example:
        >>> messages = [{"role": "assistant", "content": "…"}, {"role": "tool", "content": "Curie, born in Warsaw"}]
        >>> retrieval(completions=[messages], golden_answers=[["Warsaw"]])
        [1.0]
    """
    retrieved = ["\n".join(texts_of(completion, "tool")) for completion in completions]
    return _scores("retrieval", contains_answer, retrieved, golden_answers, columns)


def format(completions: Sequence[Completion], **columns: Any) -> Scores:
    """Whether the trajectory is well-formed, under any protocol. The values follow Search-R1 v0.3's format reward:

    - 0.0: the last turn has no closed `<answer>`, or the policy wrote a `<tool_response>` or `<information>` itself;
    - 0.5: the last turn answers, but something is malformed;
    - 1.0: tags are balanced and not nested; every turn but the last ends in exactly one call (`<tool_call>` or
      `<search>`, not empty, valid if it is JSON); the last turn ends in exactly one answer, which is not empty.

    It ignores whether the answer is right, so it teaches only the format when it is the only reward.

    Example:
        >>> format(completions=["<think> easy </think> <answer> Paris </answer>", "<answer> Paris", "Paris"])
        [1.0, 0.0, 0.0]
    """
    return [format_score(texts_of(completion, "assistant")) for completion in completions]


@declare(default_weight=0.0)
def reflection(completions: Sequence[Completion], **columns: Any) -> Scores:
    """The number of reflective phrases that the policy wrote, capped at `REFLECTION_CAP` and scaled to [0, 1].

    Its default weight is 0, so it is logged but not trained on. **It is easily gamed:** it counts phrases, not
    thought, and "wait, wait, wait," earns the full reward for six tokens, whatever the answer. In some runs phrases
    and scores grew together; that does not show that rewarding the phrases raises the score. If you train on it, keep
    its weight below half of the answer's, and read some completions.

    Example:
        >>> reflection(completions=["Wait, let me double-check.", "Paris."])
        [0.6666666666666666, 0.0]
    """
    counts = (sum(map(count_reflections, texts_of(completion, "assistant"))) for completion in completions)
    return [min(count, REFLECTION_CAP) / REFLECTION_CAP for count in counts]


@declare(settings=["max_completion_length"])
def soft_overlong_punishment(
    completions: Sequence[Completion],
    *,
    completion_ids: Sequence[Sequence[int]],
    max_completion_length: int,
    **columns: Any,
) -> Scores:
    """DAPO's soft overlong punishment (arXiv:2503.14476, equation 13): from 0 to -1 over the last fifth of the budget.

    With L = `max_completion_length` and c = L / 5, a trajectory of y tokens gets 0 up to L - c, and (L - c - y) / c
    beyond. Retrieved tokens count, because they use the same budget. Give it a weight below that of the answer.

    Example:
        >>> ids = [[1] * 80, [1] * 90, [1] * 100]
        >>> soft_overlong_punishment(completions=["…"] * 3, completion_ids=ids, max_completion_length=100)
        [0.0, -0.5, -1.0]
    """
    margin = OVERLONG_SHARE * max_completion_length
    return [-min(1.0, max(0.0, len(ids) - (max_completion_length - margin)) / margin) for ids in completion_ids]


_REWARDS: tuple[Reward, ...] = (em, f1, format, reflection, retrieval, soft_overlong_punishment)
BUILT_IN = {reward.__name__: reward for reward in _REWARDS}


def _scores(
    name: str, score: Callable[[str, list[str]], float], texts: Any, golden_answers: Golden, columns: dict[str, Any]
) -> Scores:
    """The score of each text against its gold answers: 0.0 without a text, `None` without gold answers."""
    if golden_answers is None:
        # TRL passes columns as lists, one value per completion; most other keywords (trainer_state) are not lists.
        given = {key for key, value in columns.items() if isinstance(value, list)} - {"prompts", "completion_ids"}
        raise missing_column(name, "golden_answers", given)
    return [
        None if not golden else 0.0 if text is None else float(score(text, golden))
        for text, golden in zip(texts, map(golden_list, golden_answers), strict=True)
    ]
