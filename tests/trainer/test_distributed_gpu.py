"""The command line on two GPUs. Run by `make test-gpu`; results are recorded in docs/performance.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
OPTIONS = {
    "warm_start_steps": "0",
    "evaluate": "false",
    "world_passages": "300",
    "max_steps": "2",
    "per_device_train_batch_size": "16",
    "gradient_accumulation_steps": "1",
}


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_recipe_trains_on_two_gpus(tmp_path: Path) -> None:
    """Its checks run on the first rank only, which must not keep it from meeting the other."""
    options = [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
    command = [sys.executable, *LAUNCH, "--mixed_precision", "no", "--main_process_port", "0"]
    command += ["-m", "trl_search", "train", "quickstart", "--output_dir", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps if "loss" in step] == [1, 2]
