"""The messages about the checkpoint from which a run is resumed."""

from __future__ import annotations

import pytest
from transformers.utils import logging as hf_logging

from tests.support.scripted_trainer import four_ways, scripted_trainer


@pytest.mark.parametrize("only_model", [True, False])
def test_a_checkpoint_without_its_optimizer_is_named_at_a_resume(
    tmp_path, random_model, tokenizer, caplog, only_model
):
    options = {"save_strategy": "steps", "save_steps": 1, "save_only_model": only_model}
    scripted_trainer(tmp_path, random_model, tokenizer, four_ways, max_steps=1, **options).train()
    assert not caplog.text.count("save_only_model")
    resumed = scripted_trainer(tmp_path, random_model, tokenizer, four_ways, max_steps=2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert caplog.text.count("was saved with save_only_model, so it has neither optimizer") == only_model


@pytest.mark.parametrize(("steps", "said"), [({"max_steps": 1}, 1), ({"max_steps": 2}, 1), ({"max_steps": 3}, 0)])
def test_a_resume_with_no_step_left_is_told(tmp_path, random_model, tokenizer, caplog, steps, said):
    """transformers ended it at once, and `trl-search train` printed its table as after a training."""
    options = {"save_strategy": "steps", "save_steps": 1}
    scripted_trainer(tmp_path, random_model, tokenizer, four_ways, max_steps=2, **options).train()
    assert "nothing is left to train" not in caplog.text
    resumed = scripted_trainer(tmp_path, random_model, tokenizer, four_ways, **steps, **options)
    resumed.train(resume_from_checkpoint="last")
    assert caplog.text.count("nothing is left to train: the checkpoint is of step 2") == said


def test_a_tied_weight_is_not_called_missing_at_a_resume(tmp_path, random_model, tokenizer, caplog):
    options = {"save_strategy": "steps", "save_steps": 1}
    hf_logging.enable_propagation()
    try:
        for steps in (1, 2):
            trainer = scripted_trainer(tmp_path, random_model, tokenizer, four_ways, max_steps=steps, **options)
            trainer.train(resume_from_checkpoint=steps > 1)
    finally:
        hf_logging.disable_propagation()
    assert trainer.state.global_step == 2 and "missing keys" not in caplog.text
