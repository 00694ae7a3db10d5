"""Each of two ranks runs this for test_held_out.py: trains FOLDER/model and writes FOLDER/rank<i>.json."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.scripted_trainer import GOLD, ROWS, answer, scripted_trainer, steps
from trl_search.trainer.callbacks.best_checkpoint import BestCheckpoint
from trl_search.trainer.callbacks.held_out import EvaluateEvery, HeldOut

RIGHT = {1: 1, 2: 4, 3: 2}  # correct answers to five questions after each step


def main(folder: Path) -> None:
    rank = PartialState(cpu=True).process_index
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    shape = {"per_device_train_batch_size": 2, "num_generations": 2, "max_steps": 3}
    trainer = scripted_trainer(folder / "run", model, tokenizer, **shape)
    rows = [{**row, "id": str(i), "data_source": "books"} for i, row in enumerate(ROWS[:5])]
    held_out = HeldOut(trainer, Dataset.from_list(rows))
    asked: list[int] = []
    training = trainer.actor.script = lambda number, prompt: [answer(GOLD if number else "Nobody")]
    generate = trainer.generation_policy

    @contextlib.contextmanager
    def measured(prompt_ids):
        """Answers held-out prompts according to `RIGHT`, and counts them; they are not a training batch."""
        measuring = len(prompt_ids) == len(rows)
        if measuring:
            trainer.actor.script = lambda number, prompt: [
                answer(GOLD if number_of(prompt) < RIGHT[trainer.state.global_step] else "Nobody")
            ]
        with generate(prompt_ids) as policy:
            yield policy
        if measuring:
            asked.append(len(trainer.actor.said))
            trainer.actor.script = training

    trainer.generation_policy = measured  # type: ignore[method-assign]
    trainer.add_callback(EvaluateEvery(1, held_out))
    trainer.add_callback(BestCheckpoint(held_out))
    trainer.train()
    history = [{"step": row["step"], "eval/em": round(row["eval/em"], 6)} for row in steps(trainer)]
    best = [trainer.state.best_global_step, trainer.state.best_metric, trainer.state.best_model_checkpoint]
    (folder / f"rank{rank}.json").write_text(json.dumps({"history": history, "best": best, "asked": asked}))


def number_of(prompt: str) -> int:
    return int(prompt.split("Who wrote book ")[1].split("?")[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
