"""Each of two ranks runs this for tests/trainer/groups/test_refill_ranks.py: refills, and writes FOLDER/rank<i>.json.

Rank 1 gets no group with a gradient in its first two draws, rank 0 gets one at once, so their numbers of trajectories
differ.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.scripted_trainer import GOLD, answer, config, scripted_trainer, steps
from tests.trainer.groups.test_refill import DATA, asked, book
from trl_search.common.errors import UserError


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    rank = state.process_index
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    shape = {"per_device_train_batch_size": 4, "num_generations": 2, "refill_groups": 4, "curriculum": "pass_rate"}

    def script(number: int, prompt: str) -> list[str]:
        useful = rank == 0 or number >= 8  # two draws of two groups of two
        return [answer(GOLD if useful and number % 2 else "Nobody")]

    def train(checkpoint: str | None = None) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        # transformers cannot load an optimizer to the "cpu:0" of several processes.
        saved = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
        trainer = scripted_trainer(folder, model, tokenizer, script, data=DATA, max_steps=2, **saved, **shape)
        trainer.train(checkpoint)
        return trainer

    def chosen(trainer: Any) -> dict[str, Any]:
        return {
            "asked": asked(trainer)[::2],
            "spare": [
                [book(question.row["question"]) for question in questions] for questions in trainer.last_rollout.spare
            ],
            "visits": len(trainer.question_choice.pass_rates.visits),
            "weights_N": trainer.question_choice.pass_rates.weights_N.tolist(),
        }

    trainer = train()
    batch = trainer.last_rollout
    seen = {
        "processes": state.num_processes,
        **chosen(trainer),
        "resumed": chosen(train(str(folder / "checkpoint-1"))),
        "replaced": [len(groups) for groups in batch.replaced.values()],
        "advantages": [log["frac_reward_zero_std"] for log in steps(trainer)] if rank == 0 else None,
        "logged": steps(trainer)[-1] if rank == 0 else None,
        "weights": hashlib.sha256(
            b"".join(p.detach().numpy().tobytes() for p in trainer.model.parameters())
        ).hexdigest(),
    }
    try:
        config(folder, **{**shape, "per_device_train_batch_size": 3})
    except UserError as error:
        seen["refused"] = str(error)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    shuffled = scripted_trainer(folder / "other", model, tokenizer, script, data=DATA.shuffle(seed=rank))
    try:
        shuffled.train()
    except UserError as error:
        seen["shuffled"] = str(error)
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
