"""Per-turn credit: within a trajectory, a search that found something gets more credit than one that did not.

    turn            observation            p(golden answer)   gain      normalised   summed from the end
    search "…"      names the author             0.02 → 0.10    0.08         -0.5                    0.7
    search "…"      tells the birthplace         0.10 → 0.90    0.80          1.2                    1.2
    answer                                                                                           0

The gain of a turn depends on its observation (`turn_credit`):

- `information_gain`: the increase of the policy's probability of the golden answer (the geometric mean over its
  tokens) if it had to answer at once (IGPO, arXiv:2510.14967). It takes one forward pass without gradients over every
  prefix that ends before a turn of the policy; a prefix that several trajectories share runs once.
- `retrieval`: 1 for the first observation that contains a golden answer. It costs nothing.

Gains are normalised over all turns of the group. A turn's credit is the sum of its own gain and all later ones, so the
first search gets credit for what it made possible. `turn_credit_coef` times the credit is added to the trajectory's
advantage, for the tokens of the turn. Deviations from IGPO: the outcome keeps TRL's advantage for all tokens, nothing
is discounted, and only the first of several golden answers is used. A trajectory without a reward gets no credit.

Suffixes: B trajectories of this rank, C completion tokens, P prefixes, R trajectories of all ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from trl_search.common.errors import UserError
from trl_search.rewards.answers import contains_answer
from trl_search.rewards.golden_answers import golden_list
from trl_search.trainer.prompts import positions_of
from trl_search.types import Trajectory, Turn

ANSWER = "<answer>"
SAME = 1e-6  # gains with a smaller spread count as equal


def refuse_turn_credit(trainer: Any) -> None:
    """Raises `UserError` if turns cannot be credited. Call it on a complete trainer, before its training."""
    kind = trainer.args.turn_credit
    if kind == "none":
        return
    if "golden_answers" not in next(iter(trainer.train_dataset), {}):
        raise UserError(
            f"turn_credit={kind} needs the column golden_answers: add it to the dataset, or set turn_credit=none"
        )
    if kind == "information_gain" and trainer.logprobs is None:
        raise UserError(
            "turn_credit=information_gain needs trl-search's own log-probs, which this model does not support: set "
            "turn_credit=retrieval"
        )


def credited_advantages(trainer: Any, rows: Sequence[Mapping[str, Any]], output: Mapping[str, Any]) -> torch.Tensor:
    """The per-token advantages (B, C) of a scored batch: the trajectory's advantage plus the credit of the turn."""
    trajectories, args = trainer.last_rollout.trajectories, trainer.args
    golden = [golden_list(row.get("golden_answers")) for row in rows]
    if args.turn_credit == "retrieval":
        gains = [
            retrieval_gains(trajectory, answers) for trajectory, answers in zip(trajectories, golden, strict=True)
        ]
    else:
        gains = information_gains(trainer, trajectories, golden)
    start = trainer.accelerator.process_index * len(gains)
    rewards_BF = trainer.last_rollout.rewards_RF[start : start + len(gains)]
    unrewarded_B = rewards_BF.isnan().all(dim=1).tolist()  # TRL also leaves them out of the baseline
    gains = [[] if unrewarded else row for row, unrewarded in zip(gains, unrewarded_B, strict=True)]
    found = [gain for row in gains for gain in row]
    sums = torch.tensor([sum(found), len(found)], dtype=torch.float32, device=trainer.accelerator.device)
    total, count = trainer.accelerator.reduce(sums, "sum").tolist()
    trainer.add_to_log({"credit/gain": total / max(1.0, count)})
    credit = group_credit(
        gains, trainer.num_generations, trainer.accelerator.gather, start, output["advantages"].device
    )
    advantages_BC = output["advantages"].unsqueeze(1).repeat(1, output["completion_ids"].shape[1])
    for row, trajectory in enumerate(trajectories):
        for (turn, _), value in zip(observed_turns(trajectory), credit[row], strict=not unrewarded_B[row]):
            advantages_BC[row, turn.start : turn.end] += args.turn_credit_coef * value
    return advantages_BC


def observed_turns(trajectory: Trajectory) -> list[tuple[Turn, Turn]]:
    """The turns of the policy that got an observation, each with it; none if the trajectory failed."""
    if trajectory.failed:
        return []
    return [
        (turn, reply)
        for turn, reply in itertools.pairwise(trajectory.turns)
        if (turn.role, reply.role) == ("assistant", "tool") and reply.text
    ]


