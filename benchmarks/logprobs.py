"""Time and memory of forward and backward over 64 trajectories of unequal length: padded (stock TRL), packed (ours).

    python benchmarks/logprobs.py            # Qwen2.5-3B's shape, random weights, bf16; one GPU of 80 GiB or more
    python benchmarks/logprobs.py --tiny     # two layers on a CPU, a smoke run

A trajectory has a prompt of about 150 tokens and 1 to 4 turns of the policy with an observation between each two. In
all, there are 105,706 tokens, 26,069 of them the policy's; padded to the longest, 181,568. The tokens are random,
which does not affect the times. "stock TRL" is its own `_get_per_token_logps_and_entropies`, padded, with
micro-batches of the given number of rows; ours is its replacement in `SearchGRPOTrainer`. Both compute the gradient of
sum(logps x weights) over the policy's tokens, and the entropies, as a step of GRPO does; each micro-batch has its own
backward. Gradients must agree: the last column is the norm of each variant's gradient.

"recomputed" is what runs twice: layers (gradient checkpointing), whole packs (ours without it), or nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import random
import re
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
import trl
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from trl_search.common.errors import UserError
from trl_search.trainer.loss.attention import choose_attention
from trl_search.trainer.loss.logprobs import LogProbs, enable_scoring

QWEN_3B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
TINY: dict[str, Any] = {
    **QWEN_3B, "vocab_size": 2000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
REAL_TOKENS, MODEL_TOKENS, LONGEST = 105_706, 26_069, 2837  # 64 x 2837 = 181,568


@dataclass(frozen=True)
class Batch:
    """A padded batch: prompts padded on the left, completions on the right."""

    ids_BT: torch.Tensor
    attention_BT: torch.Tensor
    loss_mask_BC: torch.Tensor
    weights_BC: torch.Tensor

    def rows(self, start: int, end: int) -> Batch:
        """Some rows at the width of the whole batch, because TRL pads once."""
        return Batch(*(x[start:end] for x in (self.ids_BT, self.attention_BT, self.loss_mask_BC, self.weights_BC)))

    @property
    def columns(self) -> int:
        return self.loss_mask_BC.shape[1]


def scaled(parts: list[int], total: int) -> list[int]:
    """Integers in the same proportions with an exact sum, each at least one."""
    result = [max(1, part * total // sum(parts)) for part in parts]
    for i in range(abs(total - sum(result))):
        result[i % len(result)] += 1 if sum(result) < total else -1
    return result


def make_batch(device: torch.device, rows: int, shrink: int) -> Batch:
    """64 trajectories of 1 to 4 turns, with lengths scaled to the totals above (all divided by `shrink`)."""
    draw = random.Random(0)
    turns = [draw.choice([1, 2, 3, 3, 4]) for _ in range(rows)]
    turns[0] = 4
    prompts = [draw.randint(100, 200) // shrink + 1 for _ in range(rows)]
    spoken = scaled([draw.randint(60, 180) * count for count in turns], MODEL_TOKENS * rows // 64 // shrink)
    prompt, completion = max(prompts), LONGEST // shrink - max(prompts)
    # Tokens of observations: at most the room beside the turns, and exactly the total in sum.
    room = [completion - tokens if count > 1 else 0 for tokens, count in zip(spoken, turns, strict=True)]
    missing = REAL_TOKENS * rows // 64 // shrink - sum(prompts) - sum(spoken) - room[0]
    wanted = scaled([(count - 1) * draw.randint(300, 700) for count in turns[1:]], missing)
    read = [room[0], *map(min, wanted, room[1:])]
    missing -= sum(read[1:])
    for row in range(1, rows):
        more = min(missing, room[row] - read[row])
        read[row], missing = read[row] + more, missing - more
    attention = torch.zeros(rows, prompt + completion, dtype=torch.long)
    loss_mask = torch.zeros(rows, completion, dtype=torch.long)
    for row in range(rows):
        attention[row, prompt - prompts[row] : prompt + min(completion, spoken[row] + read[row])] = 1
        at = 0
        for turn in range(turns[row]):
            size = spoken[row] // turns[row] + (turn < spoken[row] % turns[row])
            loss_mask[row, at : at + size] = 1
            at += size + read[row] // max(1, turns[row] - 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, attention.shape, generator=generator) * attention
    weights = torch.randn(loss_mask.shape, generator=generator) * loss_mask
    return Batch(*(x.to(device) for x in (ids, attention, loss_mask, weights)))


# A batch of one micro-batch -> log-probs (B, C).
Forward = Callable[[PreTrainedModel, Batch], torch.Tensor]


def stock(accelerator: Accelerator) -> Forward:
    # Undecorated, without profiling: the method needs only the accelerator of its trainer.
    method = inspect.unwrap(GRPOTrainer._get_per_token_logps_and_entropies)
    trainer = types.SimpleNamespace(accelerator=accelerator)

    def forward(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        logps, _, _ = method(trainer, model, batch.ids_BT, batch.attention_BT, batch.columns, compute_entropy=True)
        return logps

    return forward


def ours(attention: str, max_packed_tokens: int, accelerator: Accelerator) -> Forward:
    logprobs = LogProbs(attention, max_packed_tokens)

    def forward(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        with accelerator.autocast():
            logps, _ = logprobs(
                model, batch.ids_BT, batch.attention_BT, batch.columns, batch.loss_mask_BC,
                gradient_checkpointing=any(getattr(m, "gradient_checkpointing", False) for m in model.modules()),
            )  # fmt: skip
        return logps

    return forward


@contextlib.contextmanager
def loaded(shape: dict[str, Any], device: torch.device, attention: str | None, checkpointing: bool) -> Iterator[Any]:
    """A separate model per variant, because preparing it for one kernel must not affect another variant."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(Qwen2Config(**shape), dtype=dtype)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if attention is not None:
        enable_scoring(model, attention)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    yield model.train()
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(model: PreTrainedModel, forward: Forward, batch: Batch, rows: int, repeats: int) -> tuple[float, float]:
    """Median seconds of a whole pass, in micro-batches of `rows`; the norm of its gradient."""
    seconds = []
    for _ in range(repeats + 1):  # the first compiles and allocates
        model.zero_grad(set_to_none=True)
        synchronize(batch.ids_BT.device)
        started = time.perf_counter()
        for start in range(0, len(batch.ids_BT), rows):
            part = batch.rows(start, start + rows)
            (forward(model, part) * part.weights_BC).sum().backward()
        synchronize(batch.ids_BT.device)
        seconds.append(time.perf_counter() - started)
    norm = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm()
    return sorted(seconds[1:])[repeats // 2], float(norm)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a smoke run: two layers, short trajectories, on a CPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="only variants whose name matches this regular expression")
    arguments = parser.parse_args()
    accelerator = Accelerator(cpu=arguments.tiny)
    device = accelerator.device
    shape = TINY if arguments.tiny else QWEN_3B
    batch = make_batch(device, *((16, 20) if arguments.tiny else (64, 1)))
    rows = len(batch.ids_BT)
    real, scored = int(batch.attention_BT.sum()), int(batch.loss_mask_BC.sum())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}")
    print(f"{rows} trajectories: {real:,} tokens, {scored:,} of the loss; padded {batch.attention_BT.numel():,}\n")

    probe = AutoModelForCausalLM.from_config(Qwen2Config(**TINY))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kernels = []
    for kernel in ("varlen", "flash_attention_2", "flex_attention", "sdpa" if arguments.tiny else ""):
        with contextlib.suppress(UserError):
            kernels += [choose_attention(kernel, probe, device=device, dtype=dtype)[0]] if kernel else []
    budgets = [256, 1024] if arguments.tiny else [8192, 16384, 32768]
    # Name, kernel or None for TRL's own, tokens per pack, rows per micro-batch, gradient checkpointing.
    variants: list[tuple[str, str | None, int, int, bool]] = [
        *((f"stock TRL, micro-batch {size}", None, 0, size, True) for size in (4, 8)),
        *((f"stock TRL, micro-batch {size}", None, 0, size, False) for size in (2, 4)),
        ("ours padded, by length", "padded", 1, rows, True),
    ]
    for kernel in kernels:
        variants += [(f"ours {kernel}, packs of {budget}", kernel, budget, rows, True) for budget in budgets]
        variants += [(f"ours {kernel}, packs of {budget}", kernel, budget, rows, False) for budget in budgets[:2]]
        # Micro-batches of one pack each, so nothing is recomputed.
        variants += [(f"ours {kernel}, micro-batch {size}", kernel, budgets[-1], size, False) for size in (4, 8)]

    print(f"{'variant':<38} {'recomputed':<12} {'seconds':>8} {'peak GiB':>9} {'grad norm':>10}")
    for label, attention, budget, size, checkpointing in variants:
        if not re.search(arguments.only, label):
            continue
        forward = stock(accelerator) if attention is None else ours(attention, budget, accelerator)
        packs = attention not in (None, "padded") and size == rows
        recomputed = "layers" if checkpointing else "packs" if packs else "nothing"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            with loaded(shape, device, attention, checkpointing) as model:
                seconds, norm = measure(model, forward, batch, size, arguments.repeats)
                peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
                print(f"{label:<38} {recomputed:<12} {seconds:8.2f} {peak:9.1f} {norm:10.4g}", flush=True)
        except torch.cuda.OutOfMemoryError:
            print(f"{label:<38} {recomputed:<12} out of memory", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
