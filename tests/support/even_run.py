"""Each of two ranks runs this for tests/trainer/test_even_micro_batches.py: the same steps in TRL's order and dealt.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python -m tests.support.even_run FOLDER

Rank 0 has long trajectories, rank 1 short ones, and every second group has equal rewards. Each rank writes what its
micro-batches held to FOLDER/<kind>-<order>-<rank>.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer

from tests.support.distributed_run import own_question
from tests.support.scripted_trainer import ROWS, ScriptedTrainer, answer, scripted_trainer, search, steps
from trl_search.trainer.loss.mask import loss_mask_of

SHAPE: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_generations": 4,
    "max_steps": 2,
    # Adam would turn the rounding of small gradients into full steps.
    "optim": "sgd",
}
# Prompts of different lengths, so that the ranks pad them differently.
QUESTIONS = Dataset.from_list([{**row, "question": row["question"] + " Please." * i} for i, row in enumerate(ROWS)])
# Without and with log-probs of the old policy and of a reference; several optimizer steps per batch.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "old": {"num_iterations": 2, "beta": 0.1},
    "steps": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 8,
        "seed": 2,
        "max_steps": 4,
    },
}


def rewards(completions, question, **kwargs):
    """Different within the groups of even books, equal within those of odd ones."""
    return [float(i % 3) * (int(own_question(text)) % 2 == 0) for i, text in enumerate(question)]


class AsTRL(ScriptedTrainer):
    _prepare_inputs = GRPOTrainer._prepare_inputs


def rows_of(micro_batch: dict[str, torch.Tensor]) -> list[tuple[Any, ...]]:
    """Each row without its padding: tokens, which of them are in the loss, the advantage, and old log-probs."""
    found = []
    logps = [micro_batch[name] for name in ("old_per_token_logps", "ref_per_token_logps") if name in micro_batch]
    masks, advantages = loss_mask_of(micro_batch), micro_batch["advantages"].tolist()
    for i, advantage in enumerate(advantages):
        prompt = micro_batch["prompt_ids"][i][micro_batch["prompt_mask"][i].bool()].tolist()
        real = micro_batch["completion_mask"][i].bool()
        completion, mask = micro_batch["completion_ids"][i][real].tolist(), masks[i][real].tolist()
        assert not masks[i][~real].any()
        scores = [round(float(logps_BC[i][masks[i].bool()].sum()), 2) for logps_BC in logps]
        found.append((tuple(prompt), tuple(completion), tuple(mask), round(advantage, 5), *scores))
    return found


def train(folder: Path, kind: str, order: str, rank: int, tokenizer: Any) -> None:
    def script(number: int, prompt: str) -> list[str]:
        turns = [search(f"{turn} of {number}") for turn in range((1 - rank) * (number % 3 + 1))]
        return [*turns, answer(f"{own_question(prompt)} {number} {rank}")]

    trainer: Any = scripted_trainer(
        folder / kind / order, AutoModelForCausalLM.from_pretrained(folder / "model"), tokenizer, script,
        rewards=rewards, data=QUESTIONS, **{**SHAPE, **KINDS[kind]},
    )  # fmt: skip
    if order == "trl":
        trainer.__class__ = AsTRL
    seen: list[list[tuple[Any, ...]]] = []
    loss = trainer._compute_loss

    def recorded(model, inputs):
        seen.append(rows_of(inputs))
        return loss(model, inputs)

    trainer._compute_loss = recorded
    trainer.train()
    weights = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    logged = [{name: entry[name] for name in ("loss", "grad_norm")} for entry in steps(trainer)]
    torch.save({"micro_batches": seen, "weights": weights, "logged": logged}, folder / f"{kind}-{order}-{rank}.pt")


def main(folder: Path) -> None:
    rank = PartialState(cpu=True).process_index
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for kind in KINDS:
        for order in ("trl", "dealt"):
            train(folder, kind, order, rank, tokenizer)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
