"""FSDP2 and DeepSpeed ZeRO against DDP, with two processes: the same losses, gradients and weights in vLLM.

tests/support/sharded_run.py runs once with each of them; the tests below read what rank 0 wrote.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import is_deepspeed_available
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl.distributed import DistributedBackend

from tests.conftest import save_random_model
from tests.support.scripted_trainer import config
from tests.support.two_ranks import run_ranks
from trl_search.common.errors import UserError
from trl_search.trainer.generation.model_weights import whole_weights
from trl_search.trainer.inputs import refuse_what_fsdp_cannot_do

KINDS = ["full", "untied", "lora"]
FSDP2 = [f"{kind}-fsdp2" for kind in KINDS]
ZERO = ["full-zero2", *(f"{kind}-zero3" for kind in KINDS)]
without_deepspeed = pytest.mark.skipif(not is_deepspeed_available(), reason="needs DeepSpeed: make setup")


def of_runs(*names):
    runs = [pytest.param(name, marks=without_deepspeed if name in ZERO else ()) for name in names]
    return pytest.mark.parametrize("run", runs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("sharded")
    save_random_model(folder / "model", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.config.tie_word_embeddings = False
    torch.manual_seed(0)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.02)
    model.save_pretrained(folder / "untied")
    tokenizer.save_pretrained(folder / "untied")
    runs = [*(f"{kind}-ddp" for kind in KINDS), *FSDP2, *(ZERO if is_deepspeed_available() else ())]
    # On a host with GPUs, DeepSpeed would use them.
    run_ranks("tests.support.sharded_run", [str(folder), *runs], folder, environment={"DS_ACCELERATOR": "cpu"})
    return folder


def result(folder, run):
    return torch.load(folder / f"{run}.pt")


def with_ddp(folder, run):
    """The results with DDP and of this run."""
    return [result(folder, name)["trained"] for name in (f"{run.partition('-')[0]}-ddp", run)]


def same(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
@of_runs(*FSDP2, *ZERO)
def test_losses_and_gradients_equal_those_of_ddp(folder, run):
    ddp, sharded = with_ddp(folder, run)
    assert ddp["sharded"] == 0 and (sharded["sharded"] > 20) == (run != "full-zero2")
    assert len(ddp["loss"]) == 2 and min(ddp["grad_norm"]) > 0.05
    for value in ("loss", "kl"):
        assert sharded[value] == pytest.approx(ddp[value], rel=1e-5, abs=1e-7)
    # The gradients are identical (next test); their norm is summed in another order.
    assert sharded["grad_norm"] == pytest.approx(ddp["grad_norm"], rel=2e-5 if run in FSDP2 else 3e-5)


@pytest.mark.slow
@of_runs(*FSDP2, *ZERO)
def test_the_engine_gets_whole_weights(folder, run):
    """After two steps of nearly plain gradient descent, so equal weights mean equal gradients of each parameter."""
    ddp, sharded = with_ddp(folder, run)
    start = load_file(folder / "model" / "model.safetensors")
    assert set(ddp["engine"]) == set(start) | ({"lm_head.weight"} if run.startswith("untied") else set())
    moved = [name for name, tensor in start.items() if not tensor.equal(ddp["engine"][name])]
    assert len(moved) >= 14
    same(sharded["engine"], ddp["engine"])


@pytest.mark.slow
@of_runs("lora-fsdp2", "lora-zero3")
def test_the_engine_gets_a_whole_adapter(folder, run):
    ddp, sharded = (trained["adapter"] for trained in with_ddp(folder, run))
    assert len(ddp) == 28 and all(name.startswith("base_model.model.") for name in ddp)
    same(sharded, ddp)


@pytest.mark.slow
@of_runs("full-fsdp2", "lora-fsdp2", "full-zero3", "lora-zero3")
def test_training_resumes_from_a_checkpoint(folder, run):
    results = result(folder, run)
    assert results["resumed"]["loss"] == pytest.approx(results["trained"]["loss"], rel=1e-5)
    same(results["resumed"]["engine"], results["trained"]["engine"])
    # FSDP2 told of other betas in every resumed run, because it loads them as a list; DeepSpeed told of nothing.
    (told,) = results["resumed"]["told"]
    assert told.startswith("weight_decay: 0.5 has no effect")


@pytest.mark.slow
@of_runs(*FSDP2, *ZERO)
def test_a_rollback_goes_back_as_under_ddp(folder, run):
    ddp, sharded = (result(folder, name)["rolled back"] for name in (f"{run.partition('-')[0]}-ddp", run))
    assert ddp["learning_rate"] == sharded["learning_rate"] == [1.0, 0.5]
    assert sharded["loss"] == pytest.approx(ddp["loss"], rel=1e-5)
    same(sharded["engine"], ddp["engine"])


@pytest.mark.slow
@of_runs("full-fsdp2", "untied-fsdp2", "full-zero2", "full-zero3", "untied-zero3")
def test_transformers_loads_the_saved_model(folder, run):
    saved = AutoModelForCausalLM.from_pretrained(folder / run / "saved")
    same(dict(saved.named_parameters()), result(folder, run)["trained"]["engine"])


@pytest.mark.slow
@of_runs("lora-fsdp2", "lora-zero3")
def test_the_whole_adapter_is_saved(folder, run):
    same(load_file(folder / run / "saved" / "adapter_model.safetensors"), result(folder, run)["trained"]["adapter"])


def test_merging_for_vllm_does_not_change_the_base_weights(random_model):
    """In bfloat16, adding and subtracting the adapter would change the weights."""
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
        ({"FSDP_VERSION": "2"}, {}, "each token of a rollout gathers the whole model.*use_vllm: true"),
        ({}, {"use_vllm": True}, "FSDP version 1 is not supported: set fsdp_version: 2"),
        (
            {"FSDP_VERSION": "2"},
            {"use_vllm": True},
            "fsdp_state_dict_type: SHARDED_STATE_DICT saves a model that transformers cannot load",
        ),
    ],
)
def test_unsupported_fsdp_settings_are_refused(monkeypatch, tmp_path, environment, options, reason):
    for name, value in {"ACCELERATE_USE_FSDP": "true", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=reason):
        refuse_what_fsdp_cannot_do(config(tmp_path, **options))


def test_fsdp2_with_vllm_is_accepted(monkeypatch, tmp_path):
    settings = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    refuse_what_fsdp_cannot_do(config(tmp_path, use_vllm=True))
