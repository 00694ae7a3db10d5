"""What is refused before vLLM starts, and the calls of the trainer on an engine.

The engines are fakes that record calls (tests/support/fake_engine.py). test_vllm_colocate.py and test_vllm_server.py
run a real engine, test_vllm_gpu.py runs one on a GPU.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from trl.generation import vllm_generation

from tests.support.fake_engine import FakeLLM
from tests.support.scripted_trainer import config, real_trainer
from trl_search.common.errors import UserError
from trl_search.policies.lora import adapter_from, adapter_rank
from trl_search.policies.vllm_colocate import VLLMColocatePolicy
from trl_search.trainer.generation import vllm_backend
from trl_search.trainer.generation.vllm_backend import (
    SearchVLLM,
    refuse_float32_for_adapters,
    refuse_what_vllm_cannot_do,
)


@pytest.fixture
def vllm(monkeypatch):
    """Pretends that vLLM 0.25.1 is installed."""
    monkeypatch.setattr(vllm_backend, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_backend, "vllm_version", lambda: "0.25.1+cu130")
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", FakeLLM, raising=False)
    # TRL sets these variables.
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.fixture
def make(vllm, tmp_path, random_model, tokenizer):
    def make(peft_config=None, **options):
        trainer = {"peft_config": peft_config} if peft_config else {}
        return real_trainer(tmp_path, random_model, tokenizer, trainer=trainer, use_vllm=True, **options)

    return make


def adapter(random_model, **options):
    return get_peft_model(random_model, LoraConfig(target_modules=["q_proj", "v_proj"], **options))


def test_without_vllm_the_error_names_the_extra(monkeypatch, tmp_path, random_model, tokenizer):
    monkeypatch.setattr(vllm_backend, "is_vllm_available", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'trl-search\[vllm\]'"):
        real_trainer(tmp_path, random_model, tokenizer, use_vllm=True)


@pytest.mark.parametrize(
    ("version", "taken"), [("0.22.0", True), ("0.33.0+cpu", True), ("0.21.9", False), ("0.33.1", False)]
)
def test_supported_vllm_versions(monkeypatch, vllm, tmp_path, version, taken):
    monkeypatch.setattr(vllm_backend, "vllm_version", lambda: version)
    arguments = config(tmp_path, use_vllm=True)
    if taken:
        refuse_what_vllm_cannot_do(arguments)
    else:
        with pytest.raises(UserError, match=rf"vLLM {version} is outside 0.22.0 to 0.33.0.*install one of those"):
            refuse_what_vllm_cannot_do(arguments)


def test_an_engine_over_several_ranks(vllm, tmp_path):
    refuse_what_vllm_cannot_do(config(tmp_path, use_vllm=True, vllm_mode="server", vllm_tensor_parallel_size=2))
    with pytest.raises(UserError, match=r"vllm_tensor_parallel_size=2 does not divide the 1 processes"):
        refuse_what_vllm_cannot_do(config(tmp_path, use_vllm=True, vllm_mode="colocate", vllm_tensor_parallel_size=2))


@pytest.mark.parametrize(("text", "taken"), [('{"dtype": "float32"}', True), ("dtype=float32", False), ("[1]", False)])
def test_engine_options_are_a_json_object(tmp_path, text, taken):
    if taken:
        assert config(tmp_path, vllm_engine_options=text).vllm_engine_options == {"dtype": "float32"}
    else:
        with pytest.raises(ValueError, match=r"vllm_engine_options|JSON"):
            config(tmp_path, vllm_engine_options=text)


def test_the_maximum_rank_of_an_adapter(random_model):
    assert adapter_rank(adapter(random_model, r=12)) == 12


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"rank_pattern": {"q_proj": 24}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 24}}, "alpha_pattern"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_adapters_that_vllm_cannot_apply(random_model, options, named):
    with pytest.raises(UserError, match=rf"support this adapter's {named}: use vllm_lora_sync='merged'"):
        adapter_rank(adapter(random_model, **options))


def test_other_peft_methods_are_refused(random_model):
    with pytest.raises(UserError, match="needs a LoRA adapter: give a peft_config"):
        adapter_rank(random_model)
    with pytest.raises(UserError, match="support this adapter's peft_type"):
        adapter_rank(get_peft_model(random_model, VeraConfig(r=4, target_modules=["q_proj"])))


def test_float32_with_an_adapter_is_refused_on_a_gpu(monkeypatch):
    refuse_float32_for_adapters({"dtype": "float32"})  # vLLM's CPU build has such kernels
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refuse_float32_for_adapters({"dtype": "bfloat16"})
    for dtype in ("float32", torch.float32):
        with pytest.raises(UserError, match=r"need bfloat16 or float16: leave dtype out"):
            refuse_float32_for_adapters({"dtype": dtype})


def test_a_quantized_model_is_refused_before_an_engine_is_made(random_model):
    random_model.is_quantized = True  # as transformers marks models that it loads with a quantization_config
    with pytest.raises(UserError, match=r"quantized, so its weights cannot be sent to vLLM.*use_vllm: false"):
        SearchVLLM(lora_sync="merged", adapter_dir=None, engine_options={}, model=random_model)
    adapted = get_peft_model(random_model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="quantized"):
        SearchVLLM(lora_sync="adapter", adapter_dir=None, engine_options={}, model=adapted)


def test_the_trainer_creates_our_backend_and_its_engine(make):
    trainer = make(vllm_max_model_length=512, vllm_engine_options={"dtype": "float32", "max_num_seqs": 7})
    backend = trainer.vllm_generation
    assert isinstance(backend, SearchVLLM) and isinstance(backend.llm, FakeLLM)
    taken = {name: backend.llm.options[name] for name in ("dtype", "max_num_seqs", "max_model_len", "logprobs_mode")}
    assert taken == {
        "dtype": "float32", "max_num_seqs": 7, "max_model_len": 512, "logprobs_mode": "processed_logprobs",
    }  # fmt: skip
    assert "enable_lora" not in backend.llm.options and not backend.llm.done
    # Only while this trainer is created: other trainers in the process keep TRL's backend.
    assert vllm_backend.grpo_trainer.VLLMGeneration is vllm_generation.VLLMGeneration
    assert vllm_generation.LLM is FakeLLM


def test_the_engine_is_configured_for_an_adapter(make):
    options = make(LoraConfig(r=12, target_modules=["q_proj"]), vllm_lora_sync="adapter").vllm_generation.llm.options
    assert (options["enable_lora"], options["max_lora_rank"], options["max_loras"]) == (True, 16, 1)


@pytest.mark.parametrize(("sync", "level"), [("merged", 2), ("adapter", 1)])
def test_the_engine_sleeps_between_rollouts(make, sync, level):
    """Level 2 drops the weights. If only the adapter is sent, nothing restores them, so level 1 is used throughout."""
    peft_config = LoraConfig(r=4, target_modules=["q_proj"])
    backend = make(peft_config, vllm_lora_sync=sync, vllm_enable_sleep_mode=True).vllm_generation
    assert backend.llm.options["enable_sleep_mode"] is True and backend.llm.done == [f"sleep {level}"]
    backend._push_adapter = lambda: backend.llm.done.append("adapter")
    with backend.policy(512):
        sent = ["adapter"] if sync == "adapter" else ["load", "reset"]
        assert backend.llm.done[1:] == ["wake weights", *sent, "wake kv_cache"]
    assert backend.llm.done[-1] == f"sleep {level}"


def test_all_weights_are_sent_at_once_with_the_adapter_merged(make):
    trainer = make(LoraConfig(r=4, target_modules=["q_proj"]))
    backend, before = trainer.vllm_generation, {}
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
        elif "lora_" not in name:
            before[name.removeprefix("base_model.model.").replace(".base_layer", "")] = parameter.data.clone()
    backend.sync_weights()
    assert backend.llm.done == ["load", "reset"] and set(backend.llm.loaded) == set(before)
    moved = {name for name, tensor in before.items() if not tensor.equal(backend.llm.loaded[name])}
    assert moved == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}


def test_too_little_room_names_the_number_needed(make):
    with (
        pytest.raises(UserError, match=r"need 513 tokens.*room for 512: set vllm_max_model_length=513 or more"),
        make().vllm_generation.policy(513),
    ):
        pass


def test_adapter_weights_that_vllm_would_ignore_are_refused(monkeypatch):
    given = {}

    class LoRAModel:
        @classmethod
        def from_lora_tensors(cls, lora_model_id, tensors, device, dtype=None):
            given.update(id=lora_model_id, device=device, dtype=dtype)
            return SimpleNamespace(loras=dict.fromkeys(name.rsplit(".lora", 1)[0] for name in tensors))

    module = ModuleType("vllm.lora.lora_model")
    module.LoRAModel = LoRAModel
    monkeypatch.setitem(sys.modules, "vllm.lora.lora_model", module)
    for name in ("vllm", "vllm.lora"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    tensors = {"model.layers.0.q_proj.lora_A": torch.ones(1), "lm_head.lora_A": torch.ones(1)}
    load = adapter_from(tensors).from_local_checkpoint
    lora = load("folder", {"q_proj", "lm_head"}, lora_model_id=3, dtype="bfloat16", moe_ep_spec=None, device="cpu:9")
    assert set(lora.loras) == {"model.layers.0.q_proj", "lm_head"}
    assert given == {"id": 3, "dtype": "bfloat16", "device": torch.device("cpu")}
    with pytest.raises(UserError, match="cannot apply an adapter to lm_head of this model: leave it out of"):
        load("folder", {"q_proj"}, lora_model_id=4)


def test_the_engines_thread_uses_the_stream_of_the_thread_that_created_it(monkeypatch):
    """A new thread starts on device 0, which belongs to another rank, and vLLM may change streams during a forward."""
    taken = []
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: (f"stream of {threading.current_thread().name}", device)
    )
    monkeypatch.setattr(
        torch.cuda, "set_stream", lambda stream: taken.append((threading.current_thread().name, *stream))
    )
    worker = SimpleNamespace(device=torch.device("cuda", 3))
    engine = SimpleNamespace(
        model_executor=SimpleNamespace(driver_worker=worker),
        vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=8)),
        abort_request=lambda ids: None,
    )
    policy = VLLMColocatePolicy(SimpleNamespace(llm_engine=engine))

    async def open_and_close():
        await policy.open()
        await policy.close()

    asyncio.run(open_and_close())
    assert taken == [("VLLMColocatePolicy", "stream of MainThread", torch.device("cuda", 3))]
