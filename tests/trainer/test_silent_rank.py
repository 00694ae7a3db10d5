"""Two gloo processes, one without any group with a gradient: the step equals that of one process with all groups."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import save_random_model
from tests.support.silent_rank_run import CASES, train, useful
from tests.support.two_ranks import run_ranks
from trl_search.trainer.loss.without_gradient import METRIC

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("silent")
    save_random_model(folder / "model", tokenizer)
    run_ranks("tests.support.silent_rank_run", [str(folder)], folder)
    return folder


def seen_by(folder, case):
    return [json.loads((folder / f"2_{rank}.json").read_text())[case] for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_one_rank_has_no_gradient_and_groups_are_not_split(folder, case):
    one, other = (rank["batches"] for rank in seen_by(folder, case))
    assert len(one) == len(other) == 2, "both ranks must finish both steps"
    for mine, theirs in zip(one, other, strict=True):
        assert mine["silent"] == [False] * 4 and theirs["silent"] == [True] * 4
        for books in (mine["books"], theirs["books"]):
            assert books[0::2] == books[1::2] and len(set(books)) == 2
        assert all(map(useful, mine["books"])) and not any(map(useful, theirs["books"]))


@pytest.mark.parametrize("case", CASES)
def test_the_tokens_of_the_silent_rank_are_counted(folder, case):
    one, other = (rank["batches"] for rank in seen_by(folder, case))
    for mine, theirs in zip(one, other, strict=True):
        assert (theirs["in_loss"] > 0) == (case != "failed")
        assert mine["num_items"] == theirs["num_items"] == mine["in_loss"] + theirs["in_loss"]


@pytest.mark.parametrize("case", CASES)
def test_weights_and_gradients_equal_those_of_one_process_with_all_groups(folder, case):
    whole = train(folder, case)
    before = torch.cat(
        [parameter.flatten() for parameter in AutoModelForCausalLM.from_pretrained(folder / "model").parameters()]
    )
    weights, one, other = (torch.load(folder / f"{case}_{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert torch.equal(one, other)
    moved = (weights - before).abs().max().item()
    assert moved > 1e-3
    torch.testing.assert_close(one, weights, atol=1e-4 * moved, rtol=1e-5)
    logged = seen_by(folder, case)[0]["logged"]
    for mine, theirs in zip(logged, whole["logged"], strict=True):
        assert mine[METRIC] == theirs[METRIC] == 0.5 and mine["grad_norm"] > 0
        for name in ("grad_norm", "loss", "reward", "entropy", "frac_reward_zero_std"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def test_only_the_silent_rank_refills(folder):
    for log in seen_by(folder, "refilled")[0]["logged"]:
        assert (log["refill/gradient_before"], log["refill/gradient_after"]) == (0.5, 0.5)
        assert (log["refill/rounds"], log["refill/extra_trajectories"]) == (2, 8)
