"""Trains the tiny policy from scratch, in a loop that makes a small model learn to copy.

Two things are necessary (without them, a model of this size stays at 2 to 5 % for hours):

1. at first, half of each batch is repeated random words, `w1 ... wn w1 ... wn ...`, the simplest copying task;
2. at first, the loss is on all tokens, including the world's, and only at the end on the policy's alone.

Worker processes generate data from new worlds continuously; a ring of recent rows buffers them.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import Queue as ProcessQueue
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2ForCausalLM

from tools.tiny_policy.samples import (
    ANSWER,
    KINDS,
    PADDING,
    POLICY,
    ROW,
    Rows,
    Sample,
    pack,
    samples_of_world,
)


@dataclass(frozen=True)
class Plan:
    """Duration, sizes and rates. Shares are shares of the whole time."""

    minutes: float = 7.0
    max_steps: int = 1_000_000
    workers: int = 14
    rows: int = 128  # rows of `ROW` tokens per step
    repetitions: int = 256  # rows of `repetition_tokens` tokens per step
    repetition_tokens: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    repetition_share: float = 0.2
    all_tokens_share: float = 0.6
    constant_share: float = 0.4
    ring_rows: int = 8192
    first_rows: int = 768
    samples_a_world: int = 512
    log_steps: int = 50
    evaluate_steps: int = 250
    save_seconds: float = 60.0


class Ring:
    """The most recent rows, on the device. Rows are drawn at random; new rows replace the oldest."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.ids = torch.zeros(capacity, ROW, dtype=torch.int16, device=device)
        self.roles = torch.zeros(capacity, ROW, dtype=torch.uint8, device=device)
        self.positions = torch.zeros(capacity, ROW, dtype=torch.int16, device=device)
        self.capacity, self.added = capacity, 0

    def add(self, rows: Rows) -> None:
        at = (torch.arange(len(rows.ids)) + self.added) % self.capacity
        for store, new in ((self.ids, rows.ids), (self.roles, rows.roles), (self.positions, rows.positions)):
            store[at.to(store.device)] = torch.from_numpy(new.astype("int16")).to(store.device).to(store.dtype)
        self.added += len(rows.ids)

    def draw(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ids, roles and positions of `n` rows, each (n, ROW)."""
        pick = torch.randint(min(self.added, self.capacity), (n,), device=self.ids.device)
        return self.ids[pick].long(), self.roles[pick], self.positions[pick].long()


def train(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_folder: Path,
    plan: Plan,
    *,
    word_ids: Sequence[int],
    save: Callable[[], None],
    seed: int = 0,
) -> None:
    """Trains in place until the time or the steps are used up.

    Args:
        tokenizer_folder (`Path`): The folder from which the workers load the tokenizer.
        word_ids (`Sequence[int]`): The words of the repetitions.
        save (`Callable`): Called every `save_seconds` and at the end.
    """
    started = saved = time.monotonic()
    device = model.device
    torch.manual_seed(seed)
    held_out = samples_of_world(10**9 + seed, tokenizer, plan.samples_a_world)
    ring = Ring(plan.ring_rows, device)
    words = torch.tensor(list(word_ids), device=device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda"
    )
    with _producers(plan, tokenizer_folder, seed) as produced:
        while ring.added < plan.first_rows:
            ring.add(produced.get(timeout=180))
        print(f"[{time.monotonic() - started:5.0f} s] {ring.added} rows are ready; training begins", flush=True)
        # The schedule starts at the first step and ends with the whole time.
        first_step = time.monotonic()
        end = started + 60 * plan.minutes
        step = 0
        while step < plan.max_steps and time.monotonic() < end:
            while True:
                try:
                    ring.add(produced.get_nowait())
                except queue.Empty:
                    break
            share = max((time.monotonic() - first_step) / (end - first_step), step / plan.max_steps)
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * _schedule(step, share, plan)
            loss, policy_loss = _conversation_loss(model, ring.draw(plan.rows), share < plan.all_tokens_share)
            copying = torch.zeros((), device=device)
            if share < plan.repetition_share:
                copying = _repetition_loss(model, words, plan)
            (loss + copying).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % plan.log_steps == 0 or step == plan.max_steps:
                elapsed = time.monotonic() - first_step
                print(
                    f"[{time.monotonic() - started:5.0f} s] step {step} ({1000 * elapsed / step:.0f} ms)  "
                    f"loss {loss.item():.3f}  policy {policy_loss.item():.3f}  copying {copying.item():.3f}  "
                    f"each row used {step * plan.rows / ring.added:.1f} times",
                    flush=True,
                )
            if step % plan.evaluate_steps == 0:
                print(f"         teacher-forced EM: {_show(answer_accuracy(model, held_out))}", flush=True)
            if time.monotonic() - saved > plan.save_seconds:
                save()
                saved = time.monotonic()
    save()
    print(
        f"[{time.monotonic() - started:5.0f} s] {step} steps; EM: {_show(answer_accuracy(model, held_out))}",
        flush=True,
    )


def _schedule(step: int, share: float, plan: Plan) -> float:
    """Warm-up by steps, then constant, then linear decay to 2 % by time."""
    decay = 1.0 - 0.98 * max(0.0, share - plan.constant_share) / (1.0 - plan.constant_share)
    return min(1.0, (step + 1) / plan.warmup_steps) * max(0.02, decay)


def _conversation_loss(
    model: Qwen2ForCausalLM, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], all_tokens: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss of the trained tokens and, for the log, of the policy's tokens."""
    ids_BT, roles_BT, positions_BT = batch
    sample_BT = (positions_BT == 0).cumsum(dim=1)
    # A token sees only earlier tokens of its own sample.
    visible_BTT = (sample_BT.unsqueeze(2) == sample_BT.unsqueeze(1)).tril_()
    hidden_BTD = _hidden(model, ids_BT, positions_BT, visible_BTT.unsqueeze(1))
    target_roles = roles_BT[:, 1:]
    policy = target_roles >= POLICY
    learned = ((target_roles != PADDING) if all_tokens else policy) & (positions_BT[:, 1:] != 0)
    losses_N = _token_losses(model, hidden_BTD[:, :-1][learned], ids_BT[:, 1:][learned])
    return losses_N.mean(), losses_N.detach()[policy[learned]].mean()


def _repetition_loss(model: Qwen2ForCausalLM, words: torch.Tensor, plan: Plan) -> torch.Tensor:
    """The loss on the repeats of random words, with a random period."""
    period = int(torch.randint(8, plan.repetition_tokens // 2, ()))
    shape = (plan.repetitions, period)
    first_BP = words[torch.randint(len(words), shape, device=words.device)]
    ids_BT = first_BP.repeat(1, plan.repetition_tokens // period + 1)[:, : plan.repetition_tokens]
    positions_BT = torch.arange(plan.repetition_tokens, device=words.device).expand_as(ids_BT)
    hidden_BTD = _hidden(model, ids_BT, positions_BT, None)
    # The token after the first period is the first repeated one.
    repeats_BTD, targets_BT = hidden_BTD[:, period - 1 : -1], ids_BT[:, period:]
    return _token_losses(model, repeats_BTD.flatten(0, 1), targets_BT.flatten()).mean()


def _hidden(
    model: Qwen2ForCausalLM, ids_BT: torch.Tensor, positions_BT: torch.Tensor, visible: torch.Tensor | None
) -> torch.Tensor:
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=ids_BT.is_cuda):
        output = model.model(input_ids=ids_BT, position_ids=positions_BT, attention_mask=visible, use_cache=False)
    hidden_BTD: torch.Tensor = output.last_hidden_state
    return hidden_BTD


def _token_losses(model: Qwen2ForCausalLM, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=hidden_ND.is_cuda):
        logits_NV = model.lm_head(hidden_ND)
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="none")


@torch.no_grad()
def answer_accuracy(model: Qwen2ForCausalLM, samples: Sequence[Sample]) -> dict[str, float]:
    """For each kind of sample, how often all tokens of the answer are the most likely ones, given the rest."""
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    model.eval()
    for start in range(0, len(samples), 64):
        chunk = samples[start : start + 64]
        width = max(len(sample.ids) for sample in chunk)
        ids_BT = torch.zeros(len(chunk), width, dtype=torch.long)
        answer_BT = torch.zeros(len(chunk), width, dtype=torch.bool)
        for row, sample in enumerate(chunk):
            ids_BT[row, : len(sample.ids)] = torch.from_numpy(sample.ids.astype("int64"))
            answer_BT[row, : len(sample.ids)] = torch.from_numpy(sample.roles == ANSWER)
        ids_BT, answer_BT = ids_BT.to(model.device), answer_BT.to(model.device)
        positions_BT = torch.arange(width, device=model.device).expand_as(ids_BT)
        guess_BT = model.lm_head(_hidden(model, ids_BT, positions_BT, None).to(model.dtype))[:, :-1].argmax(dim=-1)
        wrong_B = ((guess_BT != ids_BT[:, 1:]) & answer_BT[:, 1:]).any(dim=1)
        for sample, wrong in zip(chunk, wrong_B.tolist(), strict=True):
            right[sample.kind].append(not wrong)
    model.train()
    return {kind: sum(hits) / len(hits) for kind, hits in right.items() if hits}


@contextmanager
def _producers(plan: Plan, tokenizer_folder: Path, seed: int) -> Iterator[ProcessQueue[Rows]]:
    """Runs worker processes that fill a queue with rows until the block ends."""
    context = multiprocessing.get_context("spawn")
    produced: ProcessQueue[Rows] = context.Queue(maxsize=4 * plan.workers)
    workers = [
        context.Process(target=_produce, args=(produced, tokenizer_folder, plan, seed, worker), daemon=True)
        for worker in range(plan.workers)
    ]
    # One core per worker: no additional threads and no GPU.
    quiet = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    before = {key: os.environ.get(key) for key in quiet}
    os.environ.update(quiet)
    try:
        for worker in workers:
            worker.start()
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
    try:
        yield produced
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()


def _produce(produced: ProcessQueue[Rows], tokenizer_folder: Path, plan: Plan, seed: int, worker: int) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    world = worker
    while True:
        produced.put(pack(samples_of_world(seed * 1_000_003 + world, tokenizer, plan.samples_a_world)))
        world += plan.workers


def _show(accuracy: dict[str, float]) -> str:
    return "  ".join(f"{kind} {value:.3f}" for kind, value in accuracy.items())
