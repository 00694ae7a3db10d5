"""A training run that is killed again and again, with SIGKILL: does it end with every trajectory once, and none lost?

    python benchmarks/kills.py --kills 50          # one process on a CPU, about half a minute per kill

Each round starts a run of the tiny policy, kills it in one phase of a random step (a rollout that is half done, the
loss, the writing of a checkpoint, or any moment), and resumes it from its last whole checkpoint, up to five times.
Checked at the end of each run: the recorded trajectories of every step are there once, and every step was logged once.
Printed too: how many trajectories were in the journal when a run was killed during a rollout.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from trl_search.records.folder import read_run, read_trajectories

STEPS, BATCH = 4, 32
OPTIONS = {
    "use_cpu": "true",
    "warm_start_steps": "0",
    "evaluate": "false",
    "eval_questions": "none",
    "world_passages": "300",
    "max_steps": str(STEPS),
    "per_device_train_batch_size": str(BATCH),
    "gradient_accumulation_steps": "1",
    "log_trajectories": str(BATCH),
    "save_strategy": "steps",
    "save_steps": "1",
    "stop_on_collapse": "false",
    "learning_rate": "1e-5",
}


def start(folder: Path, *, resume: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "trl_search", "train", "quickstart", "--output_dir", str(folder)]
    command += [word for name, value in OPTIONS.items() if value != "none" for word in (f"--{name}", value)]
    command += ["--resume_from_checkpoint", "last"] if resume else []
    with (folder.parent / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def journal_lines(folder: Path) -> int:
    path = folder / "journal" / "rank0.jsonl"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.is_file() else 0


def phases(draw: random.Random, folder: Path) -> dict[str, Callable[[], bool]]:
    """What has come when a run is in each phase; a run is killed as soon as the phase that was drawn has come."""
    half, pause = draw.randint(1, BATCH - 1), draw.random()
    checkpoints = len(list(folder.glob("checkpoint-*")))
    seen: dict[str, float] = {}

    def some_time_after(name: str, seconds: float) -> bool:
        return time.monotonic() > seen.setdefault(name, time.monotonic()) + seconds

    return {
        "rollout": lambda: half <= journal_lines(folder) < BATCH,
        "loss": lambda: journal_lines(folder) >= BATCH and some_time_after("loss", pause),
        "save": lambda: len(list(folder.glob("checkpoint-*"))) > checkpoints,
        "any moment": lambda: some_time_after("start", 30 * pause),
    }


def kill_in(phase: str, process: subprocess.Popen[bytes], folder: Path, draw: random.Random) -> bool:
    """Kills the run when that phase has come. False if the run ended before."""
    has_come = phases(draw, folder)[phase]
    while process.poll() is None:
        if has_come():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.005)
    return False


def problems(folder: Path) -> list[str]:
    """What is not as in a run that nobody killed."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    kills: Counter[str] = Counter()
    runs = kept = bad = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        while sum(kills.values()) < arguments.kills:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            process = start(folder, resume=False)
            for _ in range(min(5, arguments.kills - sum(kills.values()))):
                phase = draw.choice(["rollout", "rollout", "loss", "save", "any moment"])
                if not kill_in(phase, process, folder, draw):
                    break
                kills[phase] += 1
                lines = journal_lines(folder)
                process = start(folder, resume=has_whole_checkpoint(folder))
                kept += lines if phase == "rollout" and has_whole_checkpoint(folder) else 0
            code = process.wait()
            runs += 1
            found = [f"exit code {code}"] if code else problems(folder)
            bad += bool(found)
            print(json.dumps({"run": runs, "kills": dict(kills), "problems": found}), flush=True)
            if found:
                print((Path(scratch) / "log.txt").read_text(errors="replace")[-3000:])
        print(f"{sum(kills.values())} kills in {runs} runs, {bad} of them not as if nobody had killed them")
        print(f"{kept} finished trajectories were in the journal at a kill during a rollout")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
