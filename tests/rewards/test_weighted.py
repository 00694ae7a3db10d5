"""Sums of weighted rewards, and whether a sum differs from the mean of its group by more than a rounding error."""

from __future__ import annotations

import math

import pytest
import torch

from trl_search.rewards.weighted import deviations, weighted_rewards

NAN = math.nan


def test_a_sum_is_over_the_rewards_that_are_not_nan():
    rewards = torch.tensor([[1.0, 0.5], [1.0, NAN], [NAN, NAN]])
    sums = weighted_rewards(rewards, torch.tensor([1.0, 0.5]))
    assert sums.tolist() == pytest.approx([1.25, 1.0, NAN], nan_ok=True)
    assert weighted_rewards(rewards[0], torch.tensor([1.0, 0.5], dtype=torch.float64)).item() == 1.25


@pytest.mark.parametrize(
    "rewards",
    [
        [[1.3]] * 8,  # their mean in float32 is not 1.3
        [[0.1]] * 3,
        [[0.7, 0.6], [0.9, 0.2], [1.0, 0.0]],
        [[1e5 * 0.7, 1e5 * 0.6], [1e5 * 0.9, 1e5 * 0.2], [1e5, 0.0]],
        [[1e-7 * 0.7, 1e-7 * 0.6], [1e-7 * 0.9, 1e-7 * 0.2], [1e-7, 0.0]],
        [[1.0, -2.0], [0.3, -0.6], [0.0, 0.0]],
        [[NAN, NAN], [1.3, NAN], [1.3, NAN]],
        [[NAN, NAN], [NAN, NAN], [0.3, NAN]],
        [[NAN, NAN], [NAN, NAN], [NAN, NAN]],
    ],
)
def test_sums_that_differ_by_rounding_do_not_deviate(rewards):
    found = deviations(torch.tensor(rewards), torch.tensor([1.0, 0.5][: len(rewards[0])]), len(rewards))
    unrewarded = [all(map(math.isnan, row)) for row in rewards]
    assert found.isnan().tolist() == unrewarded and found.nan_to_num().tolist() == [0.0] * len(rewards)


@pytest.mark.parametrize("size", [1e-9, 1e-7, 1.0, 1e5])
def test_a_difference_of_any_size_deviates(size):
    found = deviations(size * torch.tensor([[1.0], [0.0], [1.0], [1 - 1e-5]]), torch.ones(1), 2)
    assert found.tolist() == pytest.approx([size / 2, -size / 2, size * 5e-6, -size * 5e-6], rel=0.01)


def test_a_reward_at_the_mean_of_its_group_does_not_deviate():
    found = deviations(torch.tensor([[0.1], [0.2], [0.3]]), torch.ones(1), 3).tolist()
    assert found[1] == 0 and found[0] == pytest.approx(-0.1) and found[2] == pytest.approx(0.1)
