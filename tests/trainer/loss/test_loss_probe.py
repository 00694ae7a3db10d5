"""The log-probs of the loss are correct for each family, packed and padded, or the run ends before its first step."""

from __future__ import annotations

import logging

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from trl.trainer.utils import add_fused_lm_head

from tests.support.miniatures import miniature
from tests.support.scripted_trainer import config, real_trainer, steps
from trl_search.common.errors import UserError
from trl_search.trainer.loss import attention
from trl_search.trainer.loss.attention import why_not_padding_free
from trl_search.trainer.loss.logprobs import make_logprobs
from trl_search.trainer.loss.probe import probed

PACKED = ("qwen2", "qwen3", "qwen3_moe", "llama", "smollm3", "gpt2", "opt")
PADDED_ONLY = ("qwen2_window", "mistral", "mixtral", "starcoder2", "phi3", "gemma3", "gemma2", "lfm2", "bloom")


def prepared(family, folder, requested):
    model = miniature(family)
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    args = config(folder, packed_attention=requested, temperature=0.7)
    return model, make_logprobs([model, None], args, Accelerator(cpu=True)), args


@pytest.mark.parametrize(
    ("family", "requested"), [*((f, "sdpa") for f in PACKED), *((f, "auto") for f in (*PACKED, *PADDED_ONLY))]
)
def test_log_probs_equal_the_models(family, requested, tokenizer, tmp_path):
    model, logprobs, args = prepared(family, tmp_path, requested)
    model.train()
    assert probed(logprobs, model, model, tokenizer, args) is logprobs
    assert model.training


@pytest.mark.parametrize("family", PADDED_ONLY)
def test_packing_is_refused_for_families_that_would_mix_trajectories(family, tmp_path):
    with pytest.raises(UserError, match="packed_attention='sdpa' does not work here"):
        prepared(family, tmp_path, "sdpa")


def leaky(lengths):
    """Attention in which every token of a pack sees all earlier ones."""
    return {"attention_mask": torch.ones(1, 1, sum(lengths), sum(lengths), dtype=torch.bool).tril()}


def test_packs_that_mix_trajectories_are_detected(tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(attention, "_PREFERRED", ("sdpa",))
    monkeypatch.setattr(
        "trl_search.trainer.loss.logprobs.attention_inputs", lambda name, lengths, device: leaky(lengths)
    )
    model, logprobs, args = prepared("llama", tmp_path, "sdpa")
    with pytest.raises(UserError, match=r"log-probs of the same 13 tokens differ.*set packed_attention: padded"):
        probed(logprobs, model, model, tokenizer, args)
    model, logprobs, args = prepared("llama", tmp_path, "auto")
    with caplog.at_level(logging.WARNING):
        assert probed(logprobs, model, model, tokenizer, args).attention == "padded"
    assert "padded instead of sdpa" in caplog.text


def test_absolute_positions_do_not_count_padding(tokenizer, tmp_path):
    """At learning rate 0, the policy, the old policy and the reference model are identical."""
    model = miniature("gpt2", vocab_size=len(tokenizer), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model.save_pretrained(tmp_path / "gpt2")
    data = [{"question": "who " * n, "golden_answers": ["x"]} for n in (1, 30)]
    trainer = real_trainer(
        tmp_path / "run",
        str(tmp_path / "gpt2"),
        tokenizer,
        data=Dataset.from_list(data),
        learning_rate=0.0,
        beta=0.1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        num_generations=4,
        num_iterations=2,
        max_steps=2,
    )
    trainer.train()
    for step in steps(trainer):
        assert abs(step["kl"]) < 1e-5 and step["clip_ratio/region_mean"] == 0


def test_padding_free_batches_are_used_only_if_trajectories_stay_separate():
    assert why_not_padding_free(miniature("qwen3")) is None
    assert "sliding-window" in why_not_padding_free(miniature("mistral"))
    assert "conv" in why_not_padding_free(miniature("lfm2"))
    assert "cannot be replaced" in why_not_padding_free(miniature("bloom"))
