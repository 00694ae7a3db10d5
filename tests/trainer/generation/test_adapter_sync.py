"""Sending an adapter to a vLLM server: its answers, and the files that it reads."""

from __future__ import annotations

import time

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from trl.distributed import DistributedBackend

from tests.conftest import make_random_model
from tests.support.servers import Said, serving
from trl_search.common.errors import UserError
from trl_search.policies.vllm_server import ServerLost
from trl_search.trainer.generation.adapter_sync import adapter_tensors, post, save_adapter

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def ask(path, url="http://127.0.0.1:1", patience_s=0.3):
    post(url, path, {}, rank=4, patience_s=patience_s)


def ask_one_that_answers(path, status, text):
    with serving(lambda asked: Said(text.encode(), status)) as server:
        ask(path, server.url)


def test_for_a_server_without_lora_the_error_names_the_option():
    """A server that was started without --enable-lora answers 404."""
    with pytest.raises(UserError, match="does not accept adapters: start it with --enable-lora --max-lora-rank 4"):
        ask_one_that_answers(LOAD, 404, '{"detail": "Not Found"}')


def test_an_unreachable_server_is_named():
    with pytest.raises(ServerLost, match=r"http://127.0.0.1:1 did not load the adapter.*restart it"):
        ask(LOAD)


def test_a_server_that_reads_the_adapter_slowly_is_not_lost():
    """Of several servers, one that does not connect is left out after five seconds."""

    def answer(asked):
        time.sleep(0.5)
        return Said()

    with serving(answer) as server:
        ask(LOAD, server.url, patience_s=0.1)
    assert len(server.asked) == 1


def test_a_repeated_load_and_a_missing_adapter_are_not_errors():
    # The response to the first try was lost.
    ask_one_that_answers(LOAD, 400, "The lora adapter 'policy-1' has already been loaded.")
    # The server was restarted.
    ask_one_that_answers(UNLOAD, 404, "The lora adapter 'policy-1' cannot be found.")
    with pytest.raises(UserError, match=r"refused /v1/load_lora_adapter \(400: rank 64 .*doctor --server"):
        ask_one_that_answers(LOAD, 400, "rank 64 is greater than max_lora_rank 32")


def test_peft_reads_the_adapter_that_is_written_for_a_server(tmp_path, tokenizer, random_model):
    model = get_peft_model(random_model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    tensors = adapter_tensors(model, DistributedBackend(Accelerator(cpu=True)), torch.device("cpu"))
    save_adapter(tensors, model, tmp_path / "adapter")
    read = PeftModel.from_pretrained(make_random_model(tokenizer), tmp_path / "adapter")
    trained = dict(model.named_parameters())
    for name, parameter in read.named_parameters():
        assert parameter.equal(trained[name]), name
