"""The time that carry-over saves if search times have a long tail, and its cost if they have none; on a CPU.

    nice -n 15 python benchmarks/slow_searches.py                        # a few minutes on two idle cores
    nice -n 15 python benchmarks/slow_searches.py --steps 12 --repeats 3 --scale 0.1

Whole training steps of `SearchGRPOTrainer` with the shipped tiny policy in the embedded world: 8 groups of 4 per step,
one optimizer step each. Searches run concurrently, and each takes its own time:

| searches | seconds                                                                      |
|----------|------------------------------------------------------------------------------|
| tail     | log-normal around 1 s (sigma 1.5), 60 s at most; both times `--scale`        |
| no tail  | 1 s, times `--scale`                                                         |
| 20 ms    | 0.02 s, at every scale                                                       |

The cost of the tail depends on the time of the rest of a step. On two idle cores, a step takes some seconds, so
`--scale 0.1` has about the ratio of a 60 s tail to the step of a large model.

The variants run alternately, `--repeats` times, so that other load affects all of them. The first two steps of each
run are not counted. Seconds per step are medians; with carry-over the mean is also given, because one step that waits
for its tail pays for several that did not. CPU seconds are those of the process. The engine's work per step is also
counted, independently of the machine's load: its forwards, and their tokens of prompts and replies, with padding.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from trl_search import SearchGRPOConfig, SearchGRPOTrainer
from trl_search.data.world import generate_world
from trl_search.environment import SearchEnvironment
from trl_search.policies.tiny import tiny_policy_path
from trl_search.retrieval import load_retriever
from trl_search.types import Action, Observation, Search

GROUPS, GROUP = 8, 4
WARM_UP_STEPS = 2
MEDIAN_S, SIGMA, LONGEST_S = 1.0, 1.5, 60.0
VARIANTS = [("no tail", 1.0), ("tail", 1.0), ("tail", 1.5), ("20 ms", 1.0), ("20 ms", 1.5)]


def seconds_of(searches: str, scale: float) -> Callable[[random.Random], float]:
    """The time of a search, drawn independently for each."""
    return {
        "tail": lambda draw: scale * min(LONGEST_S, MEDIAN_S * math.exp(draw.gauss(0.0, SIGMA))),
        "no tail": lambda draw: scale * MEDIAN_S,
        "20 ms": lambda draw: 0.02,
    }[searches]


class SlowSearches(SearchEnvironment):
    """A `SearchEnvironment` in which each search takes its own time."""

    def __init__(self, retriever: Any, seconds: Callable[[random.Random], float]) -> None:
        super().__init__(retriever, max_searches=3)
        self.seconds, self.draw = seconds, random.Random(0)  # shared by the copies of all trajectories

    async def step(self, action: Action) -> Observation:
        if isinstance(action, Search):
            await asyncio.sleep(self.seconds(self.draw))
        return await super().step(action)


class StepTimes(TrainerCallback):
    """The end of each step in wall-clock and CPU seconds, and the work of the engine until then."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.forwards = self.prefilled = 0
        self.ends: list[tuple[float, float, int, int]] = []
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("use_cache"):
            self.forwards += 1
            self.prefilled += kwargs["input_ids"].numel() if kwargs["input_ids"].shape[1] > 1 else 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append((time.perf_counter(), time.process_time(), self.forwards, self.prefilled))

    @property
    def of_each_step(self) -> dict[str, list[float]]:
        ends = self.ends[WARM_UP_STEPS - 1 :]
        names = ("seconds", "CPU seconds", "forwards", "prefilled")
        return {name: [b[i] - a[i] for a, b in itertools.pairwise(ends)] for i, name in enumerate(names)}


def run(
    questions: Dataset,
    retriever: Any,
    seconds: Callable[[random.Random], float],
    carry_over: float,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_path(), dtype="float32")
    times = StepTimes(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SearchGRPOTrainer(
            model,
            "em",
            SearchGRPOConfig(
                folder,
                per_device_train_batch_size=GROUPS * GROUP,
                num_generations=GROUP,
                carry_over=carry_over,
                max_steps=steps + WARM_UP_STEPS,
                learning_rate=1e-4,
                max_completion_length=512,
                max_turn_length=96,
                max_observation_length=192,
                rollout_batch_size=2 * GROUPS * GROUP,
                instruction="",
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                logging_steps=1,
                log_trajectories=0,
                disable_tqdm=True,
                seed=seed,
            ),
            questions,
            processing_class=AutoTokenizer.from_pretrained(tiny_policy_path()),
            environment=SlowSearches(retriever, seconds),
            callbacks=[times],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry][WARM_UP_STEPS:]
    names = ("rollout/bubble", "carry_over/parked", "carry_over/tokens_age_0", "sampling/effective_sample_size")
    return {
        **times.of_each_step,
        **{name: [entry[name] for entry in logged if name in entry] for name in names},
    }


def table(results: dict[tuple[str, float], list[dict[str, Any]]]) -> str:
    lines = [
        "| searches | carry_over | seconds per step, median (mean) | of no carry-over (mean) | CPU seconds, mean "
        "| forwards | tokens prefilled | bubble | parked | tokens of the step's own weights | effective sample size |",
        "|" + "---|" * 11,
    ]

    def all_of(key: tuple[str, float], name: str) -> list[float]:
        # A step in which no group has a gradient has None.
        return [value for result in results[key] for value in result[name] if value is not None]

    for key in results:
        searches, carry_over = key
        seconds, base = all_of(key, "seconds"), all_of((searches, 1.0), "seconds")
        means = [
            f"{statistics.mean(values):.2f}" if (values := all_of(key, name)) else ""
            for name in (
                "rollout/bubble",
                "carry_over/parked",
                "carry_over/tokens_age_0",
                "sampling/effective_sample_size",
            )
        ]
        ratio = "" if carry_over == 1 else f"{statistics.mean(seconds) / statistics.mean(base):.2f}"
        lines.append(
            f"| {searches} | {carry_over:g} | {statistics.median(seconds):.2f} ({statistics.mean(seconds):.2f}) "
            f"| {ratio} | {statistics.mean(all_of(key, 'CPU seconds')):.2f} "
            f"| {statistics.mean(all_of(key, 'forwards')):.0f} | {statistics.mean(all_of(key, 'prefilled')):,.0f} "
            f"| {' | '.join(means)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="measured steps per run")
    parser.add_argument("--repeats", type=int, default=1, help="runs per variant")
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the times of `tail` and `no tail`")
    kinds = list(dict.fromkeys(searches for searches, _ in VARIANTS))
    parser.add_argument("--only", nargs="*", choices=kinds, default=kinds, help="only these kinds of searches")
    args = parser.parse_args()
    world = generate_world(passages=2000, seed=7)
    questions = Dataset.from_list([question.row() for question in world.questions("train")[:400]])
    retriever = load_retriever("bm25", passages=world.passages)
    variants = [variant for variant in VARIANTS if variant[0] in args.only]
    results: dict[tuple[str, float], list[dict[str, Any]]] = {variant: [] for variant in variants}
    for repeat in range(args.repeats):
        for variant in variants:
            searches, carry_over = variant
            seconds = seconds_of(searches, args.scale)
            results[variant].append(run(questions, retriever, seconds, carry_over, args.steps, seed=repeat))
            print(f"{variant}: {[round(value, 2) for value in results[variant][-1]['seconds']]}", flush=True)
    print(f"\n{table(results)}\n\ntorch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
