"""Makes a thread use the GPU of its process.

A new thread starts on GPU 0, whatever the main thread has chosen. PyTorch's own operators follow their tensors, but
Triton's kernels (Liger's, the Hub's) and `model.to("cuda")` in a user's function use the thread's current GPU.
"""

from __future__ import annotations

import torch


def use_device(device: torch.device) -> None:
    """Makes `device` the current one of the calling thread; nothing changes for a CPU."""
    if device.type != "cpu" and device.index is not None:  # accelerate numbers the CPUs of its processes, too
        torch.accelerator.set_device_index(device.index)
