"""vLLM on GPUs: weights reach the engine, training resumes, a server serves two ranks, two hosts train together.

The engines are small and take a fixed share of a GPU, so these tests may run side by side (`pytest -n 4`).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait

import httpx
import pytest
import torch

from tests.support.forked import ROOT
from tests.support.ports import free_port
from tests.support.process_tree import kill_tree
from trl_search.policies.tiny import tiny_policy_path
from trl_search.policies.weight_checksums import EXTENSION

pytestmark = pytest.mark.timeout(600)
# Difference of two bf16 forwards of the same weights with different kernels.
NOISE = 0.05


def environment(**more):
    """The environment of the processes that a test starts, with as many devices as its mark says."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", **more}


def run(*command, **more):
    run_together([(command, more)])


def run_together(commands):
    """Runs `(command, environment)` pairs at the same time, each in its own process group."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            env=environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, more in commands
    ]
    with ThreadPoolExecutor() as readers:
        outputs = [readers.submit(process.communicate) for process in processes]
        try:
            wait(outputs, timeout=500, return_when="ALL_COMPLETED")
        finally:
            for process in processes:
                kill_tree(process)
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output.result()[0][-8000:]


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
    """Checks that the engine has the trainer's weights, and that they have changed."""
    assert disagreement["trainer"] < NOISE
    assert disagreement["untrained"] > 2 * disagreement["trainer"]


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
LAUNCH = ("accelerate.commands.launch", "--num_processes", "2", "--mixed_precision", "bf16")
ONE_HOST = ("--num_machines", "1", "--main_process_port", "0")
FSDP2 = (
    *("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
    *("--fsdp_state_dict_type", "FULL_STATE_DICT", "--fsdp_reshard_after_forward", "true"),
)
METHODS = {
    "ddp": ("--multi_gpu",),
    "fsdp2": FSDP2,
    "zero2": ("--config_file", str(ROOT / "recipes" / "accelerate" / "zero2.yaml")),
    "zero3": ("--config_file", str(ROOT / "recipes" / "accelerate" / "zero3.yaml")),
}


def launch(method, *command):
    """Runs a module in two ranks of one host."""
    if method.startswith("zero"):
        pytest.importorskip("deepspeed")
    run(*LAUNCH, *ONE_HOST, *METHODS[method], "-m", "tests.support.vllm_gpu_run", *command)


@pytest.mark.multi_gpu
@TWO_GPUS
@pytest.mark.parametrize(
    ("kind", "method"),
    [("full", "fsdp2"), ("merged", "fsdp2"), ("adapter", "fsdp2"), ("full", "zero2"), ("merged", "zero3")],
)
def test_sharded_weights_reach_the_engines_and_training_resumes(kind, method, tmp_path):
    for steps in (2, 4):
        launch(method, "sharded", str(tmp_path), kind)
        check_ranks(tmp_path, kind, steps)
    assert list((tmp_path / f"run-{kind}" / "saved").glob("*.safetensors"))


def check_ranks(folder, kind, steps):
    for rank in range(2):
        found = json.loads((folder / f"{kind}-{steps}-{rank}.json").read_text())
        assert found["step"] == steps
        check(found["disagreement"])


@pytest.mark.multi_gpu
@TWO_GPUS
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_two_ranks_share_one_engine(kind, tmp_path):
    """Tensor parallel: the trajectories of both ranks run on one engine, split over both GPUs."""
    launch("ddp", "tensor_parallel", str(tmp_path), kind)
    check_ranks(tmp_path, kind, 2)


@pytest.mark.multi_gpu
@TWO_GPUS
def test_two_hosts_train_together(tmp_path):
    """Two launchers with one GPU each. NCCL treats them as two hosts and uses sockets."""
    where = ("--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()))
    what = (*FSDP2, "-m", "tests.support.vllm_gpu_run", "sharded", str(tmp_path), "full")
    run_together(
        [
            (
                (*LAUNCH, *where, "--machine_rank", host, *what),
                {"CUDA_VISIBLE_DEVICES": host, "NCCL_HOSTID": f"host-{host}", "NCCL_SOCKET_IFNAME": "lo"},
            )
            for host in ("0", "1")
        ]
    )
    check_ranks(tmp_path, "full", 2)


GETS_WEIGHTS = ("--weight-transfer-config", '{"backend": "nccl"}', "--worker-extension-cls", EXTENSION)
GETS_ADAPTERS = ("--enable-lora", "--max-lora-rank", "8")


@contextlib.contextmanager
def serving(folder, count, *options):
    """`count` times `vllm serve` on GPU 1; yields the addresses and the processes, each a group leader."""
    processes, urls = [], []
    for number in range(count):
        port = free_port()
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", tiny_policy_path()),
            *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048", "--enforce-eager"),
            *("--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(2**30), "--dtype", "bfloat16"),
            *("--logprobs-mode", "processed_logprobs", *options),
        ]
        log = (folder / f"serve-{number}.log").open("w")
        on_gpu_1 = environment(
            CUDA_VISIBLE_DEVICES="1", VLLM_SERVER_DEV_MODE="1", VLLM_ALLOW_RUNTIME_LORA_UPDATING="True"
        )
        processes.append(
            subprocess.Popen(command, env=on_gpu_1, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        )
        urls.append(f"http://127.0.0.1:{port}")
    try:
        for number, url in enumerate(urls):
            wait_for(f"{url}/health", processes[number], folder / f"serve-{number}.log")
        yield urls, processes
    finally:
        for process in processes:
            kill_tree(process)


@pytest.mark.multi_gpu
@TWO_GPUS
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("full", "ddp"),
        ("full", "fsdp2"),
        ("full", "zero3"),
        ("merged", "ddp"),
        ("merged", "fsdp2"),
        ("adapter", "ddp"),
    ],
)
def test_a_server_serves_the_rollouts_of_two_ranks(kind, method, tmp_path):
    with serving(tmp_path, 1, *(GETS_ADAPTERS if kind == "adapter" else GETS_WEIGHTS)) as (urls, _):
        launch(method, "server", str(tmp_path), f"{urls[0]},{kind}")
    results = [json.loads((tmp_path / f"server-{rank}.json").read_text()) for rank in range(2)]
    for result in results:
        assert result["processes"] == 2 and result["step"] == 2
        assert max(result["searches"]) > 0
        check(result["disagreement"])


@pytest.mark.multi_gpu
@TWO_GPUS
def test_training_outlives_one_of_two_servers(tmp_path):
    """Both read back the checksums of their weights after each sync, so wrong weights would end the run."""
    with serving(tmp_path, 2, *GETS_WEIGHTS) as (urls, processes):
        what = f"{urls[0]},{urls[1]},{processes[1].pid}"
        run("tests.support.vllm_gpu_run", "servers", str(tmp_path), what, CUDA_VISIBLE_DEVICES="0")
        assert processes[1].wait(timeout=60) != 0
    result = json.loads((tmp_path / "servers.json").read_text())
    assert result["step"] == 4 and len(result["searches"]) == 4 and result["serving"] == urls[:1]
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
