"""Two hosts with one rank each, over gloo: rollouts with different numbers of turns and durations.

Both ranks run tests/support/distributed_run.py once, in the environment that torch's launcher would set (rank 1 is
local rank 0 of its host). The tests below read what they wrote.
"""

from __future__ import annotations

import json
import statistics

import pytest

from tests.conftest import save_random_model
from tests.support.distributed_run import value
from tests.support.two_ranks import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tokenizer):
    """The results of rank 0 and rank 1."""
    folder = tmp_path_factory.mktemp("distributed")
    save_random_model(folder / "model", tokenizer)
    run_ranks("tests.support.distributed_run", [str(folder)], folder, one_per_host=True)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_there_were_two_processes_over_gloo(ranks):
    assert [(rank["processes"], rank["backend"]) for rank in ranks] == [(2, "gloo")] * 2


def test_ranks_with_different_turns_and_durations_finish_every_step(ranks):
    assert [rank["scripted"]["turns"] for rank in ranks] == [[1, 1, 1], [2, 3, 4]]
    assert [len(rank["scripted"]["batches"]) for rank in ranks] == [3, 3]


def test_each_rank_keeps_its_own_trajectories(ranks):
    for number, rank in enumerate(ranks):
        for batch in rank["scripted"]["batches"]:
            # question-rank-number; the reward function checks on each rank that the question belongs to the row.
            assert [text.split("-", 1)[1] for text in batch["said"]] == [f"{number}-{i}" for i in range(3)]


def test_groups_split_over_ranks_get_the_right_advantages(ranks):
    for batches in zip(*(rank["scripted"]["batches"] for rank in ranks), strict=True):
        said = [text for batch in batches for text in batch["said"]]
        advantages = [advantage for batch in batches for advantage in batch["advantages"]]
        questions = [text.split("-")[0] for text in said]
        assert questions[0::2] == questions[1::2] and len(set(questions)) == 3
        for first in range(0, 6, 2):
            group = [value(text) for text in said[first : first + 2]]
            mean, deviation = statistics.mean(group), statistics.stdev(group)
            expected = [(reward - mean) / (deviation + 1e-4) for reward in group]
            assert advantages[first : first + 2] == pytest.approx(expected, abs=1e-4)


def test_rank_0_records_the_groups_of_both_ranks(ranks):
    recorded = ranks[0]["recorded"]
    assert recorded["problems"] == [] and recorded["steps"] == [1, 2, 3, 3] and "recorded" not in ranks[1]
    for step, batches in enumerate(zip(*(rank["scripted"]["batches"] for rank in ranks), strict=True), start=1):
        rows = [row for row in recorded["rows"] if row["step"] == step]
        assert [(row["index"], row["group"]) for row in rows] == [(i, i // 2) for i in range(6)]
        assert [row["answer"] for row in rows] == [text for batch in batches for text in batch["said"]]
        assert [row["reward"] for row in rows] == [value(row["answer"]) for row in rows]
        advantages = [advantage for batch in batches for advantage in batch["advantages"]]
        assert [row["advantage"] for row in rows] == pytest.approx(advantages, abs=1e-6)


def test_weights_are_the_same_on_both_ranks(ranks):
    for run in ("scripted", "real"):
        assert ranks[0][run]["weights"] == ranks[1][run]["weights"]
    assert ranks[0]["scripted"]["changed"]


def test_metrics_are_means_over_both_ranks(ranks):
    logged = ranks[0]["scripted"]["logged"]
    assert logged["search/turns"] == (1 + 1 + 1 + 2 + 3 + 4) / 6
    assert logged["search/searches"] == (1 + 2 + 3) / 6
    assert ranks[0]["evaluation"] == ranks[1]["evaluation"]


def test_questions_that_fill_the_last_batch_of_an_evaluation_do_not_count(ranks):
    measured = ranks[0]["uneven"]
    for name, mean in (("eval_one", 0), ("eval_four", (0 + 1 + 2 + 3) / 4), ("test", (0 + 1) / 2)):
        for metric in ("reward", "rewards/book_number/mean", "search/searches"):
            assert measured[f"{name}_{metric}"] == pytest.approx(mean), (name, metric)
    rewarded = {name: value for name, value in measured.items() if "reward" in name}
    assert rewarded == {name: value for name, value in ranks[1]["uneven"].items() if "reward" in name}


def test_ranks_draw_different_samples_of_the_same_prompt(ranks):
    sampled = [tuple(ids) for rank in ranks for ids in rank["real"]["ids"]]
    assert len(sampled) == len(set(sampled)) == 6


def test_too_many_failures_on_one_rank_stop_both(ranks):
    assert ranks[0]["stopped"] == ranks[1]["stopped"]
    assert "failed for 3 of 6 trajectories" in ranks[0]["stopped"] and "on fire" in ranks[0]["stopped"]
