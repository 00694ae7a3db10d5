"""torch has one CPU device, but accelerate numbers it by rank."""

from __future__ import annotations

import torch

from trl_search.trainer.numbered_cpus import load_onto_numbered_cpus


def test_an_optimizer_is_loaded_onto_the_numbered_cpu_of_a_rank(tmp_path):
    torch.save({"exp_avg": torch.arange(3.0)}, tmp_path / "optimizer.pt")
    load_onto_numbered_cpus()
    loaded = torch.load(tmp_path / "optimizer.pt", map_location=torch.device("cpu", 1), weights_only=True)
    assert loaded["exp_avg"].tolist() == [0, 1, 2] and loaded["exp_avg"].device.type == "cpu"