def retrieval_gains(trajectory: Trajectory, golden: Sequence[str]) -> list[float]:
    """1.0 for the first observation that contains a golden answer, 0.0 for the others."""
    holds = [bool(golden) and contains_answer(reply.text, list(golden)) for _, reply in observed_turns(trajectory)]
    return [float(held and not any(holds[:index])) for index, held in enumerate(holds)]


def information_gains(
    trainer: Any, trajectories: Sequence[Trajectory], golden: Sequence[Sequence[str]]
) -> list[list[float]]:
    """How much each observation adds to the probability of the golden answer; 0 without one or without room for it."""
    tokenizer, room = trainer._tokenizer, positions_of(trainer.model, trainer.args)
    opening = tokenizer.encode(ANSWER, add_special_tokens=False)
    places: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}  # (prefix, answer) -> row
    wanted: list[list[int | None]] = []
    for trajectory, answers in zip(trajectories, golden, strict=True):
        answer = tuple(tokenizer.encode(f" {answers[0]}", add_special_tokens=False)) if answers else ()
        wanted.append([])
        for end in [0, *(reply.end for _, reply in observed_turns(trajectory))]:
            prefix = (*trajectory.prompt_ids, *trajectory.ids[:end], *opening)
            fits = bool(answer) and (room is None or len(prefix) + len(answer) <= room)
            wanted[-1].append(places.setdefault((prefix, answer), len(places)) if fits else None)
    probabilities = answer_probabilities(trainer, list(places))
    gains = []
    for row in wanted:
        known = [None if place is None else probabilities[place] for place in row]
        gains.append([0.0 if a is None or b is None else b - a for a, b in itertools.pairwise(known)])
    return gains


@torch.no_grad()
def answer_probabilities(trainer: Any, asked: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[float]:
    """For each (prefix, answer), the geometric mean of the policy's probabilities of the answer's tokens.

    All ranks must run the same number of rows, so ranks with fewer add dummy rows.
    """
    accelerator = trainer.accelerator
    most = int(accelerator.gather(torch.tensor([len(asked)], device=accelerator.device)).max())
    if not most:
        return []
    rows = [*asked, *[((0,), (0,))] * (most - len(asked))]
    # Prompts are padded on the left and answers on the right, as in TRL's batches.
    prefix_PT = pad_sequence(
        [torch.tensor(p) for p, _ in rows], batch_first=True, padding_value=-1, padding_side="left"
    )
    answer_PC = pad_sequence([torch.tensor(a) for _, a in rows], batch_first=True, padding_value=-1)
    ids_PT = torch.cat([prefix_PT, answer_PC], dim=1).to(accelerator.device)
    mask_PT, answer_mask_PC = (ids_PT >= 0).long(), (answer_PC >= 0).long().to(accelerator.device)
    with accelerator.autocast():
        logps_PC, _ = trainer.logprobs(
            trainer.model,
            ids_PT.clamp(min=0),
            mask_PT,
            answer_PC.shape[1],
            answer_mask_PC,
            batch_size=trainer.args.per_device_train_batch_size,
        )
    means_P = (logps_PC.float() * answer_mask_PC).sum(dim=1) / answer_mask_PC.sum(dim=1)
    probabilities: list[float] = means_P.exp().tolist()
    return probabilities[: len(asked)]


def group_credit(
    gains: Sequence[Sequence[float]],
    group_size: int,
    gather: Callable[[torch.Tensor], torch.Tensor],
    start: int,
    device: torch.device | str = "cpu",
) -> list[list[float]]:
    """Gains, normalised over all turns of their group and summed from the last turn to the first.

    Args:
        gains: The gains of the turns of each trajectory of this rank.
        gather (`Callable`): Maps a tensor (B, ...) of this rank to that of all ranks (R, ...).
        start (`int`): The index of this rank's first trajectory among those of all ranks.
    """
    moments = [[len(row), sum(row), sum(gain * gain for gain in row)] for row in gains]
    moments_R3 = gather(torch.tensor(moments, dtype=torch.float64, device=device))
    groups = moments_R3.view(-1, group_size, 3).sum(dim=1).tolist()
    credit = []
    for place, row in enumerate(gains, start):
        count, total, squares = groups[place // group_size]
        mean = total / max(1, count)
        spread = max(0.0, squares / max(1, count) - mean * mean) ** 0.5
        normal = [(gain - mean) / spread if spread > SAME else 0.0 for gain in row]
        credit.append([sum(normal[index:]) for index in range(len(normal))])
    return credit
