"""Resuming with other questions or batches, which transformers does without a word."""

from __future__ import annotations

import pytest
from datasets import Dataset

from tests.conftest import make_random_model
from tests.support.scripted_trainer import ROWS, real_trainer
from trl_search.common.errors import UserError
from trl_search.trainer.groups.question_order import KeepsOrder

SAVES = {"save_strategy": "steps", "save_steps": 1}
OTHERS = Dataset.from_list([{**row, "question": row["question"] + " Please."} for row in ROWS])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """After one step, on one of the eight questions."""
    folder = tmp_path_factory.mktemp("order")
    real_trainer(folder, make_random_model(tokenizer), tokenizer, max_steps=1, **SAVES).train()
    return folder / "checkpoint-1"


def resume(checkpoint, folder, random_model, tokenizer, **options):
    """The questions that a resumed run asks in its first batch."""
    trainer = real_trainer(folder, random_model, tokenizer, max_steps=2, **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return [row["question"] for row in trainer.last_rollout.rows][::4]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"per_device_train_batch_size": 8}, r"\(questions per batch: 1 then, 2 now\)"),
        ({"num_iterations": 2}, r"\(steps per batch: 1.0 then, 2.0 now\)"),
        ({"seed": 2}, r"\(seed: 1 then, 2 now\)"),
        ({"data": OTHERS}, r"\(the questions differ\)"),
        ({"data": OTHERS.select(range(7))}, r"\(number of questions: 8 then, 7 now\)"),
    ],
)
def test_another_order_is_refused(checkpoint, tmp_path, random_model, tokenizer, options, said):
    with pytest.raises(UserError, match=rf"checkpoint-1 was trained with other questions or batches {said}.*twice"):
        resume(checkpoint, tmp_path, random_model, tokenizer, **options)


def test_what_leaves_the_order_as_it_is_may_change(checkpoint, tmp_path, random_model, tokenizer):
    """Half the processes with twice the steps of accumulation, another temperature, another prompt."""
    whole = real_trainer(tmp_path / "whole", random_model, tokenizer)
    whole.train()
    changed = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    changed |= {"temperature": 0.5, "instruction": "Search first."}
    asked = resume(checkpoint, tmp_path, random_model, tokenizer, **changed)
    assert asked == [row["question"] for row in whole.last_rollout.rows][::4]


def test_a_user_may_begin_the_questions_again(checkpoint, tmp_path, random_model, tokenizer):
    options = {"per_device_train_batch_size": 8, "ignore_data_skip": True}
    assert len(resume(checkpoint, tmp_path, random_model, tokenizer, **options)) == 2


def test_a_checkpoint_of_an_earlier_version_is_resumed(checkpoint, tmp_path, random_model, tokenizer):
    order = (checkpoint / KeepsOrder.order_file).read_text()
    (checkpoint / KeepsOrder.order_file).unlink()
    try:
        assert resume(checkpoint, tmp_path, random_model, tokenizer, seed=2)
    finally:
        (checkpoint / KeepsOrder.order_file).write_text(order)
