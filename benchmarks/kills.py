"""Kills parts of training runs repeatedly with SIGKILL: is every trajectory recorded exactly once?

    python benchmarks/kills.py --kills 20                          # the trainer and one of two ranks, on CPUs
    python benchmarks/kills.py --kills 10 --runs retriever         # its retrieval server, which a loop restarts
    python benchmarks/kills.py --kills 10 --runs servers           # one of two vLLM servers, which a loop restarts

Each run trains the tiny policy for four steps. A process is killed in one phase of a random step: in the middle of a
rollout, of the weight sync, of the loss or of writing a checkpoint, or at any moment. If that ends the run, it is
resumed from its last complete checkpoint. At the end, the benchmark checks that the trajectories of every step were
recorded once and that every step was logged once, and prints how many trajectories the journal saved. `step_s` are
the seconds of the run's steps: what a lost server costs.

If vLLM is not installed, the CPU build that `make test` installs is used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import httpx
import psutil

from trl_search.policies.tiny import tiny_policy_path
from trl_search.records.folder import read_run, read_trajectories

sys.path.insert(0, str(Path(__file__).parents[1]))  # `tests` is not installed
from tests.support.ports import free_port

STEPS, BATCH = 4, 32
KILLS_PER_RUN, LIVES = 4, 12
LATE = 0.7  # the share of kills after the first checkpoint, from which the run can be resumed
STUCK_S = 600.0  # two vLLM servers on two busy cores take minutes to start
ON_GPUS = shutil.which("nvidia-smi") is not None
OPTIONS = {
    "use_cpu": str(not ON_GPUS).lower(),
    "warm_start_steps": "0",
    "evaluate": "false",
    "world_passages": "300",
    "max_steps": str(STEPS),
    "gradient_accumulation_steps": "1",
    "log_trajectories": str(BATCH),
    "save_strategy": "steps",
    "save_steps": "1",
    "on_collapse": "warn",
    "learning_rate": "1e-5",
}
LORA = {"use_peft": "true", "lora_r": "8", "lora_target_modules": "all-linear", "vllm_lora_sync": "adapter"}
# `vllm serve` of the tiny policy with an adapter. Servers share a GPU with others: each has a small cache of a fixed
# size, because measuring the free memory takes time. vLLM's kernels for adapters need bfloat16 there.
SERVING = [
    "--host", "127.0.0.1", "--max-model-len", "1024", "--enforce-eager", "--logprobs-mode", "processed_logprobs",
    "--enable-lora",
    *(
        ("--dtype", "bfloat16", "--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(2**30))
        if ON_GPUS
        else ("--dtype", "float32", "--no-enable-chunked-prefill", "--distributed-executor-backend", "uni")
    ),
]  # fmt: skip
# The supervisor in the documentation.
SUPERVISOR = 'while true; do "$@"; sleep 1; done'


@dataclass
class Kind:
    """One kind of run: its ranks, the servers that it needs, and the processes that are killed."""

    victims: list[str]
    phases: list[str]
    ranks: int = 1
    options: dict[str, str] = field(default_factory=dict)
    supervised: list[subprocess.Popen[bytes]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    needs: list[str] = field(default_factory=list)  # addresses that must answer before a run is started


PHASES = ["rollout", "rollout", "loss", "save", "any moment"]


@contextlib.contextmanager
def kind_of(name: str, scratch: Path) -> Iterator[Kind]:
    """A kind of run, with its servers for the duration of the context."""
    python = [sys.executable, "-m", "trl_search"]
    if name == "trainer":
        yield Kind(["trainer"], PHASES)
    elif name == "ranks":
        yield Kind(["rank", "rank", "trainer"], PHASES, ranks=2)
    elif name == "retriever":
        port = free_port()
        command = [*python, "serve", "world", "--world_passages", "300", "--port", str(port)]
        with supervised(command, scratch / "retriever.log", dict(os.environ)) as process:
            options = {"retriever": f"http://127.0.0.1:{port}", "search_timeout_s": "120"}
            needs = [f"http://127.0.0.1:{port}/ready"]
            yield Kind(["retriever", "retriever", "trainer"], PHASES, 1, options, [process], needs=needs)
    else:
        with contextlib.ExitStack() as servers:
            environment = {**vllm_environment(scratch), "VLLM_SERVER_DEV_MODE": "1"}
            environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
            ports, processes = [free_port() for _ in range(2)], []
            for port in ports:
                command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", tiny_policy_path()]
                command += ["--port", str(port), "--max-lora-rank", "8", *SERVING]
                log = scratch / f"vllm-{port}.log"
                processes.append(servers.enter_context(supervised(command, log, environment)))
            urls = [f"http://127.0.0.1:{port}" for port in ports]
            needs = [f"{url}/health" for url in urls]
            options = {"use_vllm": "true", "vllm_mode": "server", "vllm_server_base_url": " ".join(urls), **LORA}
            phases = ["rollout", "rollout", "sync", "loss", "save"]
            yield Kind(["server", "server", "trainer"], phases, 1, options, processes, environment, needs)


def vllm_environment(scratch: Path) -> dict[str, str]:
    if find_spec("vllm"):
        return dict(os.environ)
    from tests.support.vllm_engine import vllm_environment as of_the_cpu_build

    return of_the_cpu_build(scratch)


@contextlib.contextmanager
def supervised(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A loop that restarts the command whenever it ends."""
    with log.open("ab") as file:
        loop = ["bash", "-c", SUPERVISOR, "supervisor", *command]
        process = subprocess.Popen(loop, env=environment, stdout=file, stderr=file)
    try:
        yield process
    finally:
        kill_with_descendants(psutil.Process(process.pid))
        process.wait()


