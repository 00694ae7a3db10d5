"""The doctor on a vLLM server: each check on good and on bad values. (test_vllm_server.py checks a real server.)"""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from tests.support.servers import Said, serving
from trl_search.cli.main import main
from trl_search.cli.preflight import Status
from trl_search.cli.server_checks import (
    check_adapter_sync,
    check_logprobs_mode,
    check_model,
    check_room,
    check_server_version,
    check_stop,
    check_token_ids,
    check_weight_sync,
    recipe_servers,
    server_checks,
)
from trl_search.policies.weight_checksums import EXTENSION


def test_servers_of_a_recipe():
    served = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": None, "vllm_server_port": 8000}
    assert recipe_servers({**served, "vllm_server_host": "gpu1"}) == ["http://gpu1:8000"]
    assert recipe_servers({**served, "vllm_mode": "colocate"}) == recipe_servers({}) == []


@pytest.mark.parametrize(
    ("version", "here", "status"),
    [
        ("0.32.0", "0.32.0+cpu", "ok"),
        ("0.34.0", "0.34.0", "warning"),
        ("0.25.1", "0.31.0", "warning"),
        ("0.25.1", None, "problem"),
    ],
)
def test_versions_of_both_ends(version, here, status):
    assert check_server_version(version, here).status == status


def test_the_model_and_its_room():
    models = [{"id": "policy", "root": "Qwen/Qwen2.5-3B-Instruct", "max_model_len": 4096}]
    recipe = {"model_name_or_path": "Qwen/Qwen2.5-3B-Instruct", "max_completion_length": 4000}
    assert check_model(models, recipe).status is Status.OK
    assert check_model(models, {"model_name_or_path": "Qwen/Qwen2.5-7B"}).status is Status.WARNING
    assert check_room(models, recipe, prompt_tokens=96).status is Status.OK
    small = check_room(models, recipe, prompt_tokens=97)
    assert small.status is Status.PROBLEM and small.remedy.startswith("start it with --max-model-len 4097")


def test_token_ids():
    logprobs = {"token_logprobs": [-1.0, -2.0]}
    assert check_token_ids({"token_ids": [5, 6], "logprobs": logprobs}).status is Status.OK
    assert check_token_ids({"token_ids": None, "logprobs": logprobs}).status is Status.PROBLEM


@pytest.mark.parametrize(
    ("hot", "status"),
    [
        ({"a": -1.4, "b": -1.9, "c": -2.4}, "ok"),  # processed_logprobs
        ({"a": -0.6, "b": -1.6, "c": -2.6}, "problem"),  # raw_logprobs
        ({"a": 4.0, "b": 3.5, "c": 3.0}, "problem"),  # logits
        ({"x": -1.0}, "warning"),
    ],
)
def test_logprobs_mode(hot, status):
    assert check_logprobs_mode({"a": -0.6, "b": -1.6, "c": -2.6}, hot).status == status


def test_stop_strings():
    def stopped(*tokens):
        return {"token_ids": [1] * 3, "stop_reason": "r</se", "logprobs": {"tokens": list(tokens)}}

    assert check_stop("r</se", stopped("a", " r", "</search>")).status is Status.OK
    assert check_stop("r</se", stopped("a", " r", "</se")).status is Status.PROBLEM
    assert check_stop("r</se", stopped("a", " r")).status is Status.PROBLEM
    assert check_stop("", {}).status is Status.WARNING


def test_weight_sync():
    good = {"weight_transfer_config": {"backend": "nccl"}, "device_config": {"device": "cuda"}}
    assert "--worker-extension-cls" in check_weight_sync(good).remedy
    reads_back = {**good, "parallel_config": {"worker_extension_cls": EXTENSION}}
    assert check_weight_sync(reads_back).status is Status.OK
    assert "VLLM_SERVER_DEV_MODE=1" in check_weight_sync(None).remedy
    assert "--weight-transfer-config" in check_weight_sync({"weight_transfer_config": None}).remedy
    assert check_weight_sync({**good, "device_config": {"device": "cpu"}}).status is Status.WARNING
    old = check_weight_sync(reads_back, "0.27.1", "0.32.0")
    assert old.status is Status.PROBLEM and "same version" in old.remedy
    shared = check_weight_sync({**good, "parallel_config": {"data_parallel_external_lb": True}})
    assert shared.status is Status.PROBLEM and "--data-parallel-rank" in shared.remedy


def test_adapters():
    assert check_adapter_sync(True, {}).status is Status.OK
    assert "VLLM_SERVER_DEV_MODE" in check_adapter_sync(True, None).remedy
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in check_adapter_sync(False, {}).remedy


class Stock:
    """Answers as `vllm serve --disable-fastapi-docs` does."""

    most_logprobs, adapters = 20, False

    def __call__(self, asked):
        if asked.target == "/v1/load_lora_adapter":
            return Said({}, 405 if self.adapters else 404)
        if asked.target == "/v1/models":
            return Said({"data": [{"id": "tiny", "max_model_len": 1024}]})
        if asked.target == "/version":
            return Said({"version": "0.31.0"})
        if asked.target != "/v1/completions":
            return Said({"detail": "Not Found"}, 404)
        body = asked.json
        if body["logprobs"] > self.most_logprobs:
            said = f"Requested sample logprobs of {body['logprobs']}, which is greater than max allowed"
            return Said({"error": {"message": said}}, 400)
        tokens = ["a", "bc", "de"][: body["max_tokens"]]
        top = (
            {token: -(number + 1) / body["temperature"] for number, token in enumerate("abc")}
            if body["temperature"]
            else {}
        )
        logprobs = {"tokens": tokens, "token_logprobs": [-0.5] * len(tokens), "top_logprobs": [top] * len(tokens)}
        stop = (body["stop"] or [None])[0]
        return Said({"choices": [{"token_ids": [1] * len(tokens), "logprobs": logprobs, "stop_reason": stop}]})


@pytest.mark.parametrize("adapters", [True, False])
def test_a_server_without_a_page_of_documentation_is_checked(adapters):
    stock = Stock()
    stock.adapters = adapters
    with serving(stock) as server:
        recipe = {"use_peft": True, "vllm_lora_sync": "adapter", "max_completion_length": 100}
        checks = {check.name: check for check in server_checks(server.url, recipe)}
    assert checks["server"].status is checks["logprobs mode"].status is checks["stop strings"].status is Status.OK
    assert ("VLLM_SERVER_DEV_MODE" if adapters else "--enable-lora") in checks["weight sync"].remedy


def test_a_refused_request_is_quoted_with_its_remedy():
    stock = Stock()
    stock.most_logprobs = 0
    with serving(stock) as server:
        (check,) = server_checks(server.url)
    assert check.status is Status.PROBLEM and "(400: Requested sample logprobs of 5" in check.said
    assert check.said.endswith("start it with --max-logprobs -1")


def test_a_server_that_is_not_there_is_a_problem(capsys):
    url = "http://127.0.0.1:9"
    (check,) = server_checks(url)
    assert check.status is Status.PROBLEM and url in check.said
    assert main(["doctor", "--server", url, "--json"]) == 1
    assert asdict(check) in json.loads(capsys.readouterr().out)
