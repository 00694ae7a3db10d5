"""The settings and the learning rate of a resumed run's optimizer."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch.optim import lr_scheduler

from tests.support.scripted_trainer import four_ways, scripted_trainer
from trl_search.common.errors import UserError

SAVING = {"save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("learning_rate", 5e-3, "learning_rate: 0.005 has no effect: a resumed run .* of its checkpoint, 0.01. To"),
        ("weight_decay", 0.1, r"weight_decay: 0.1 has no effect.*, 0.0. To"),
        ("adam_beta2", 0.95, r"adam_beta1 and adam_beta2: \(0.9, 0.95\) has no effect.*, \(0.9, 0.999\). To"),
        ("adam_epsilon", 1e-6, r"adam_epsilon: 1e-06 has no effect.*, 1e-08. To"),
    ],
)
def test_other_settings_of_the_optimizer_have_no_effect_at_a_resume_and_this_is_said(
    tmp_path, random_model, tokenizer, caplog, key, value, told
):
    options = {**SAVING, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    scripted_trainer(tmp_path, random_model, tokenizer, four_ways, max_steps=1, **options).train()
    options |= {"max_steps": 2}
    scripted_trainer(tmp_path, random_model, tokenizer, four_ways, **options).train(resume_from_checkpoint="last")
    assert "has no effect" not in caplog.text
    changed = scripted_trainer(tmp_path, random_model, tokenizer, four_ways, **options | {key: value})
    changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert re.search(told, caplog.text) and caplog.text.count("has no effect") == 1


@pytest.mark.parametrize(("first", "then"), [("adamw_torch", "adafactor"), ("sgd", "adamw_torch")])
def test_the_checkpoint_of_another_optimizer_is_refused(tmp_path, random_model, tokenizer, first, then):
    """The first step ended with a KeyError, after its rollout."""
    scripted_trainer(tmp_path, random_model, tokenizer, four_ways, max_steps=1, optim=first, **SAVING).train()
    resumed = scripted_trainer(tmp_path, random_model, tokenizer, four_ways, max_steps=2, optim=then, **SAVING)
    with pytest.raises(UserError, match=f"optim: {then} cannot continue this checkpoint, .*with the optim"):
        resumed.train(resume_from_checkpoint="last")


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


def own(rate, schedule=None):
    """A user's optimizer, and perhaps a schedule."""

    def make(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        return optimizer, schedule and schedule(optimizer)

    return make


@pytest.mark.parametrize(
    "make",
    [
        own(0.1, lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.5)),
        own(0.1, lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))),
        own(0.1, lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)),
        own(torch.tensor(0.1)),
    ],
    ids=["multiplicative", "lambda", "one_cycle", "tensor"],
)
def test_a_users_own_optimizer_is_resumed_without_a_word(tmp_path, random_model, tokenizer, caplog, make):
    """The multiplicative schedule's factor of one step was taken for that of all; a rate in a tensor equalled none."""
    options = {**SAVING, "logging_steps": 1, "max_steps": 3}
    whole, resumed = (
        scripted_trainer(tmp_path, model, tokenizer, four_ways, trainer={"optimizers": make(model)}, **options)
        for model in (random_model, copy.deepcopy(random_model))
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rates(resumed) == rates(whole)
    assert "another schedule" not in caplog.text and "has no effect" not in caplog.text
