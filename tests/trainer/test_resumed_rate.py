"""The learning rate of a resumed run."""

from __future__ import annotations

import pytest

from tests.support.scripted_trainer import four_ways, scripted_trainer

SAVING = {"save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(("rate", "told"), [(1e-2, 0), (5e-3, 1)])
def test_another_learning_rate_has_no_effect_at_a_resume_and_this_is_said(
    tmp_path, random_model, tokenizer, caplog, rate, told
):
    scripted_trainer(tmp_path, random_model, tokenizer, four_ways, max_steps=1, **SAVING).train()
    resumed = scripted_trainer(tmp_path, random_model, tokenizer, four_ways, max_steps=2, learning_rate=rate, **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert caplog.text.count("has no effect: a resumed run continues with that of its checkpoint, 0.01.") == told


def rates(trainer):
    return [pytest.approx(row["learning_rate"]) for row in trainer.state.log_history if "learning_rate" in row]


@pytest.mark.parametrize(
    ("schedule", "expected", "told"),
    [
        ("linear", [1e-2, 5e-3, 5e-3, 2.5e-3], "from 0, with which"),
        ("constant", [1e-2] * 4, ""),
    ],
)
def test_a_finished_run_goes_on_with_the_schedule_of_more_steps(
    tmp_path, random_model, tokenizer, caplog, schedule, expected, told
):
    """After a linear schedule, the first step had the learning rate 0."""
    options = {**SAVING, "lr_scheduler_type": schedule, "logging_steps": 1}
    scripted_trainer(tmp_path, random_model, tokenizer, four_ways, max_steps=2, **options).train()
    resumed = scripted_trainer(tmp_path, random_model, tokenizer, four_ways, max_steps=4, **options)
    resumed.train(resume_from_checkpoint="last")
    assert rates(resumed) == expected
    assert ("another schedule: that one had max_steps=2" in caplog.text) == bool(told) and told in caplog.text


def test_a_stopped_run_is_resumed_on_the_same_schedule_without_a_word(tmp_path, random_model, tokenizer, caplog):
    options = {**SAVING, "lr_scheduler_type": "cosine", "logging_steps": 1, "max_steps": 3, "warmup_steps": 1}
    whole = scripted_trainer(tmp_path, random_model, tokenizer, four_ways, **options)
    whole.train()
    resumed = scripted_trainer(tmp_path, random_model, tokenizer, four_ways, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rates(resumed) == rates(whole) and "another schedule" not in caplog.text