def wait_for(url: str) -> None:
    deadline = time.monotonic() + STUCK_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=5, trust_env=False).is_success:
                return
        time.sleep(0.5)
    raise TimeoutError(url)


def start(kind: Kind, folder: Path, *, resume: bool) -> subprocess.Popen[bytes]:
    for url in kind.needs:
        wait_for(url)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(kind.ranks)]
    launch += ["--num_machines", "1", "--main_process_port", str(free_port()), "--mixed_precision", "no"]
    command = [sys.executable, *(launch if kind.ranks > 1 else []), "-m", "trl_search", "train", "quickstart"]
    options = {**OPTIONS, "per_device_train_batch_size": str(BATCH // kind.ranks), **kind.options}
    command += ["--output_dir", str(folder)]
    command += [word for name, value in options.items() for word in (f"--{name}", *value.split())]
    command += ["--resume_from_checkpoint", "last"] if resume else []
    environment = dict(kind.environment)
    if ON_GPUS:  # one GPU per rank: a process does not train on several
        gpus = environment.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[: kind.ranks])
    with (folder.parent / "log.txt").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def journal_lines(folder: Path) -> int:
    """Finished trajectories of the current batch on all ranks."""
    return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in (folder / "journal").glob("rank*.jsonl"))


def phase_has_come(phase: str, draw: random.Random, folder: Path) -> Callable[[], bool]:
    """Whether a run is in the given phase, judged by the files that it writes."""
    half, pause, began = draw.randint(1, BATCH - 1), draw.random(), time.monotonic()
    checkpoints = len(list(folder.glob("checkpoint-*")))
    adapter = folder / "vllm-adapter" / "adapter_model.safetensors"
    written = adapter.stat().st_mtime if adapter.is_file() else 0.0
    full_since: list[float] = []

    def in_loss() -> bool:
        if journal_lines(folder) >= BATCH:
            full_since.append(time.monotonic())
        return bool(full_since) and time.monotonic() > full_since[0] + pause

    return {
        "rollout": lambda: half <= journal_lines(folder) < BATCH,
        "sync": lambda: adapter.is_file() and adapter.stat().st_mtime > written,
        "loss": in_loss,
        "save": lambda: len(list(folder.glob("checkpoint-*"))) > checkpoints,
        "any moment": lambda: time.monotonic() > began + 30 * pause,
    }[phase]


