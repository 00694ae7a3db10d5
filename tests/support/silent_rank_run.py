"""Each of two ranks runs this for tests/trainer/test_silent_rank.py, and the test runs it in one process.

    RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python -m tests.support.silent_rank_run DIR

Two steps of four groups of two. The first two groups of a step have a gradient, the last two have none: one process
trains on all four; of two ranks, the second has only groups without a gradient. DIR/<ranks>_<rank>.json: the results.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.fakes import FixedRetriever
from tests.support.scripted_trainer import GOLD, PASSAGES, answer, scripted_trainer, search, steps
from tests.trainer.groups.test_refill import DATA, asked, book

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "grpo": {"loss_type": "grpo"},
    "failed": {"max_failed_share": 0.9},
    "refilled": {"refill_groups": 2},
}


def useful(question: int) -> bool:
    """Whether the question is in the first half of a step, which rank 0 of two gets."""
    return question < 8 and question % 4 < 2


def train(folder: Path, case: str) -> dict[str, Any]:
    ranks = PartialState().num_processes
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")

    def script(number: int, prompt: str) -> list[str]:
        question = book(prompt)
        words = "poison" if case == "failed" and not useful(question) else f"author of {question}"
        return [search(words), answer(GOLD if useful(question) and number % 2 else "Nobody")]

    options = {
        "per_device_train_batch_size": 8 // ranks // CASES[case].get("gradient_accumulation_steps", 1),
        "num_generations": 2,
        "shuffle_dataset": False,
        "optim": "sgd",  # AdamW would divide by gradients that are rounding errors
        "learning_rate": 0.3,
        "max_grad_norm": 1e9,  # clipping the norm would hide a wrong factor
        **CASES[case],
    }
    trainer = scripted_trainer(
        folder / f"{case}_{ranks}", model, tokenizer, script, data=DATA,
        retriever=FixedRetriever(PASSAGES, poison="poison"), **options,
    )  # fmt: skip
    seen: list[dict[str, Any]] = []
    score = trainer._generate_and_score_completions

    def scored(inputs: Any) -> Any:
        batch = score(inputs)
        seen.append(
            {
                "books": asked(trainer),
                "in_loss": int((batch["completion_mask"] * batch["tool_mask"]).sum()),
                "num_items": int(batch["num_items_in_batch"]),
                "silent": [advantage == 0 for advantage in batch["advantages"].tolist()],
            }
        )
        return batch

    trainer._generate_and_score_completions = scored
    trainer.train()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    rank = PartialState().process_index
    torch.save(weights, folder / f"{case}_{ranks}_{rank}.pt")
    return {"batches": seen, "logged": steps(trainer)}


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    seen = {case: train(folder, case) for case in CASES}
    (folder / f"{state.num_processes}_{state.process_index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
