"""Datasets that are set after the constructor."""

from __future__ import annotations

import pytest
from datasets import Dataset

from tests.support.scripted_trainer import DATA, ROWS, real_trainer
from trl_search.common.errors import UserError


def test_datasets_may_be_set_after_the_constructor(tmp_path, random_model, tokenizer):
    """As for a second stage on harder questions."""
    trainer = real_trainer(
        tmp_path, random_model, tokenizer, max_steps=1, curriculum="pass_rate", trainer={"eval_dataset": DATA}
    )
    trainer.train()
    second = Dataset.from_list([{**row, "question": f"Second stage, {i}?"} for i, row in enumerate(ROWS)])
    trainer.train_dataset, trainer.eval_dataset = second, second.select([0])
    trainer.train()
    assert trainer.last_rollout.rows[0]["question"].startswith("Second stage")
    assert trainer.question_choice.dataset is trainer.train_dataset
    trainer.evaluate()
    assert {row["question"] for row in trainer.last_rollout.rows} == {"Second stage, 0?"}
    trainer.train_dataset = second.remove_columns("question")
    with pytest.raises(UserError, match="train_dataset needs a column 'question'"):
        trainer.train()
    trainer.eval_dataset = second.add_column("prompts", ["x"] * len(second))
    with pytest.raises(UserError, match="eval_dataset has the column 'prompts'"):
        trainer.evaluate()
