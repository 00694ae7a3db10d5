"""Which GPU a thread uses."""

from __future__ import annotations

import pytest
import torch

from trl_search.policies.thread_device import use_device


@pytest.mark.parametrize(("device", "used"), [("cuda:3", [3]), ("cuda", []), ("cpu", []), ("cpu:1", [])])
def test_only_a_numbered_gpu_is_chosen(device, used, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    use_device(torch.device(device))
    assert chosen == used
