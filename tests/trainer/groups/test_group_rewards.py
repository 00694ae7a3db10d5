"""Whether a group has a gradient follows TRL's advantages; the logs of reward functions keep their order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from trl_search.trainer.groups.group_rewards import has_gradient
from trl_search.trainer.loss.without_gradient import drop_rounding

NAN = float("nan")


@pytest.mark.parametrize(
    ("rewards", "trained", "expected"),
    [
        ([[1.0], [0.0]], [True, True], True),
        ([[1.0], [1.0]], [True, True], False),
        ([[0.1], [0.1], [0.1]], [True] * 3, False),  # in float32 the mean of three times 0.1 is not 0.1
        ([[NAN], [NAN]], [False, False], False),  # all failed
        ([[NAN], [1.0], [1.0]], [False, True, True], False),
        ([[NAN], [1.0], [0.0]], [False, True, True], True),
        ([[1.0], [0.0]], [False, False], False),  # none of their tokens is in the loss
        ([[NAN], [1.0]], [False, True], False),  # a single reward equals its mean
    ],
)
def test_a_gradient_needs_rewards_that_differ_and_tokens_in_the_loss(rewards, trained, expected):
    assert has_gradient(torch.tensor(rewards), torch.ones(1), "sum_then_normalize", trained) is expected


def test_cancelling_rewards_are_judged_by_trls_aggregation():
    cancelling = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert not has_gradient(cancelling, torch.ones(2), "sum_then_normalize", [True, True])
    assert not has_gradient(cancelling, torch.ones(2), "normalize_then_sum", [True, True])
    unequal = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        assert has_gradient(unequal, torch.ones(2), aggregation, [True] * 4)
    equal = torch.full((3, 2), 0.1)
    assert not has_gradient(equal, torch.ones(2), "normalize_then_sum", [True] * 3)


def test_a_reward_of_weight_0_is_tracked_and_gives_no_gradient():
    rewards = torch.tensor([[1.0, 0.3], [1.0, 0.9]])
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        assert not has_gradient(rewards, torch.tensor([1.0, 0.0]), aggregation, [True, True])


@pytest.mark.parametrize("rewards", [[1.3] * 6, [1.3] * 5 + [1.3001], [0.0] * 6, [1e-7] + [0.0] * 5, [1e5 * 0.7] * 6])
def test_a_group_has_a_gradient_exactly_if_an_advantage_is_not_zero(rewards):
    rewards_GF, weights = torch.tensor(rewards).view(-1, 1), torch.ones(1)
    trainer = SimpleNamespace(
        multi_objective_aggregation="sum_then_normalize",
        reward_weights=weights,
        num_generations=6,
        accelerator=SimpleNamespace(process_index=0),
    )
    deviation_G = rewards_GF[:, 0] - rewards_GF.mean()
    advantages_G = deviation_G / (deviation_G.std() + 1e-4)  # as in TRL
    drop_rounding(advantages_G, rewards_GF, trainer)
    assert has_gradient(rewards_GF, weights, "sum_then_normalize", [True] * 6) == bool(advantages_G.any())
