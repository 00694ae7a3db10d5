"""A fake `vllm.LLM` that records its calls, because vLLM's CPU build can neither sleep nor reload weights."""

from __future__ import annotations

import torch


class FakeLLM:
    """Has room for 512 tokens; `done` lists its calls, and `loaded` contains the latest weights."""

    def __init__(self, **options):
        self.options = options
        self.done = []
        self.llm_engine = self.model_config = self.model_executor = self.driver_worker = self.model_runner = self
        self.model = self
        self.device = torch.device("cpu")
        self.max_model_len = 512
        self.vllm_config = self.scheduler_config = self
        self.max_num_seqs = 64

    def sleep(self, level):
        self.done.append(f"sleep {level}")

    def wake_up(self, tags):
        self.done.append(f"wake {tags[0]}")

    def load_weights(self, weights):
        self.loaded = {name: tensor.clone() for name, tensor in weights}
        self.done.append("load")

    def reset_prefix_cache(self):
        self.done.append("reset")
