"""Dealing trajectories to ranks: equal work, no row lost, the same gradient."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import save_random_model
from tests.support.even_run import KINDS
from tests.support.two_ranks import run_ranks
from trl_search.trainer.even_micro_batches import deal, joined, tokens_to_run

ORDERS = ("trl", "dealt")


@st.composite
def batches(draw):
    """The costs of a batch, and its numbers of ranks, micro-batches and optimizer steps."""
    ranks, steps, rows = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    micro_batches = steps * draw(st.integers(1, 4))
    number = ranks * micro_batches * rows
    costs = draw(st.lists(st.integers(0, 5000), min_size=number, max_size=number))
    return costs, ranks, micro_batches, steps


@given(batches())
def test_every_row_is_dealt_once_to_places_of_equal_size(batch):
    costs, ranks, micro_batches, steps = batch
    dealt = deal(costs, ranks, micro_batches, steps, random.Random(0))
    assert len(dealt) == ranks and all(len(places) == micro_batches for places in dealt)
    size = len(costs) // (ranks * micro_batches)
    assert all(len(rows) == size for places in dealt for rows in places)
    assert sorted(row for places in dealt for rows in places for row in rows) == list(range(len(costs)))


def waited_for(costs, dealt):
    """The tokens that all ranks wait for: those of the slowest in each micro-batch."""
    micro_batches = zip(*dealt, strict=True)
    return sum(max(sum(costs[row] for row in rows) for rows in together) for together in micro_batches)


def a_batch_of_costs(silent):
    """512 trajectories in groups of 8; in a part of the groups no trajectory runs."""
    draw = random.Random(1)
    costs = [draw.randint(100, 3000) for _ in range(512)]
    for group in range(0, 512, 8):
        if draw.random() < silent:
            costs[group : group + 8] = [0] * 8
    return costs


@pytest.mark.parametrize(("silent", "steps", "waits"), [(0.0, 1, 1.02), (0.5, 1, 1.02), (0.5, 4, 1.05)])
def test_ranks_hardly_wait(silent, steps, waits):
    """Four ranks, 16 micro-batches of 8."""
    costs = a_batch_of_costs(silent)
    ideal = sum(costs) / 4
    in_order = [
        [list(range(first, first + 8)) for first in range(128 * rank, 128 * rank + 128, 8)] for rank in range(4)
    ]
    assert waited_for(costs, in_order) > 1.1 * ideal
    assert waited_for(costs, deal(costs, 4, 16, steps, random.Random(0))) < waits * ideal


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_every_optimizer_step_gets_rows_of_all_lengths(rows):
    """Also with one row per micro-batch, when rows of one length lie together on all ranks."""
    costs, steps, size = a_batch_of_costs(silent=0.5), 8, 512 // 8
    dealt = deal(costs, 4, 128 // rows, steps, random.Random(0))
    per_step = 128 // rows // steps
    tokens, long, silent = [], [], []
    for first in range(0, 128 // rows, per_step):
        taken = [costs[row] for places in dealt for rows in places[first : first + per_step] for row in rows]
        assert len(taken) == size
        tokens.append(sum(taken))
        long.append(sum(cost > 1500 for cost in taken))
        silent.append(taken.count(0))
    assert max(silent) - min(silent) <= 1 and max(long) - min(long) <= 1
    assert max(tokens) < 1.05 * min(tokens)


def test_every_row_may_come_in_any_step():
    costs = list(range(16))
    first = [deal(costs, 2, 8, 8, random.Random(seed)) for seed in range(200)]
    assert {row for dealt in first for places in dealt for row in places[0]} == set(range(16))


def a_batch(**more):
    return {
        "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1], [1, 0, 0]]),
        "num_items_in_batch": torch.tensor(3),
        **more,
    }


def test_the_tokens_that_run():
    silent = a_batch(advantages=torch.tensor([0.0, 1.0]))
    assert tokens_to_run(silent, all_run=False).tolist() == [0, 3]
    assert tokens_to_run(silent, all_run=True).tolist() == [4, 3]
    # An advantage on an observation alone is not in the loss.
    per_token = a_batch(advantages=torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    assert tokens_to_run(per_token, all_run=False).tolist() == [0, 3]


def test_a_trajectory_without_a_token_in_the_loss_does_not_run():
    failed = a_batch(advantages=torch.tensor([1.0, 1.0]), tool_mask=torch.tensor([[0, 0, 0], [1, 0, 0]]))
    assert tokens_to_run(failed, all_run=True).tolist() == [0, 3]


def test_an_unknown_entry_is_an_error():
    with pytest.raises(ValueError, match="token_type_ids"):
        joined([a_batch(token_type_ids=torch.zeros(2, 5))])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer):
    """What both ranks did in TRL's order and dealt, without and with log-probs of old policies."""
    folder = tmp_path_factory.mktemp("even")
    save_random_model(folder / "model", tokenizer)
    run_ranks("tests.support.even_run", [str(folder)], folder)
    return {
        kind: {order: [torch.load(folder / f"{kind}-{order}-{rank}.pt") for rank in range(2)] for order in ORDERS}
        for kind in KINDS
    }


@pytest.fixture(params=["plain", "old"])
def ranks(request, runs):
    return runs[request.param]


@pytest.mark.slow
def test_the_ranks_train_on_the_same_rows(ranks):
    """Tokens, masks, advantages and log-probs stay together, and padding is not in the loss."""
    for step in range(2):  # the second optimizer step of "old" is on the same batch
        rows = {
            order: sorted(
                row for rank in both for rows in rank["micro_batches"][4 * step : 4 * step + 4] for row in rows
            )
            for order, both in ranks.items()
        }
        assert len(rows["trl"]) == 16 and rows["trl"] == rows["dealt"]
    assert ranks["trl"][0]["micro_batches"] != ranks["dealt"][0]["micro_batches"]


@pytest.mark.slow
def test_the_gradient_stays_the_same(ranks):
    for rank in range(2):
        for theirs, ours in zip(ranks["trl"][rank]["logged"], ranks["dealt"][rank]["logged"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
            assert theirs["grad_norm"] > 0
        for name, weight in ranks["trl"][rank]["weights"].items():
            torch.testing.assert_close(ranks["dealt"][rank]["weights"][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_both_ranks_run_as_many_tokens(runs):
    def tokens(rank):
        return [
            sum(len(prompt) + len(completion) for prompt, completion, _, advantage in rows if advantage)
            for rows in rank["micro_batches"]
        ]

    waited = {
        order: sum(max(pair) for pair in zip(tokens(both[0]), tokens(both[1]), strict=True))
        for order, both in runs["plain"].items()
    }
    assert waited["dealt"] < 0.85 * waited["trl"]


@pytest.mark.slow
def test_every_optimizer_step_of_a_batch_trains(runs):
    """Four steps of two micro-batches with one row; many rows have no advantage."""
    ranks = [rank["micro_batches"] for rank in runs["steps"]["dealt"]]
    advantages = [
        [row[3] for rank in ranks for rows in rank[first : first + 2] for row in rows] for first in range(0, 8, 2)
    ]
    trained = [sum(advantage != 0 for advantage in step) for step in advantages]
    assert 4 <= sum(trained) < 12
    assert max(trained) - min(trained) <= 1
