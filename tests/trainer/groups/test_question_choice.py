"""Draws of questions: by weight, and reproducible per batch."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset

from tests.support.scripted_trainer import config
from trl_search.protocols import load_protocol
from trl_search.trainer.batch import Rollout
from trl_search.trainer.groups.question_choice import QuestionChoice, draw_order
from trl_search.types import StopReason, Trajectory


def choice(tmp_path, tokenizer, *, rank=0, ranks=1, **options):
    rows = [{"question": f"Q{i}", "golden_answers": ["x"]} for i in range(60)]
    protocol = load_protocol("qwen_tools", tokenizer, instruction="")
    data = Dataset.from_list([{**row, "prompt": protocol.messages(row["question"])} for row in rows])
    args = config(tmp_path, num_generations=2, per_device_train_batch_size=8 // ranks, **options)
    accelerator = SimpleNamespace(process_index=rank, num_processes=ranks, device="cpu", gather=lambda tensor: tensor)
    return QuestionChoice(args, data, protocol, accelerator)


def batch(made, rank=0, ranks=1):
    rows = [dict(made.dataset[number]) for number in range(4) for _ in range(2)]
    here = len(rows) // ranks
    return Rollout(rows=rows[rank * here : (rank + 1) * here])


def never_answered():
    trajectory = Trajectory(prompt_ids=(1,))
    trajectory.finish(StopReason.TOKEN_BUDGET)
    return trajectory


def spare(made, step, **where):
    chosen = batch(made, **where)
    made.choose(chosen, step)
    return [[question.row["question"] for question in questions] for questions in chosen.spare]


def test_a_question_is_drawn_in_proportion_to_its_weight():
    weights = np.array([1.0, 0.25, 1.0, 0.0625])
    first = [draw_order(weights, np.random.default_rng(seed))[0] for seed in range(4000)]
    shares = np.bincount(first, minlength=4) / 4000
    assert shares == pytest.approx(weights / weights.sum(), abs=0.03)


def test_the_questions_of_each_round_depend_only_on_seed_and_step(tmp_path, tokenizer):
    drawn = spare(choice(tmp_path, tokenizer, refill_groups=3), step=5)
    assert [len(questions) for questions in drawn] == [4, 4, 4] and len({q for qs in drawn for q in qs}) == 12
    assert drawn == spare(choice(tmp_path, tokenizer, refill_groups=3), step=5)
    assert drawn != spare(choice(tmp_path, tokenizer, refill_groups=3), step=6)
    assert drawn != spare(choice(tmp_path, tokenizer, refill_groups=3, seed=2), step=5)


def test_a_second_batch_of_the_same_step_has_different_draws(tmp_path, tokenizer):
    made = choice(tmp_path, tokenizer, refill_groups=1)
    assert spare(made, step=0) != spare(made, step=0)


def test_two_ranks_draw_the_same_questions_as_one_process(tmp_path, tokenizer):
    alone = spare(choice(tmp_path, tokenizer, refill_groups=2), step=1)
    ranks = [
        spare(choice(tmp_path, tokenizer, rank=rank, ranks=2, refill_groups=2), step=1, rank=rank, ranks=2)
        for rank in range(2)
    ]
    assert [one + other for one, other in zip(*ranks, strict=True)] == alone


def test_questions_without_signal_are_replaced_per_group(tmp_path, tokenizer):
    made = choice(tmp_path, tokenizer, curriculum="pass_rate")
    before = batch(made)
    made.choose(before, 0)
    assert [row["question"] for row in before.rows] == ["Q0", "Q0", "Q1", "Q1", "Q2", "Q2", "Q3", "Q3"]
    for _ in range(4):
        made.pass_rates.learn([(made.dataset[1], [never_answered()] * 2)])
    put_back = 0
    for step in range(1, 41):
        after = batch(made)
        made.choose(after, step)
        questions = [row["question"] for row in after.rows]
        assert questions[::2] == questions[1::2]
        assert (questions[0], questions[4], questions[6]) == ("Q0", "Q2", "Q3")
        put_back += questions[2] != "Q1"
    assert put_back >= 33  # 15 of 16 times; about one draw in 60 is the question itself
