"""Each of two ranks runs this for tests/trainer/groups/test_carry_over.py: rank 0 has a slow search, rank 1 has none.

    RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python -m tests.support.carry_over_run DIR

A run of three steps, and one that resumes from step one; DIR/rank<r>.json says what each rank trained on.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tests.support.scripted_trainer import later_is_better, steps
from tests.support.slow_searches import gates_of, library_trainer, recorded, release_after, trained_books


def train(folder: Path, *, slow: list[int], resume: bool) -> dict[str, Any]:
    gates = gates_of(slow)
    trainer = library_trainer(
        folder / "run",
        str(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
        gates,
        rewards=later_is_better,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        save_only_model=True,  # transformers cannot load an optimizer to the "cpu:0" of several processes
    )
    for gate in gates.values():
        release_after(trainer, gate, rollouts=2)
    batches = recorded(trainer)
    trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-1") if resume else None)
    return {
        "books": [trained_books(batch) for batch, _ in batches],
        "advantages": [output["advantages"].tolist() for _, output in batches],
        "weights": sum(parameter.double().sum().item() for parameter in trainer.model.parameters()),
        "parked": [entry["carry_over/parked"] for entry in steps(trainer)],
    }


def main(folder: Path) -> None:
    rank = os.environ["RANK"]
    whole = train(folder, slow=[0] if rank == "0" else [], resume=False)
    resumed = train(folder, slow=[], resume=True)
    (folder / f"rank{rank}.json").write_text(json.dumps({"whole": whole, "resumed": resumed}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
