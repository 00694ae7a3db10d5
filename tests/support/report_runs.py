"""Run folders for the tests of the report, written in the schema of `run_folder.py`."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from trl_search.config.run_file import RUN_FILE
from trl_search.records.folder import METRICS_FILE, TRAJECTORY_SCHEMA, trajectory_file

SCHEMA = TRAJECTORY_SCHEMA.append(pyarrow.field("rewards/em", pyarrow.float64())).append(
    pyarrow.field("rewards/format", pyarrow.float64())
)
VOCABULARY = (
    "the of and in to a was is river mill founded by born city Orlune Talvane Amber harbour bridge painter who where "
    "question passage first again verify because therefore"
)


def split(text: str) -> list[str]:
    """Tokens of a few characters, which split tags as real tokenizers do."""
    return re.findall(r"\s?\w{1,6}|\s|[^\w\s]", text)


def trajectory(step: int, index: int, turns: list[tuple[str, str]], **values: Any) -> dict[str, Any]:
    """A row of a trajectory file; `turns` are roles and texts, and the assistant's tokens are trained on."""
    tokens: list[str] = []
    mask: list[int] = []
    spans = []
    for role, text in turns:
        start = len(tokens)
        tokens += split(text)
        mask += [int(role == "assistant")] * (len(tokens) - start)
        spans.append({"role": role, "start": start, "end": len(tokens)})
    row: dict[str, Any] = {
        "step": step,
        "group": index // 4,
        "index": index,
        "id": f"world-{index // 4}",
        "data_source": "world",
        "question": "who founded Orlune?",
        "golden_answers": ["Mira Talvane"],
        "prompt": f"<|im_start|>user\n{values.get('question', 'who founded Orlune?')}<|im_end|>\n",
        "tokens": tokens,
        "mask": mask,
        "logprobs": [-0.001 * (i % 900) * bit for i, bit in enumerate(mask)],
        "turns": spans,
        "answer": "Mira Talvane",
        "reward": 1.0,
        "rewards/em": 1.0,
        "rewards/format": 1.0,
        "advantage": 0.5,
        "searches": sum(role == "tool" for role, _ in turns),
        "calls": sum(role == "tool" for role, _ in turns),
        "malformed": 0,
        "model_tokens": sum(mask),
        "observation_tokens": len(mask) - sum(mask),
        "stop_reason": "answer",
        "error": "",
        "generation_s": 0.25,
        "search_s": 0.01,
    }
    return {**row, **values}


def scripted(step: int, index: int, chance: random.Random, *, words: int) -> dict[str, Any]:
    """A trajectory of about `words` words that randomly searches or guesses and is correct or wrong."""
    searched, right = chance.random() < 0.6, chance.random() < 0.5
    answer = "Mira Talvane" if right else chance.choice(["Bram Holt", "Ilse Norr", "the river"])

    vocabulary = VOCABULARY.split()

    def prose(n: int) -> str:
        return " ".join(chance.choices(vocabulary, k=n))

    turns = [("assistant", f"<think> {prose(words // 4)} </think>\n<answer> {answer} </answer>")]
    if searched:
        call = '<tool_call>\n{"name": "search", "arguments": {"query_list": ["who founded Orlune"]}}\n</tool_call>'
        turns = [
            ("assistant", f"<think> {prose(words // 8)} </think>\n{call}<|im_end|>"),
            ("tool", f"\n<|im_start|>user\n<tool_response>\n{prose(words // 2)}\n</tool_response><|im_end|>\n"),
            *turns,
        ]
    return trajectory(
        step,
        index,
        turns,
        question=f"who founded Orlune, number {index // 4} of step {step}?",
        answer=answer,
        reward=float(right),
        advantage=round(chance.uniform(-1.5, 1.5), 3),
        stop_reason="answer" if chance.random() < 0.9 else "token_budget",
        **{"rewards/em": float(right)},
    )


def write_trajectories(folder: Path, step: int, rows: list[dict[str, Any]]) -> Path:
    path = trajectory_file(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=SCHEMA), path)
    return path


def write_run(folder: Path, *, steps: int = 6, a_step: int = 8, words: int = 60, seed: int = 0, **config: Any) -> Path:
    """Writes the folder of a run that learns, with run.json, metrics.jsonl and trajectories."""
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    info = {
        "format": 1,
        "started_at": "2026-01-02T03:04:05+00:00",
        "command": "trl-search train quickstart",
        "versions": {"trl-search": "0.1.0", "trl": "1.16.0"},
        "git": {"commit": "57335d9", "branch": "main", "dirty": False},
        "hardware": {"cpu": 2, "gpus": []},
        "config": {"learning_rate": 1e-4, "num_generations": 8, "seed": seed, **config},
        "task": {"questions": "world"},
        "model": "tiny",
        "protocol": "qwen_tools",
        "resumed_from_step": [],
    }
    (folder / RUN_FILE).write_text(json.dumps(info), encoding="utf-8")
    with (folder / METRICS_FILE).open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps(_metrics(step, steps, chance)) + "\n")
    for step in range(1, steps + 1):
        write_trajectories(folder, step, [scripted(step, index, chance, words=words) for index in range(a_step)])
    return folder


def _metrics(step: int, steps: int, chance: random.Random) -> dict[str, float | int]:
    learnt = step / steps
    noise = chance.uniform(-0.04, 0.04)
    row: dict[str, float | int] = {
        "step": step,
        "reward": round(0.1 + 0.8 * learnt + noise, 4),
        "reward_std": 0.4 - 0.2 * learnt,
        "rewards/em/mean": round(0.1 + 0.8 * learnt + noise, 4),
        "rewards/format/mean": 0.97,
        "entropy": 0.6 - 0.3 * learnt + noise,
        "kl": 0.02 * learnt,
        "grad_norm": 0.5 + noise,
        "loss": noise,
        "search/searches": 0.4 + 1.4 * learnt,
        "search/turns": 1.4 + 1.4 * learnt,
        "search/malformed_calls": 0.1 * (1 - learnt),
        "frac_reward_zero_std": 0.2 + noise,
        "tokens/model": 20 + 30 * learnt,
        "tokens/observation": 30 + 80 * learnt,
        "stop/answer": 0.7 + 0.25 * learnt,
        "stop/token_budget": 0.3 - 0.25 * learnt,
        "stop/environment": 0.0,
        "reflection/ratio": 0.05 + 0.3 * learnt + noise,
        "reflection/phrases_per_1k_tokens": 2 + 5 * learnt,
        "step_time": 2.7,
        "time/generation_s": 0.4,
        "time/search_s": 0.01,
    }
    if step % 2 == 0:
        row |= {"eval/em": 0.2 + 0.5 * learnt, "eval/f1": 0.25 + 0.5 * learnt}
        row |= {"eval/reflection_ratio": 0.05 + 0.25 * learnt + noise}
        row |= {"eval/nq/em": 0.3 + 0.4 * learnt, "eval/hotpotqa/em": 0.1 + 0.6 * learnt}
    return row
