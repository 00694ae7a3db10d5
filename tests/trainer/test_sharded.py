"""FSDP2 against DDP, two processes each: the same losses, gradients and weights in vLLM, from shards.

Both run tests/support/sharded_run.py once; the tests below read what rank 0 wrote down.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl.distributed import DistributedBackend

from tests.conftest import save_random_model
from tests.support.scripted_trainer import config
from tests.support.two_ranks import run_ranks
from trl_search.common.errors import UserError
from trl_search.trainer.generation.model_weights import whole_weights
from trl_search.trainer.inputs import refuse_what_fsdp_cannot_do

KINDS = ["full", "untied", "lora"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("sharded")
    save_random_model(folder / "model", tokenizer)
    run_ranks("tests.support.sharded_run", [str(folder)], folder)
    return folder


def results(folder, kind):
    return [torch.load(folder / f"{kind}-{how}.pt") for how in ("ddp", "fsdp2")]


def same(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_ddp(folder, kind):
    ddp, fsdp2 = (result["trained"] for result in results(folder, kind))
    assert ddp["sharded"] == 0 and fsdp2["sharded"] > 20
    assert len(ddp["loss"]) == 2 and min(ddp["grad_norm"]) > 0.05
    for value in ("loss", "kl"):
        assert fsdp2[value] == pytest.approx(ddp[value], rel=1e-5, abs=1e-7)
    # The gradients agree to the last bit (next test); their norm is summed in another order.
    assert fsdp2["grad_norm"] == pytest.approx(ddp["grad_norm"], rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_gets_whole_weights(folder, kind):
    """After two steps of nearly plain gradient descent, so equal weights are equal gradients of each parameter."""
    ddp, fsdp2 = (result["trained"] for result in results(folder, kind))
    start = dict(AutoModelForCausalLM.from_pretrained(folder / "model").named_parameters())
    assert set(ddp["engine"]) == set(start) | ({"lm_head.weight"} if kind == "untied" else set())
    moved = [name for name, tensor in start.items() if not tensor.equal(ddp["engine"][name])]
    assert len(moved) >= 14
    same(fsdp2["engine"], ddp["engine"])


@pytest.mark.slow
def test_the_adapter_alone_is_whole_too(folder):
    ddp, fsdp2 = (result["trained"]["adapter"] for result in results(folder, "lora"))
    assert len(ddp) == 28 and all(name.startswith("base_model.model.") for name in ddp)
    same(fsdp2, ddp)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_checkpoint_resumes(folder, kind):
    fsdp2 = results(folder, kind)[1]
    assert fsdp2["resumed"]["loss"] == pytest.approx(fsdp2["trained"]["loss"], rel=1e-5)
    same(fsdp2["resumed"]["engine"], fsdp2["trained"]["engine"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "untied"])
def test_what_is_saved_is_read_by_transformers(folder, kind):
    saved = AutoModelForCausalLM.from_pretrained(folder / f"{kind}-fsdp2" / "saved")
    same(dict(saved.named_parameters()), results(folder, kind)[1]["trained"]["engine"])


def test_merging_for_vllm_leaves_the_base_weights_as_they_were(random_model):
    """In bfloat16 what is added and subtracted again is not the same number."""
    model = get_peft_model(random_model.to(torch.bfloat16), LoraConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    before = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
    backend = DistributedBackend(Accelerator(cpu=True))
    sent = {name: tensor.clone() for name, tensor in whole_weights(model, backend, torch.device("cpu"))}
    assert len(sent) == len([name for name in before if "lora_" not in name])
    base = before["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"]
    assert not sent["model.layers.0.self_attn.q_proj.weight"].equal(base)
    for name, parameter in model.named_parameters():
        assert parameter.equal(before[name]), name


@pytest.mark.parametrize(
    ("environment", "options", "reason"),
    [
        ({"FSDP_VERSION": "2"}, {}, "each token of a rollout would gather the whole model.*use_vllm: true"),
        ({}, {"use_vllm": True}, "FSDP version 1 is not supported: set fsdp_version: 2"),
        ({"FSDP_VERSION": "2"}, {"use_vllm": True}, "fsdp_state_dict_type: SHARDED_STATE_DICT would save no model"),
    ],
)
def test_what_fsdp_cannot_do_is_refused(monkeypatch, tmp_path, environment, options, reason):
    for name, value in {"ACCELERATE_USE_FSDP": "true", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=reason):
        refuse_what_fsdp_cannot_do(config(tmp_path, **options))


def test_fsdp2_with_vllm_is_taken(monkeypatch, tmp_path):
    settings = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    refuse_what_fsdp_cannot_do(config(tmp_path, use_vllm=True))
