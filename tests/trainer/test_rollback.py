"""After a collapse the training goes on from the best checkpoint with half the learning rate, twice, and then ends."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.support.scripted_trainer import steps
from tests.trainer.callbacks.test_held_out import held_out_trainer
from trl_search.trainer.callbacks.alarms import RULES
from trl_search.trainer.rollback import set_learning_rate

COLLAPSES_AT = 6  # five logs make a level, and the alarm below ends the training when it has lasted two


@pytest.fixture
def soon(monkeypatch):
    """An alarm that rings as soon as a level is known."""
    rule = dataclasses.replace(next(rule for rule in RULES if rule.name == "malformed"), rises=0.0, beyond=0.1)
    monkeypatch.setattr("trl_search.trainer.callbacks.alarms.RULES", (rule,))
    monkeypatch.setattr("trl_search.trainer.callbacks.alarms.STOP_AFTER", 2)


def test_a_collapsed_run_goes_back_to_its_best_checkpoint_twice(tmp_path, tokenizer, soon, caplog):
    trainer, _ = held_out_trainer(
        tmp_path, tokenizer, lambda step: 4 if step == 2 else 1, max_steps=20, on_collapse="rollback"
    )
    trainer.train()
    said = [record.getMessage() for record in caplog.records if "rollback" in record.getMessage()]
    assert [line.split(":")[0] for line in said] == ["rollback 1 of 2", "rollback 2 of 2"]
    assert "checkpoint-2, learning rate 0.005" in said[0] and "checkpoint-2, learning rate 0.0025" in said[1]
    assert trainer.state.global_step == COLLAPSES_AT and trainer.state.best_global_step == 2
    # What came after the checkpoint is taken again, at a quarter of the learning rate.
    assert [row["step"] for row in steps(trainer)] == [1, 2, 3, 4, 5, 6]
    assert [row["learning_rate"] for row in steps(trainer)] == [0.01] * 2 + [0.0025] * 4
    assert [row["eval/em"] for row in steps(trainer)] == [0.5, 1.0, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(("choice", "last"), [("stop", COLLAPSES_AT), ("warn", 8)])
def test_without_a_rollback_it_stops_or_goes_on(tmp_path, tokenizer, soon, choice, last):
    trainer, _ = held_out_trainer(tmp_path, tokenizer, lambda step: 1, max_steps=8, on_collapse=choice)
    trainer.train()
    assert trainer.state.global_step == last


def test_a_schedule_goes_on_where_it_is_with_another_peak():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 10))
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    set_learning_rate(optimizer, scheduler, 0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.2])
