"""After a collapse, training continues from the best checkpoint with half the learning rate, twice, and then ends."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests.conftest import make_random_model
from tests.support.scripted_trainer import config, real_trainer, steps
from tests.trainer.callbacks.test_held_out import held_out_trainer
from trl_search.common.errors import UserError
from trl_search.records.folder import read_trajectories
from trl_search.records.rollbacks import rollbacks_of
from trl_search.trainer.callbacks.alarms import RULES
from trl_search.trainer.resume import checkpoint_to_resume
from trl_search.trainer.rollback import set_learning_rates

pytestmark = pytest.mark.slow

COLLAPSES_AT = 6  # five logs make a level, and an alarm that lasts two logs ends the training


@pytest.fixture
def soon(monkeypatch):
    """An alarm that fires as soon as a level is known."""
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
    # The steps after the checkpoint are repeated at a quarter of the learning rate.
    assert [row["step"] for row in steps(trainer)] == [1, 2, 3, 4, 5, 6]
    assert [row["learning_rate"] for row in steps(trainer)] == [0.01] * 2 + [0.0025] * 4
    assert [row["eval/em"] for row in steps(trainer)] == [0.5, 1.0, 0.5, 0.5, 0.5, 0.5]


def test_a_run_killed_after_a_rollback_is_resumed_in_the_same_way(tmp_path, tokenizer, soon, caplog):
    options = {"max_steps": 20, "on_collapse": "rollback", "save_strategy": "steps", "save_steps": 1}
    killed, _ = held_out_trainer(tmp_path, tokenizer, lambda step: 4 if step == 2 else 1, **options)
    killed.add_callback(KilledAfter(rollbacks=1, step=3))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    # Steps 4 to 6 collapsed: their checkpoints exist, but the run is not resumed from them.
    assert (tmp_path / "checkpoint-6").is_dir()
    last = checkpoint_to_resume("last", tmp_path)
    assert last == str(tmp_path / "checkpoint-3")
    caplog.clear()
    resumed, _ = held_out_trainer(tmp_path, tokenizer, lambda step: 1, **options)
    resumed.train(last)
    said = [record.getMessage() for record in caplog.records if "rollback" in record.getMessage()]
    assert len(said) == 1 and "rollback 2 of 2" in said[0] and "checkpoint-2, learning rate 0.0025" in said[0]
    assert [one["to"] for one in rollbacks_of(tmp_path)] == [2, 2]
    # If killed right after a rollback, it starts from the best checkpoint with the learning rate of the rollback.
    for step in range(3, 7):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    again, _ = held_out_trainer(tmp_path, tokenizer, lambda step: 1, **{**options, "max_steps": 3})
    again.train(checkpoint_to_resume("last", tmp_path))
    assert [row["learning_rate"] for row in steps(again)] == [0.01] * 2 + [0.0025]
    # A new run in the folder has no rollbacks.
    new, _ = held_out_trainer(tmp_path, tokenizer, lambda step: 1, **{**options, "max_steps": 1})
    new.train()
    assert rollbacks_of(tmp_path) == []


@pytest.mark.parametrize("max_steps", [4, 9], ids=["in the last step", "on the way"])
def test_a_run_whose_held_out_em_has_halved_goes_back_at_once(tmp_path, tokenizer, max_steps):
    trainer, _ = held_out_trainer(
        tmp_path, tokenizer, lambda step: 0 if step == 4 else 4, every=2, max_steps=max_steps, on_collapse="rollback"
    )
    trainer.train()
    assert [(one["step"], one["to"]) for one in rollbacks_of(tmp_path)] == [(4, 2), (4, 2)]
    assert trainer.state.global_step == 4, "the third collapse ends the run"


def test_a_script_that_keeps_no_best_checkpoint_is_told(tmp_path, random_model, tokenizer, caplog):
    with caplog.at_level("WARNING"):
        trainer, _ = held_out_trainer(
            tmp_path / "best", tokenizer, lambda step: 1, max_steps=1, on_collapse="rollback"
        )
        trainer.train()
        assert "keeps a best checkpoint" not in caplog.text
        real_trainer(tmp_path / "none", random_model, tokenizer, max_steps=1, on_collapse="rollback").train()
    assert "cannot go back, because no callback keeps a best checkpoint" in caplog.text


def test_an_optimizer_of_the_users_own_is_refused_under_deepspeed(tmp_path, tokenizer):
    trainer, _ = held_out_trainer(tmp_path, tokenizer, lambda step: 1, on_collapse="rollback")
    trainer.is_deepspeed_enabled = True
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters())
    with pytest.raises(UserError, match=r"makes a new optimizer under DeepSpeed.*leave `optimizers` out"):
        trainer.train()


def test_an_alarm_starts_again_after_a_rollback(tmp_path, tokenizer, soon):
    """The alarm was already firing at the step of the best checkpoint, but the lower learning rate gets its time."""
    trainer, _ = held_out_trainer(
        tmp_path, tokenizer, lambda step: 4 if step == COLLAPSES_AT else 1, max_steps=20, on_collapse="rollback"
    )
    trainer.train()
    assert [one["step"] for one in rollbacks_of(tmp_path)] == [COLLAPSES_AT, COLLAPSES_AT + 2]
    assert trainer.state.global_step == COLLAPSES_AT + 2


def test_the_latest_checkpoint_excludes_those_given_up_by_a_rollback(tmp_path, tokenizer, soon):
    """`train(resume_from_checkpoint=True)` of transformers uses the same checkpoint as `last` in a recipe."""
    options = {"max_steps": 20, "on_collapse": "rollback", "save_strategy": "steps", "save_steps": 1}
    killed, _ = held_out_trainer(tmp_path, tokenizer, lambda step: 4 if step == 2 else 1, **options)
    killed.add_callback(KilledAfter(rollbacks=1, step=3))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed, _ = held_out_trainer(tmp_path, tokenizer, lambda step: 1, **{**options, "max_steps": 4})
    resumed.train(resume_from_checkpoint=True)
    assert [row["learning_rate"] for row in steps(resumed)] == [0.01] * 2 + [0.005] * 2


class KilledAfter(TrainerCallback):
    """Ctrl-C at the end of a step, after the given number of rollbacks."""

    def __init__(self, *, rollbacks, step):
        self.rollbacks, self.step = rollbacks, step

    def on_save(self, args, state, control, **_):
        if len(rollbacks_of(Path(args.output_dir))) == self.rollbacks and state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_collapse_with_the_best_checkpoint_at_the_last_step_ends_the_run(tmp_path, tokenizer, soon, caplog):
    """A rollback would leave no steps, and transformers would take one step more than max_steps."""
    trainer, _ = held_out_trainer(
        tmp_path,
        tokenizer,
        lambda step: 4 if step == COLLAPSES_AT else 1,
        max_steps=COLLAPSES_AT,
        on_collapse="rollback",
    )
    trainer.train()
    assert trainer.state.global_step == COLLAPSES_AT and rollbacks_of(tmp_path) == []
    assert "the best checkpoint is that of the last step" in caplog.text


def test_a_run_resumed_after_its_last_step_takes_no_more_steps(tmp_path, tokenizer):
    """For example one that was killed during its final evaluation."""
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    held_out_trainer(tmp_path, tokenizer, lambda step: 1, **options)[0].train()
    resumed, _ = held_out_trainer(tmp_path, tokenizer, lambda step: 1, **options)
    resumed.train("last")
    assert resumed.state.global_step == 2 and [row["step"] for row in steps(resumed)] == [1, 2]


def test_every_learning_rate_of_a_users_optimizer_is_halved(tmp_path, tokenizer):
    model = make_random_model(tokenizer)
    first, *others = model.parameters()
    groups = [{"params": [first], "lr": 1e-3}, {"params": others, "lr": 1e-4}]
    options = {"model": model, "trainer": {"optimizers": (torch.optim.AdamW(groups), None)}}
    trainer, _ = held_out_trainer(tmp_path, tokenizer, once_good, max_steps=6, on_collapse="rollback", **options)
    trainer.train()
    assert len(rollbacks_of(tmp_path)) == 2
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([2.5e-4, 2.5e-5])


def test_a_repeated_step_records_the_trajectories_of_its_second_run(tmp_path, tokenizer):
    """The run goes back by one step, so the next step has the number of the last one that was recorded."""
    trainer, _ = held_out_trainer(tmp_path, tokenizer, once_good, max_steps=6, on_collapse="rollback")
    trainer.train()
    assert [(one["step"], one["to"]) for one in rollbacks_of(tmp_path)] == [(4, 3)] * 2
    rows = read_trajectories(tmp_path, [4])
    assert rows["index"].to_pylist() == [0, 1, 2, 3]


def test_after_a_rollback_a_batch_of_several_steps_is_sampled_again(tmp_path, tokenizer):
    trainer, _ = held_out_trainer(
        tmp_path,
        tokenizer,
        lambda step: 0 if step == 3 and not rollbacks_of(tmp_path) else {2: 4}.get(step, 3),
        max_steps=4,
        on_collapse="rollback",
        num_iterations=2,
    )
    batches, score = [], trainer._generate_and_score_completions

    def counted(inputs):
        batches.append(trainer.state.global_step)
        return score(inputs)

    trainer._generate_and_score_completions = counted
    trainer.train()
    assert [(one["step"], one["to"]) for one in rollbacks_of(tmp_path)] == [(3, 2)]
    assert batches == [0, 2, 2], "steps 3 and 4 share a batch, like steps 1 and 2"


@pytest.mark.parametrize("option", [{"save_only_model": True}, {"sync_ref_model": True, "beta": 0.1}])
def test_options_that_a_rollback_could_not_restore_are_refused(tmp_path, option):
    with pytest.raises(UserError, match=f"(?s)on_collapse=rollback .*{next(iter(option))}"):
        config(tmp_path, on_collapse="rollback", **option)


def once_good(step):
    """The best score at step 3, zero at step 4."""
    return {3: 4, 4: 0}.get(step, 3)


def test_a_run_that_collapses_before_its_first_evaluation_cannot_go_back(tmp_path, tokenizer, caplog):
    """A warm-started policy fell from EM .567 to 0 in its first step, which used to be kept as the best checkpoint."""
    trainer, held_out = held_out_trainer(
        tmp_path, tokenizer, lambda step: 0 if step else 4, max_steps=4, on_collapse="rollback"
    )
    trainer.callback_handler.callbacks.insert(0, MeasuredBefore(held_out))
    trainer.train()
    assert trainer.state.global_step == 1 and rollbacks_of(tmp_path) == []
    assert "more than twice as high before training" in caplog.text


class MeasuredBefore(TrainerCallback):
    def __init__(self, held_out):
        self.held_out = held_out

    def on_train_begin(self, args, state, control, **_):
        self.held_out.measure()


@pytest.mark.parametrize(("choice", "last"), [("stop", COLLAPSES_AT), ("warn", 8)])
def test_other_values_of_on_collapse_stop_the_run_or_continue(tmp_path, tokenizer, soon, choice, last):
    trainer, _ = held_out_trainer(tmp_path, tokenizer, lambda step: 1, max_steps=8, on_collapse=choice)
    trainer.train()
    assert trainer.state.global_step == last


def test_a_schedule_continues_with_a_lower_peak():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 10))
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    set_learning_rates(optimizer, scheduler, [0.5])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.2])
