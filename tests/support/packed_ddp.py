"""Each of two ranks runs this for tests/trainer/loss/test_logprobs.py: a packed backward under DDP and by hand.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python -m tests.support.packed_ddp FOLDER

It also contains the models and batches that those tests share.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from tests.conftest import make_random_model
from tools.tiny_policy.tokenizer import make_tokenizer
from trl_search.trainer.loss.logprobs import LogProbs, enable_scoring

TOKENIZER = make_tokenizer()
TEMPERATURE = 0.7


def make_model(attention: str, **changes) -> Qwen2ForCausalLM:
    model = make_random_model(TOKENIZER)
    if changes:
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(changed(model.config, **changes)).eval()
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    enable_scoring(model, attention)
    return model


def changed(config, **changes):
    kept = {key: value for key, value in config.to_dict().items() if key != "layer_types"}  # a derived key
    return Qwen2Config(**{**kept, **changes})


def ids_for(attention_mask, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(300, 1500, attention_mask.shape, generator=generator) * attention_mask


def gradient(model, value):
    model.zero_grad()
    value.backward()
    assert all(p.grad is not None for p in model.parameters())  # DDP waits for all of them
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def a_batch(rows=8, prompt=10, completion=40):
    mask = torch.zeros(rows, prompt + completion, dtype=torch.long)
    for row in range(rows):
        mask[row, row % prompt : prompt + 5 + (completion - 5) * row // (rows - 1)] = 1
    return ids_for(mask), mask, (torch.arange(completion) % 3 > 0).long().expand(rows, -1)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    batches = [a_batch(rows=8), a_batch(rows=3, completion=20)]
    packs: list[int] = []

    def most(count: int) -> int:
        packs.append(count)
        counts = torch.tensor(count)
        dist.all_reduce(counts, dist.ReduceOp.MAX)
        return int(counts)

    def loss(model, batch, logprobs):
        ids, mask, loss_mask = batch
        return logprobs(model, ids, mask, loss_mask.shape[1], loss_mask)[0].sum()

    model = make_model("sdpa").train()
    expected = sum(gradient(model, loss(model, batch, LogProbs("sdpa", 100))) for batch in batches) / 2
    # As in the Trainer: DDP searches for unused parameters and broadcasts buffers at every forward.
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    forwards: list[int] = []
    wrapped.register_forward_pre_hook(lambda *_: forwards.append(1))
    got = gradient(model, loss(wrapped, batches[rank], LogProbs("sdpa", 100, most)))
    result = {
        "packs": packs[0],
        "forwards": len(forwards),
        "difference": float((got - expected).abs().max() / expected.abs().max()),
        "norm": float(expected.norm()),
    }
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)  # both ranks once finished and then hung in gloo's shutdown


if __name__ == "__main__":
    main(Path(sys.argv[1]))
