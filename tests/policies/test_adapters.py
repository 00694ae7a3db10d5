"""Adapters: what is saved is what is loaded, and what would be another policy than the trained one is refused."""

from __future__ import annotations

import contextlib

import pytest
import torch
from peft import (
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM
from trl import ModelConfig

from tests.support.adapters import trained
from tests.support.scripted_trainer import config, real_trainer
from trl_search.common.errors import UserError
from trl_search.policies.adapters import adapted, adapter_config, check_target_modules, refuse_tied
from trl_search.policies.loading import load_base, load_model
from trl_search.policies.tiny import tiny_policy_path
from trl_search.trainer.generation.model_weights import whole_weights
from trl_search.trainer.sft import SearchSFTConfig, sft_rows, train

IDS = torch.arange(40, 60)[None]
NEW_EMBEDDINGS = LoraConfig(r=2, modules_to_save=["embed_tokens", "lm_head"])


class Whole:
    """A model that is not sharded."""

    def gather_params(self, parameters):
        return contextlib.nullcontext()


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def copy_of(model, *, tied=True):
    copied = Qwen2ForCausalLM(model.config)
    copied.load_state_dict(model.state_dict())
    if not tied:
        copied.config.tie_word_embeddings = False
        copied.lm_head.weight = torch.nn.Parameter(copied.lm_head.weight.detach().clone())
    return copied


@pytest.fixture
def base(tmp_path, random_model, tokenizer):
    """The folder of a base model."""
    folder = tmp_path / "base"
    random_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_adapter_has_a_rank_or_is_refused():
    assert adapter_config(ModelConfig("tiny", use_peft=True, lora_r=2)).target_modules == "all-linear"
    assert adapter_config(ModelConfig("tiny", lora_r=0)) is None
    with pytest.raises(UserError, match="lora_r=0 must be at least 1"):
        adapter_config(ModelConfig("tiny", use_peft=True, lora_r=0))
    with pytest.raises(UserError, match=r"lora_dropout=3\.0 must be a number from 0 to 1"):
        adapter_config(ModelConfig("tiny", use_peft=True, lora_dropout=3.0))


def test_an_adapter_names_modules_of_the_model():
    model = load_model(tiny_policy_path(), device="cpu")
    for names in (["q_proj", "no_such"], ["all-linear"], None):
        check_target_modules(model, adapter_config(ModelConfig(use_peft=True, lora_target_modules=names)))
    check_target_modules(model, None)
    with pytest.raises(UserError, match=r"no module qproj .*: it has .*q_proj"):
        check_target_modules(model, adapter_config(ModelConfig(use_peft=True, lora_target_modules=["qproj"])))


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(r=2),
        LoraConfig(r=2, use_dora=True),
        NEW_EMBEDDINGS,
        LoraConfig(r=2, init_lora_weights="pissa"),
        VeraConfig(r=2),
    ],
    ids=["lora", "dora", "modules_to_save", "pissa", "vera"],
)
def test_a_saved_adapter_is_loaded_as_it_was_trained(tmp_path, base, adapter):
    wrapped = trained(Qwen2ForCausalLM.from_pretrained(base), adapter)
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"), device="cpu")
    torch.testing.assert_close(logits(loaded), logits(wrapped), atol=1e-5, rtol=0)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    half = load_model(str(tmp_path / "adapter"), device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_an_incomplete_adapter_is_refused(tmp_path, base):
    folder = tmp_path / "adapter"
    trained(Qwen2ForCausalLM.from_pretrained(base), LoraConfig(r=2)).save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file)
    with pytest.raises(UserError, match=r"lacks 1 of its adapter's weights: .*lora_A"):
        load_model(str(folder), device="cpu")
    trained(Qwen2ForCausalLM.from_pretrained(base), LoraConfig(r=4)).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / file.name).replace(file)
    with pytest.raises(UserError, match="does not fit its base model"):
        load_model(str(folder), device="cpu")
    file.unlink()
    with pytest.raises(UserError, match=r"has adapter_config.json, but no weights"):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("adapter", "beta", "message"),
    [
        ({"r": 4}, 0.0, "peft_config must be a configuration of PEFT"),
        (PrefixTuningConfig(num_virtual_tokens=2), 0.0, "prefix_tuning puts tokens before every prompt"),
        (
            LoraConfig(alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
            0.0,
            "alora_invocation_tokens: no rollout engine",
        ),
        (LoraConfig(init_lora_weights="pissa_niter_4"), 0.0, "no later loading repeats"),
        (LoraConfig(init_lora_weights="pissa"), 0.1, "'pissa' changes the base model"),
        (LoraConfig(init_lora_weights="olora"), 0.1, "'olora' changes the base model"),
        (LoraConfig(bias="all"), 0.1, "bias='all' trains biases of the base model"),
        (LoraConfig(r=2, trainable_token_indices=[1, 2]), 0.0, "trainable_token_indices also wraps the output layer"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_an_adapter_that_would_be_another_policy_is_refused(tmp_path, random_model, tokenizer, adapter, beta, message):
    with pytest.raises(UserError, match=message):
        real_trainer(tmp_path, random_model, tokenizer, beta=beta, trainer={"peft_config": adapter})


def test_pissa_without_a_reference_is_trained(tmp_path, random_model, tokenizer):
    trainer = real_trainer(
        tmp_path, random_model, tokenizer, trainer={"peft_config": LoraConfig(r=2, init_lora_weights="pissa")}
    )
    assert trainer.model.peft_config["default"].init_lora_weights == "pissa"


def test_an_adapter_is_not_replaced_by_a_new_one(tmp_path, base, tokenizer):
    folder = tmp_path / "adapter"
    trained(Qwen2ForCausalLM.from_pretrained(base), LoraConfig(r=2)).save_pretrained(folder)
    with pytest.raises(UserError, match=r"is an adapter of .*, not a whole model"):
        real_trainer(tmp_path, str(folder), None)
    loaded = load_base(str(folder), ModelConfig(str(folder)), config(tmp_path))
    with pytest.raises(UserError, match="already has an adapter, which a new one would replace"):
        real_trainer(tmp_path, loaded, tokenizer, trainer={"peft_config": LoraConfig(r=2)})
    again = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(base), folder, is_trainable=True)
    assert real_trainer(tmp_path, again, tokenizer).model.active_adapter == "default"


def test_a_reference_of_another_adapter_is_refused(tmp_path, random_model, tokenizer):
    first = real_trainer(tmp_path, trained(copy_of(random_model), LoraConfig(r=2)), tokenizer, beta=0.1)
    with pytest.raises(UserError, match=r"still has the adapter 'ref', .* model.delete_adapter\('ref'\)"):
        real_trainer(tmp_path, first.model, tokenizer, beta=0.1)
    wrapped = trained(random_model, LoraConfig(r=2))
    wrapped.add_adapter("mine", LoraConfig(r=2))
    wrapped.set_adapter("mine")
    with pytest.raises(UserError, match=r"'mine' is trained, but the reference of beta=0\.1 is made from the one"):
        real_trainer(tmp_path, wrapped, tokenizer, beta=0.1)


@pytest.mark.parametrize(
    ("adapter", "tied"),
    [
        (LoraConfig(r=2, use_dora=True), True),
        (LNTuningConfig(), True),
        (LoraConfig(r=2, trainable_token_indices=[45]), True),
        (LoraConfig(r=2, trainable_token_indices=[45]), False),
        (LoraConfig(r=2, modules_to_save=["embed_tokens"], ensure_weight_tying=True), True),
        (NEW_EMBEDDINGS, False),
    ],
    ids=["dora", "norms", "tokens of both", "tokens of one", "both as one", "not tied"],
)
def test_an_engine_gets_the_weights_of_the_policy(random_model, adapter, tied):
    engine, wrapped = copy_of(random_model, tied=tied), trained(copy_of(random_model, tied=tied), adapter)
    refuse_tied(wrapped, "")
    weights = {name: weight.clone() for name, weight in whole_weights(wrapped, Whole(), torch.device("cpu"))}
    assert weights.keys() == dict(engine.named_parameters()).keys()
    engine.load_state_dict(weights, strict=False)
    torch.testing.assert_close(logits(engine), logits(wrapped), atol=1e-5, rtol=0)


@pytest.mark.parametrize("adapter", [NEW_EMBEDDINGS, LoraConfig(target_modules=["embed_tokens"])], ids=["both", "one"])
def test_one_of_two_tied_weights_is_not_merged(tmp_path, random_model, tokenizer, adapter):
    options = {"use_cpu": True, "bf16": False, "report_to": "none"}
    rows = sft_rows([((1,), (2,), (1,))])
    with pytest.raises(UserError, match=r"merging it makes another model: .* or set merge_adapter: false"):
        train(random_model, tokenizer, rows, SearchSFTConfig(str(tmp_path), **options), peft_config=adapter)


def test_prompt_learning_is_not_loaded_as_its_base(tmp_path, base):
    prompts = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(Qwen2ForCausalLM.from_pretrained(base), prompts).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="prefix_tuning puts tokens before every prompt"):
        adapted(Qwen2ForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))


def test_the_folder_of_an_adapter_with_another_name_is_suggested(tmp_path, base):
    """PEFT saves an adapter in a folder of its name, unless it is called `default`."""
    named = get_peft_model(Qwen2ForCausalLM.from_pretrained(base), LoraConfig(r=2), adapter_name="mine")
    named.save_pretrained(tmp_path / "run")
    with pytest.raises(UserError, match=r"holds no model .*: give .*run/mine, which has a model"):
        load_model(str(tmp_path / "run"), device="cpu")