def kill_with_descendants(victim: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [*victim.children(recursive=True), victim]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def kill(who: str, kind: Kind, trainer: subprocess.Popen[bytes], draw: random.Random) -> None:
    if who == "trainer":
        kill_with_descendants(psutil.Process(trainer.pid))
    elif who == "rank":
        draw.choice(psutil.Process(trainer.pid).children()).kill()
    else:
        for process in psutil.Process(draw.choice(kind.supervised).pid).children():
            kill_with_descendants(process)


def ended(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(timeout=STUCK_S)
    except subprocess.TimeoutExpired:
        kill_with_descendants(psutil.Process(process.pid))
        process.wait()
        return 999


def problems(folder: Path) -> list[str]:
    """The differences from an uninterrupted run."""
    run = read_run(folder)
    rows = read_trajectories(run).select(["step", "index"]).to_pylist()
    counts = Counter((row["step"], row["index"]) for row in rows)
    expected = {(step, index) for step in range(1, STEPS + 1) for index in range(BATCH)}
    steps = [row["step"] for row in run.history if "loss" in row]
    found = list(run.problems)
    found += [f"missing: {sorted(expected - counts.keys())}"] if expected - counts.keys() else []
    found += [f"not expected: {sorted(counts.keys() - expected)}"] if counts.keys() - expected else []
    found += [f"twice: {[key for key, count in counts.items() if count > 1]}"] if max(counts.values()) > 1 else []
    return found + ([f"steps logged: {steps}"] if steps != list(range(1, STEPS + 1)) else [])


def has_whole_checkpoint(folder: Path) -> bool:
    return any((path / "trainer_state.json").is_file() for path in folder.glob("checkpoint-*"))


def one_run(kind: Kind, folder: Path, most: int, draw: random.Random, kills: Counter[str]) -> tuple[list[str], int]:
    """Trains to the end despite the kills. Returns the problems, and how many trajectories the journal saved."""
    process, kept, done = start(kind, folder, resume=False), 0, 0
    for _ in range(LIVES):
        while done < most and process.poll() is None:
            phase, who, late = draw.choice(kind.phases), draw.choice(kind.victims), draw.random() < LATE
            while late and process.poll() is None and not has_whole_checkpoint(folder):
                time.sleep(0.05)
            has_come, deadline = phase_has_come(phase, draw, folder), time.monotonic() + STUCK_S
            while process.poll() is None and not has_come() and time.monotonic() < deadline:
                time.sleep(0.005)
            if process.poll() is not None or not has_come():
                break
            lines = journal_lines(folder)
            kill(who, kind, process, draw)
            kills[f"{who} in {phase}"] += 1
            done += 1
            if who in ("trainer", "rank"):
                kept += lines if phase == "rollout" and has_whole_checkpoint(folder) else 0
                break
        code = ended(process)
        if code == 0:
            return problems(folder), kept
        # If all its servers were killed, a run ends with an error that names them, and is resumed too.
        if code == 999 or (code == 2 and not kind.needs):
            return [f"exit code {code}"], kept
        process = start(kind, folder, resume=has_whole_checkpoint(folder))
    kill_with_descendants(psutil.Process(process.pid))
    return [f"it died {LIVES} times"], kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--runs", nargs="+", choices=["trainer", "ranks", "retriever", "servers"], metavar="KIND")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    kills: Counter[str] = Counter()
    runs = saved = bad = 0
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as servers:
        names = arguments.runs or ["trainer", "ranks"]
        kinds = [(name, servers.enter_context(kind_of(name, Path(scratch)))) for name in names]
        folder = Path(scratch) / "run"
        while (left := arguments.kills - sum(kills.values())) > 0:
            name, kind = kinds[runs % len(kinds)]
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            before, started = sum(kills.values()), time.monotonic()
            try:
                found, kept = one_run(kind, folder, min(KILLS_PER_RUN, left), draw, kills)
            except TimeoutError:  # a server does not answer; its log says why
                for log in Path(scratch).glob("*.log"):
                    print(f"{log.name}:\n{log.read_text(errors='replace')[-3000:]}", flush=True)
                raise
            runs, saved, bad = runs + 1, saved + kept, bad + bool(found)
            row = {"run": runs, "kind": name, "kills": sum(kills.values()) - before, "problems": found}
            row["step_s"] = [round(step["step_time"], 1) for step in read_run(folder).history if "step_time" in step]
            print(json.dumps({**row, "seconds": round(time.monotonic() - started), "all": dict(kills)}), flush=True)
            if found:
                print((Path(scratch) / "log.txt").read_text(errors="replace")[-4000:], flush=True)
            if sum(kills.values()) == before:
                break  # there was no kill: something is wrong with the run itself
        print(f"{sum(kills.values())} kills in {runs} runs; {bad} runs differ from an uninterrupted one")
        print(f"{saved} finished trajectories were in the journal at a kill during a rollout")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
