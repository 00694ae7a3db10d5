"""Each of two ranks runs this for tests/trainer/test_distributed.py: trains FOLDER/model, writes FOLDER/rank<i>.json.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python -m tests.support.distributed_run FOLDER
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.fakes import FixedRetriever
from tests.support.scripted_trainer import DATA, PASSAGES, answer, real_trainer, scripted_trainer, search
from trl_search.records.folder import read_run, read_trajectories

# Three samples per rank and two per group: the second group has one member on each rank.
SHAPE: dict[str, Any] = {
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 3,
    "num_generations": 2,
    "max_steps": 3,
}


def checksum(model) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def own_question(prompt: str) -> str:
    return prompt.split("Who wrote book ")[1].split("?")[0]


def value(text: str) -> float:
    """A reward that depends on question, rank and number, so that any wrong pairing is noticed."""
    question, rank, number = map(int, text.split("-"))
    return float(question + 10 * rank + 3 * number * number)


def rewards(completions, question, **kwargs):
    said = [completion[-1]["content"].split("<answer> ")[1].split(" </answer>")[0] for completion in completions]
    assert [f"Who wrote book {text.split('-')[0]}?" for text in said] == list(question)
    return [value(text) for text in said]


def book_number(completions, question, **kwargs):
    return [float(own_question(text)) for text in question]


def record_batches(trainer) -> list[dict[str, list]]:
    """Records the answers and advantages of every later training batch of this rank."""
    batches: list[dict[str, list]] = []
    score = trainer._generate_and_score_completions

    def scored(inputs):
        batch = score(inputs)
        if trainer.model.training:
            said = [trajectory.actions[-1].text for trajectory in trainer.last_rollout.trajectories]
            batches.append({"said": said, "advantages": batch["advantages"].tolist()})
        return batch

    trainer._generate_and_score_completions = scored
    return batches


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    rank = state.process_index
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    seen: dict[str, object] = {"processes": state.num_processes, "backend": state.backend}

    def script(number: int, prompt: str) -> list[str]:
        turns = [search(f"{turn} of {number}") for turn in range(rank * (number + 1))]
        return [*turns, answer(f"{own_question(prompt)}-{rank}-{number}")]

    # 1. Rollouts with different numbers of turns and durations on the ranks.
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    before = checksum(model)
    trainer = scripted_trainer(
        folder, model, tokenizer, script, rewards=rewards, trainer={"eval_dataset": DATA.select(range(4))},
        **SHAPE,
    )  # fmt: skip
    batches = record_batches(trainer)
    trainer.actor.seconds = lambda number: rank * 0.1 * number
    started = time.perf_counter()
    trainer.train()
    seen["scripted"] = {
        "batches": batches,
        "turns": [len(said) for said in trainer.actor.said],
        "changed": checksum(model) != before,
        "weights": checksum(model),
        "seconds": time.perf_counter() - started,
        "logged": trainer.state.log_history[0] if rank == 0 else None,
    }
    if rank == 0:
        run = read_run(folder)
        rows = read_trajectories(run).select(["step", "group", "index", "answer", "advantage", "reward"]).to_pylist()
        seen["recorded"] = {"rows": rows, "steps": [row["step"] for row in run.history], "problems": run.problems}
    seen["evaluation"] = trainer.evaluate()["eval_reward"]

    # 2. An evaluation of four questions of two trajectories, in batches of six rows: the second batch is filled up.
    def as_often(number: int, prompt: str) -> list[str]:
        return [*[search("the author")] * int(own_question(prompt)), answer("x")]

    trainer = scripted_trainer(
        folder, str(folder / "model"), tokenizer, as_often, rewards=book_number,
        trainer={"eval_dataset": {"one": DATA.select(range(1)), "four": DATA.select(range(4))}}, **SHAPE,
    )  # fmt: skip
    seen["uneven"] = trainer.evaluate() | trainer.predict(DATA.select(range(2))).metrics

    # 3. The transformers policy: the same prompt on both ranks, different samples.
    real = real_trainer(folder, str(folder / "model"), tokenizer, data=DATA.select([0] * 8), **SHAPE)
    real.train()
    seen["real"] = {"ids": [t.ids for t in real.last_rollout.trajectories], "weights": checksum(real.model)}

    # 4. More searches of one rank fail than the share allows, so both ranks must stop at the same step.
    trainer = scripted_trainer(
        folder, str(folder / "model"), tokenizer, lambda number, prompt: [search(f"poison {rank}"), answer("x")],
        rewards=lambda completions, **kwargs: [0.0] * len(completions), max_failed_share=0.4,
        retriever=FixedRetriever(PASSAGES, poison="poison 1"), **SHAPE,
    )  # fmt: skip
    try:
        trainer.train()
    except RuntimeError as error:
        seen["stopped"] = str(error)
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
