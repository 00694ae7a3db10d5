"""The reference adapter of a KL term: it is the policy at the start of the run, also after a resume."""

from __future__ import annotations

import logging
import zlib

import pytest
import torch
from peft import FourierFTConfig, LoraConfig, PeftModel
from transformers import Qwen2ForCausalLM

from tests.support.adapters import trained
from tests.support.scripted_trainer import real_trainer, steps
from tests.trainer.test_grpo import assert_equal_weights, weights


def by_text(completions, **kwargs):
    """A reward that depends on what was sampled."""
    return [zlib.crc32(str(turns).encode()) % 100 / 100 for turns in completions]


@pytest.fixture(params=["lora", "fourier"])
def adapter(request, tmp_path, random_model):
    """The folders of a base model and of a trained adapter."""
    random_model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2) if request.param == "lora" else FourierFTConfig(n_frequency=8, target_modules=["q_proj"])
    trained(random_model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def load(adapter):
    base, folder = adapter
    return PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(base), folder, is_trainable=True)


def test_the_reference_is_the_adapter_at_the_start(tmp_path, adapter, tokenizer):
    """TRL copies only weights whose name contains `.default.`, which FourierFT's does not."""
    model = real_trainer(tmp_path, load(adapter), tokenizer, beta=0.1).model
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        mine = model.eval()(input_ids=ids).logits
        model.set_adapter("ref")
        torch.testing.assert_close(model(input_ids=ids).logits, mine, atol=0, rtol=0)


def test_a_resumed_run_has_the_trained_adapter_and_its_reference(tmp_path, adapter, tokenizer):
    """transformers loads only the reference, as it is in a folder, so the policy began anew."""
    runs = []
    for folder, resumed in (("whole", None), ("resumed", tmp_path / "whole" / "checkpoint-2")):
        options = {"beta": 0.1, "max_steps": 3, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 2}
        run = real_trainer(tmp_path / folder, load(adapter), tokenizer, rewards=by_text, **options)
        run.train(resume_from_checkpoint=resumed and str(resumed))
        runs.append(run)
    assert steps(runs[0])[2]["kl"] == steps(runs[1])[2]["kl"] > 0
    assert_equal_weights(weights(runs[0].model), weights(runs[1].model))


def test_a_reference_that_no_checkpoint_contains_is_named_at_a_resume(tmp_path, random_model, tokenizer, caplog):
    random_model.save_pretrained(tmp_path / "base")
    for resumed in (None, str(tmp_path / "checkpoint-1")):
        model = Qwen2ForCausalLM.from_pretrained(tmp_path / "base")
        options = {"beta": 0.1, "sync_ref_model": True, "max_steps": 1 if resumed is None else 2, "save_steps": 1}
        trainer = real_trainer(tmp_path, model, tokenizer, save_strategy="steps", **options)
        with caplog.at_level(logging.WARNING, "trl_search"):
            trainer.train(resume_from_checkpoint=resumed)
        assert ("no checkpoint contains the reference model" in caplog.text) == (resumed is not None)
