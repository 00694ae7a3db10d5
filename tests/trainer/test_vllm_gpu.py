"""vLLM on real devices: weights reach the engine, training resumes, and a server serves two ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import httpx
import pytest
import torch

from trl_search.policies.tiny import tiny_policy_path

pytestmark = pytest.mark.timeout(600)
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
# Two bf16 forwards of the same weights through different kernels.
NOISE = 0.05


def run(*command):
    line = [sys.executable, "-m", *command]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["full", "merged", "adapter"])
def test_weights_reach_the_colocated_engine_and_training_resumes(kind, tmp_path):
    run("tests.support.vllm_gpu_run", "colocate", str(tmp_path), kind)
    first = json.loads((tmp_path / f"{kind}.json").read_text())
    assert first["step"] == 2 and len(first["searches"]) == 2 and max(first["searches"]) > 0
    check(first["disagreement"])
    run("tests.support.vllm_gpu_run", "colocate", str(tmp_path), kind)
    resumed = json.loads((tmp_path / f"{kind}-resumed.json").read_text())
    assert resumed["step"] == 4
    check(resumed["disagreement"])


def check(disagreement):
    """The engine has the trainer's weights, and they are not those that it started with."""
    assert disagreement["trainer"] < NOISE
    assert disagreement["untrained"] > 2 * disagreement["trainer"]


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_server_serves_the_rollouts_of_two_ranks(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", tiny_policy_path()),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048", "--enforce-eager"),
        *("--gpu-memory-utilization", "0.1", "--logprobs-mode", "processed_logprobs", "--dtype", "bfloat16"),
        *("--weight-transfer-config", '{"backend": "nccl"}'),
    ]
    environment = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "1", "VLLM_SERVER_DEV_MODE": "1"}
    log = (tmp_path / "serve.log").open("w")
    serve = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", serve, tmp_path / "serve.log")
        launch = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
        run(*launch, "-m", "tests.support.vllm_gpu_run", "server", str(tmp_path), f"http://127.0.0.1:{port}")
    finally:
        serve.terminate()
        serve.wait(timeout=60)
    results = [json.loads((tmp_path / f"server-{rank}.json").read_text()) for rank in range(2)]
    for result in results:
        assert result["processes"] == 2 and result["step"] == 2
        assert max(result["searches"]) > 0
        check(result["disagreement"])


def wait_for(url, process, log):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-5000:]
        try:
            if httpx.get(url).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise AssertionError(log.read_text()[-5000:])
