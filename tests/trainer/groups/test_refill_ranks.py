"""Two gloo processes: one replaces its groups twice, the other never, and neither waits for the other."""

from __future__ import annotations

import json

import pytest

from tests.conftest import save_random_model
from tests.support.two_ranks import output, start_ranks, wait_for_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("refill")
    save_random_model(folder / "model", tokenizer)
    processes = start_ranks("tests.support.refill_run", [str(folder)], folder)
    assert wait_for_ranks(processes, folder, timeout_s=300) == [0, 0], output(folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_each_rank_replaces_its_own_groups_and_both_end_with_whole_batches(ranks):
    assert [rank["processes"] for rank in ranks] == [2, 2]
    assert [rank["replaced"] for rank in ranks] == [[0, 0], [2, 2]]
    assert ranks[1]["asked"] == ranks[1]["spare"][1]  # the questions of the second round
    assert ranks[0]["weights"] == ranks[1]["weights"]


def test_metrics_cover_both_ranks(ranks):
    logged = ranks[0]["logged"]
    assert (logged["refill/gradient_before"], logged["refill/gradient_after"]) == (0.5, 1)
    assert (logged["refill/extra_trajectories"], logged["refill/rounds"]) == (8, 2)
    assert logged["frac_reward_zero_std"] == 0


def test_both_ranks_know_all_pass_rates_and_draw_different_questions(ranks):
    assert ranks[0]["weights_N"] == ranks[1]["weights_N"] and ranks[0]["visits"] == ranks[1]["visits"] > 8
    drawn = [number for rank in ranks for questions in rank["spare"] for number in questions]
    assert len(drawn) == len(set(drawn)) == 16


def test_resumed_ranks_draw_the_same_questions(ranks):
    for rank in ranks:
        assert rank["resumed"] == {name: rank[name] for name in ("asked", "spare", "visits", "weights_N")}


def test_groups_that_straddle_ranks_are_refused(ranks):
    for rank in ranks:
        assert "num_generations=2 does not divide the 3 trajectories per process" in rank["refused"]


def test_ranks_with_other_questions_are_refused(ranks):
    """A group that is spread over ranks would mix questions."""
    for rank in ranks:
        assert "the same in another order: load and shuffle them in each process in the same way" in rank["shuffled"]
