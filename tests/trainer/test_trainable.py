"""A training that could change no weight is refused, or warned of, before its first rollout."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2ForCausalLM

from tests.support.scripted_trainer import real_trainer
from trl_search.common.errors import UserError


def test_an_adapter_that_was_loaded_for_inference_is_refused(tmp_path: Any, random_model: Any, tokenizer: Any) -> None:
    get_peft_model(random_model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    for trainable in (False, True):
        model = PeftModel.from_pretrained(random_model, tmp_path / "adapter", is_trainable=trainable)
        trainer = real_trainer(tmp_path, model, tokenizer, max_steps=1)
        if trainable:
            trainer.train()
            continue
        with pytest.raises(UserError, match=r"no weight of the model is trainable: .*is_trainable=True"):
            trainer.train()
        assert not trainer.last_rollout.rows
        model.unload()


@pytest.mark.parametrize(
    ("dtype", "options", "warned"),
    [
        (torch.bfloat16, {"learning_rate": 1e-6}, True),
        (torch.bfloat16, {"learning_rate": 1e-2}, False),
        (torch.bfloat16, {"learning_rate": 1e-6, "optim": "sgd"}, False),
        (torch.float32, {"learning_rate": 1e-6}, False),
    ],
    ids=str,
)
def test_updates_that_are_rounded_away_are_warned_of(
    tmp_path: Any, random_model: Any, tokenizer: Any, caplog: Any, dtype: Any, options: dict[str, Any], warned: bool
) -> None:
    model = random_model.to(dtype)
    trainer = real_trainer(tmp_path, model, tokenizer, max_steps=1, **options)
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    with caplog.at_level(logging.WARNING, "trl_search"):
        trainer.train()
    assert ("the weights are in bfloat16, where updates as small as" in caplog.text) == warned
    if warned:  # and the warning is right
        changed = (model.model.layers[0].self_attn.q_proj.weight != before).float().mean()
        assert changed < 0.1


@pytest.mark.parametrize(
    ("dropout", "options", "warned"), [(0.05, {}, 1), (0.05, {"disable_dropout": True}, 0), (0.0, {}, 0)]
)
def test_dropout_is_warned_of(
    tmp_path: Any, random_model: Any, tokenizer: Any, caplog: Any, dropout: float, options: dict[str, Any], warned: int
) -> None:
    """TRL's lora_dropout, 0.05, was taken in silence."""
    adapter = LoraConfig(r=2, target_modules="all-linear", lora_dropout=dropout)
    trainer = real_trainer(tmp_path, random_model, tokenizer, max_steps=1, trainer={"peft_config": adapter}, **options)
    with caplog.at_level(logging.WARNING, "trl_search"):
        trainer.train()
    assert caplog.text.count("the loss is computed with a dropout of 0.05") == warned


def test_a_reference_with_other_weights_is_warned_of(
    tmp_path: Any, random_model: Any, tokenizer: Any, caplog: Any
) -> None:
    with pytest.raises(UserError, match=r"beta=0\.1 needs a reference model, which TRL loads by the name"):
        real_trainer(tmp_path, random_model, tokenizer, beta=0.1)
    random_model.save_pretrained(tmp_path / "base")
    for changed in (False, True):
        model = Qwen2ForCausalLM.from_pretrained(tmp_path / "base")
        if changed:  # as after a fine-tuning in the same script
            model.model.norm.weight.data[0] += 1
        trainer = real_trainer(tmp_path, model, tokenizer, beta=0.1, max_steps=1)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "trl_search"):
            trainer.train()
            trainer.train()  # the model is not the reference any more, as it should be
        assert caplog.text.count("the reference of beta, which TRL loaded from") == changed


def test_an_adapter_whose_base_is_only_in_memory_is_warned_of(
    tmp_path: Any, random_model: Any, tokenizer: Any, caplog: Any
) -> None:
    """As after a fine-tuning, or after merging an earlier adapter, in the same script."""
    random_model.save_pretrained(tmp_path / "base")
    for dtype, changed in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        model = Qwen2ForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
        if changed:
            merged = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False)).merge_and_unload()
            assert merged is model
        adapter = LoraConfig(r=2, target_modules="all-linear")
        trainer = real_trainer(tmp_path, model, tokenizer, max_steps=1, trainer={"peft_config": adapter})
        caplog.clear()
        with caplog.at_level(logging.WARNING, "trl_search"):
            trainer.train()
        assert ("but the base in memory has other weights (model.layers." in caplog.text) == changed
