"""Tokenizers and models by name: revisions and end tokens are used, and what cannot be loaded is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration
from trl import ModelConfig

from tests.support.scripted_trainer import config
from trl_search.cli.model_checks import check_template, model_checks
from trl_search.cli.preflight import Status
from trl_search.common.errors import UserError
from trl_search.policies import loading
from trl_search.policies.loading import check_vocabulary, load_base, load_model, load_tokenizer
from trl_search.policies.tiny import tiny_policy_path
from trl_search.protocols import load_protocol
from trl_search.trainer import inputs
from trl_search.trainer.inputs import tokenizer_of


def test_the_end_of_a_turn_can_be_set():
    """A base model with a ChatML template: the EOS of its tokenizer differs from the template's end of turn."""
    plain = load_tokenizer(tiny_policy_path())
    assert load_tokenizer(tiny_policy_path(), eos_token=plain.pad_token).eos_token_id == plain.pad_token_id
    with pytest.raises(UserError, match=r"eos_token='<\|nope\|>' is not a token of .*give the token that ends a turn"):
        load_tokenizer(tiny_policy_path(), eos_token="<|nope|>")


def test_the_tokenizer_is_loaded_at_the_models_revision(monkeypatch, tmp_path):
    asked, checked, tokenizer = [], [], load_tokenizer(tiny_policy_path())

    def load(name, **options):
        asked.append((name, options))
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    monkeypatch.setattr(loading, "only_cached", lambda name: False)
    monkeypatch.setattr(inputs, "read_config", lambda name, **options: checked.append(options["revision"]))
    tokenizer_of("me/model", config(tmp_path, model_init_kwargs={"revision": "v2"}))
    tokenizer_of("me/model", config(tmp_path))
    assert [(name, options["revision"]) for name, options in asked] == [("me/model", "v2"), ("me/model", "main")]
    assert checked == ["v2", None]


def test_a_checkpoint_that_is_not_a_decoder_is_refused(tmp_path):
    small = T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(small).save_pretrained(tmp_path / "t5")
    for load in (
        lambda: load_model(str(tmp_path / "t5")),
        lambda: load_base(str(tmp_path / "t5"), ModelConfig(str(tmp_path / "t5")), config(tmp_path)),
    ):
        with pytest.raises(UserError, match=r"t5 is not a causal language model .*give a text-only model"):
            load()


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[Callable[[dict[str, torch.Tensor]], None]], str]:
    """A folder of the tiny policy with changed weights."""

    def make(change: Callable[[dict[str, torch.Tensor]], None]) -> str:
        folder = tmp_path / "model"
        shutil.copytree(tiny_policy_path(), folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    return make


BIAS = "model.layers.0.self_attn.q_proj.bias"


def test_missing_weights_are_refused(broken):
    with pytest.raises(UserError, match=f"lacks 1 of its weights, which would be random: {BIAS}"):
        load_model(broken(lambda weights: weights.pop(BIAS)))


def test_weights_of_another_shape_are_refused(broken):
    with pytest.raises(UserError, match=r"do not have the shapes in its config\.json"):
        load_model(broken(lambda weights: weights.update({BIAS: weights[BIAS][:-1].clone()})))


def test_weights_that_are_not_finite_are_refused(broken):
    with pytest.raises(UserError, match=rf"not finite \({BIAS}\), because its training overflowed"):
        load_model(broken(lambda weights: weights[BIAS].fill_(torch.nan)))


def test_a_tokenizer_of_another_model_is_refused():
    model, tokenizer = load_model(tiny_policy_path()), load_tokenizer(tiny_policy_path())
    check_vocabulary(model, tokenizer)
    model.resize_token_embeddings(len(tokenizer) - 1)
    with pytest.raises(UserError, match="do not belong together"):
        check_vocabulary(model, tokenizer)


def test_special_tokens_may_have_no_embedding():
    """Gemma 3's tokenizer has an image token also for its 1B model, which reads no images."""
    model, tokenizer = load_model(tiny_policy_path()), load_tokenizer(tiny_policy_path())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    model.resize_token_embeddings(len(tokenizer) - 1)
    check_vocabulary(model, tokenizer)
    image = tokenizer.convert_tokens_to_ids("<image_soft_token>")
    protocol = load_protocol("search_r1", tokenizer)
    assert image == len(tokenizer) - 1 and image not in protocol.control.encode("an <image_soft_token>")


def test_a_tokenizer_of_another_model_is_refused_from_the_configuration(tmp_path):
    shutil.copytree(tiny_policy_path(), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    folder, tokenizer = str(tmp_path / "model"), load_tokenizer(tiny_policy_path())
    check_vocabulary(folder, tokenizer)
    tokenizer.add_tokens([f"new{i}" for i in range(100)])
    tokenizer.save_pretrained(folder)
    for refuse in (lambda: check_vocabulary(folder, tokenizer), lambda: model_checks(folder)):
        with pytest.raises(UserError, match="do not belong together"):
            refuse()
    check = check_template(folder, "search_r1")
    assert check.status is Status.PROBLEM and "do not belong together" in check.said


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    shutil.copytree(tiny_policy_path(), tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UserError, match=r"model holds no tokenizer: .*Copy tokenizer\.json"):
        load_tokenizer(str(tmp_path / "model"))
