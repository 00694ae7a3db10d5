"""`trainer.train()` after an earlier training of the same trainer, as in a notebook."""

from __future__ import annotations

import logging

import pytest
from transformers import TrainerCallback

from tests.support.scripted_trainer import real_trainer, steps


class InterruptAt(TrainerCallback):
    """Ctrl-C in the N-th micro-step."""

    def __init__(self, substep):
        self.left = substep

    def on_substep_end(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def generations(trainer):
    """The optimizer step and the micro-step of each rollout from now on."""
    found, generate = [], trainer._generate_and_score_completions

    def noted(inputs):
        found.append((trainer.state.global_step, trainer._step))
        return generate(inputs)

    trainer._generate_and_score_completions = noted
    return found


def test_a_training_after_an_interrupt_begins_with_a_rollout(tmp_path, random_model, tokenizer):
    """Otherwise it would train on the rest of the interrupted batch, and then on batches that straddle its steps."""
    trainer = real_trainer(
        tmp_path, random_model, tokenizer, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    trainer.add_callback(InterruptAt(5))
    found = generations(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert found == [(0, 0), (1, 4)]
    found.clear()
    trainer.train()
    assert found == [(0, 0), (1, 4)] and trainer.state.global_step == 2


def test_a_second_training_begins_with_a_rollout(tmp_path, random_model, tokenizer):
    trainer = real_trainer(tmp_path, random_model, tokenizer, num_iterations=2, max_steps=3)
    found = generations(trainer)
    trainer.train()
    trainer.train()
    assert found == [(0, 0), (2, 2)] * 2


def test_a_reward_that_failed_leaves_no_rows_to_the_next_training(tmp_path, random_model, tokenizer):
    broken = [True]

    def reward(completions, log_extra, log_metric, **kwargs):
        log_extra("length", [0] * len(completions))
        log_metric("calls", 5.0 if broken else 1.0)
        if broken:
            raise OSError("the judge is down")
        return [float(i) for i in range(len(completions))]

    trainer = real_trainer(
        tmp_path,
        random_model,
        tokenizer,
        rewards=reward,
        max_steps=1,
        log_completions=True,
        num_completions_to_print=0,
    )
    with pytest.raises(OSError, match="the judge is down"):
        trainer.train()
    broken.clear()
    trainer.train()
    assert steps(trainer)[0]["calls"] == 1.0


def test_the_checkpoint_of_the_configuration_is_resumed(tmp_path, random_model, tokenizer, caplog):
    real_trainer(tmp_path, random_model, tokenizer, save_strategy="steps", save_steps=1).train()
    resumed = real_trainer(tmp_path, random_model, tokenizer, max_steps=3, resume_from_checkpoint="last")
    found = generations(resumed)
    with caplog.at_level(logging.WARNING):
        resumed.train()
    assert [step for step, _ in found] == [2] and "belonged to another run" not in caplog.text
    assert not (tmp_path / "earlier").exists()
    resumed.train(resume_from_checkpoint=False)
    assert (tmp_path / "earlier/1/run.json").is_file()
