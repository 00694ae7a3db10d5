"""Rollout throughput of `SearchGRPOTrainer` and of stock `trl.GRPOTrainer` with a search tool, side by side, on CPU.

    python benchmarks/rollout.py                                # 64 trajectories; retriever calls of +0, 20, 200 ms
    python benchmarks/rollout.py --repeats 3 --delays_ms 20

Both trainers get the shipped tiny policy, the same rows (groups of 8), the same sampling and budgets, and one BM25
retriever over the embedded world, with a sleep per *call*, independent of the number of queries in it. Stock TRL gets
it as a tool, `search(query_list)`, which formats passages like ours. A batch is one
`_generate_and_score_completions(rows)`: the rollout and its rewards, as in a training step up to the loss (with these
settings it runs no forward for log-probs). The two run alternately after a warm-up of each; times are medians.

"only searching" is the share of the batch in which a search was running but not the policy: the time that a rollout
loses to its retriever. The policy runs during `generate` (stock), or during the engine's prefill or decode (ours).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest import mock

import datasets
import torch
import transformers
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from trl_search import SearchGRPOConfig, SearchGRPOTrainer
from trl_search.data.world import generate_world
from trl_search.environment import SearchEnvironment
from trl_search.policies.tiny import tiny_policy_path
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.protocols import load_protocol
from trl_search.retrieval import Retriever, load_retriever
from trl_search.rewards import em
from trl_search.types import Passage

GROUP = 8
MAX_SEARCHES = 3
MAX_TOKENS = 512
PASSAGES = 3

Interval = tuple[float, float]


class Clock:
    """The intervals in which something ran."""

    def __init__(self) -> None:
        self.intervals: list[Interval] = []

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return run

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.intervals.append((self._started, time.perf_counter()))


class SlowRetriever(Retriever):
    """A retriever with a delay per call. It checks that it is never called from two threads at once."""

    def __init__(self, retriever: Retriever, clock: Clock) -> None:
        self.retriever, self.clock = retriever, clock
        self.delay_s = 0.0
        self.queries = 0
        self.busy = False

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        assert not self.busy, "one clock does not time two calls at once"
        self.busy = True
        with self.clock:
            self.queries += len(queries)
            time.sleep(self.delay_s)
            results = self.retriever.search(queries, k)
        self.busy = False
        return results


@dataclass(frozen=True)
class Batch:
    """One rollout batch, measured."""

    seconds: float
    only_searching_s: float
    calls: int
    queries: int
    searches: float
    model_tokens: float
    em: float


def seconds_without(these: Sequence[Interval], those: Sequence[Interval]) -> float:
    """Seconds in which any of `these` ran but none of `those`."""
    edges = sorted(
        [
            (at, kind, step)
            for kind, spans in enumerate((these, those))
            for span in spans
            for at, step in zip(span, (1, -1), strict=True)
        ]
    )
    total, open_spans, last = 0.0, [0, 0], 0.0
    for at, kind, step in edges:
        if open_spans[0] and not open_spans[1]:
            total += at - last
        open_spans[kind] += step
        last = at
    return total


def search_tool(retriever: Retriever) -> Callable[[list[str]], str]:
    """The search tool as a user of stock TRL would write it."""
    environment = SearchEnvironment(retriever)

    def search(query_list: list[str]) -> str:
        """
        Searches an encyclopedia and returns the passages that fit each query best.

        Args:
            query_list: Fully-formed semantic queries.

        Returns:
            The passages.
        """
        found = retriever.search(query_list, PASSAGES)
        return "\n".join(document for passages in found for document in environment.show(passages))

    return search


def make_trainers(retriever: Retriever, questions: Dataset, folder: str) -> dict[str, GRPOTrainer]:
    """Stock TRL and ours by name, each with its own copy of the same model."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path(), padding_side="left")
    protocol = load_protocol("qwen_tools", tokenizer, instruction="")
    rows = questions.map(lambda row: {"prompt": protocol.messages(row["question"])})
    common: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": len(questions) * GROUP,
        "num_generations": GROUP,
        "max_completion_length": MAX_TOKENS,
        "temperature": 1.0,
        "beta": 0.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }

    def model() -> PreTrainedModel:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_policy_path(), dtype="float32")
        return loaded

    stock = GRPOTrainer(
        model=model(),
        reward_funcs=[em],
        args=GRPOConfig(**common, max_tool_calling_iterations=MAX_SEARCHES),
        train_dataset=rows,
        processing_class=tokenizer,
        tools=[search_tool(retriever)],
    )
    ours = SearchGRPOTrainer(
        model=model(),
        reward_funcs=[em],
        args=SearchGRPOConfig(
            **common,
            instruction="",
            max_searches=MAX_SEARCHES,
            passages_per_query=PASSAGES,
            # As in stock TRL, only the budget of the whole trajectory limits a turn or an observation.
            max_turn_length=MAX_TOKENS,
            max_observation_length=MAX_TOKENS,
            rollout_batch_size=len(questions) * GROUP,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        retriever=retriever,
    )
    return {"stock TRL": stock, "trl-search": ours}


@contextmanager
def policy_clock(trainers: dict[str, GRPOTrainer]) -> Iterator[Clock]:
    """Measures the policy time of both trainers."""
    clock = Clock()
    stock: Any = trainers["stock TRL"].model
    with (
        mock.patch.object(TransformersPolicy, "_prefill", clock.timed(TransformersPolicy._prefill)),
        mock.patch.object(TransformersPolicy, "_decode", clock.timed(TransformersPolicy._decode)),
        mock.patch.object(stock, "generate", clock.timed(stock.generate)),
    ):
        yield clock


def run_batch(
    trainer: GRPOTrainer, rows: list[dict[str, Any]], retriever: SlowRetriever, policy: Clock, seed: int
) -> Batch:
    torch.manual_seed(seed)
    assert trainer.model is not None
    trainer.model.train()
    trainer._metrics["train"].clear()
    retriever.clock.intervals.clear()
    policy.intervals.clear()
    retriever.queries = 0
    started = time.perf_counter()
    trainer._generate_and_score_completions([dict(row) for row in rows])
    seconds = time.perf_counter() - started
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return Batch(
        seconds=seconds,
        only_searching_s=seconds_without(retriever.clock.intervals, policy.intervals),
        calls=len(retriever.clock.intervals),
        queries=retriever.queries,
        searches=metrics.get("search/searches", metrics.get("tools/call_frequency", 0.0)),
        model_tokens=metrics["completions/mean_length"],
        em=metrics["rewards/em/mean"],
    )


def table(measured: dict[tuple[int, str], list[Batch]], trajectories: int) -> str:
    lines = [
        "| delay per call | trainer | seconds per batch (min–max) | trajectories/s | speed-up | only searching | "
        "retriever calls | searches per trajectory | model tokens per trajectory | EM |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def median(delay: int, name: str, value: Callable[[Batch], float]) -> float:
        return statistics.median(map(value, measured[delay, name]))

    for (delay, name), batches in measured.items():
        seconds = median(delay, name, lambda batch: batch.seconds)
        speed_up = median(delay, "stock TRL", lambda batch: batch.seconds) / seconds
        lines.append(
            f"| {delay} ms | {name} | {seconds:.2f} ({min(b.seconds for b in batches):.2f}–"
            f"{max(b.seconds for b in batches):.2f}) | {trajectories / seconds:.1f} | {speed_up:.1f}× | "
            f"{median(delay, name, lambda b: b.only_searching_s / b.seconds):.0%} | "
            f"{median(delay, name, lambda b: b.calls):.0f} | "
            f"{statistics.mean(b.searches for b in batches):.2f} | "
            f"{statistics.mean(b.model_tokens for b in batches):.0f} | {statistics.mean(b.em for b in batches):.3f} |"
        )
    return "\n".join(lines)


def versions() -> str:
    names = ("torch", "transformers", "trl", "bm25s")
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} torch threads; Python "
        f"{platform.python_version()}, " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trajectories", type=int, default=64, help=f"trajectories per batch, a multiple of {GROUP} (default 64)"
    )
    parser.add_argument(
        "--delays_ms", type=int, nargs="+", default=[0, 20, 200], help="delays of a retriever call (default 0 20 200)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="measured batches of each kind (default 5)")
    arguments = parser.parse_args()
    if arguments.trajectories < GROUP or arguments.trajectories % GROUP:
        parser.error(f"--trajectories {arguments.trajectories} is not a multiple of {GROUP}")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()

    world = generate_world(passages=2000, seed=0)
    questions = Dataset.from_list([question.row() for question in world.questions("train")]).select(
        range(arguments.trajectories // GROUP)
    )
    retriever = SlowRetriever(load_retriever("bm25", passages=world.passages), Clock())
    measured: dict[tuple[int, str], list[Batch]] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainers = make_trainers(retriever, questions, folder)
        dataset: Any = trainers["stock TRL"].train_dataset
        rows = [row for row in dataset for _ in range(GROUP)]
        batches = len(trainers) * (1 + len(arguments.delays_ms) * arguments.repeats)
        with policy_clock(trainers) as policy, tqdm(total=batches, unit="batch", disable=None) as bar:
            for trainer in trainers.values():
                run_batch(trainer, rows, retriever, policy, seed=0)
                bar.update()
            for delay in arguments.delays_ms:
                retriever.delay_s = delay / 1000
                measured |= {(delay, name): [] for name in trainers}
                for repeat in range(arguments.repeats):
                    for name, trainer in trainers.items():
                        batch = run_batch(trainer, rows, retriever, policy, seed=1 + repeat)
                        measured[delay, name].append(batch)
                        bar.update()
    print(table(measured, arguments.trajectories))
    print(f"\n{arguments.trajectories} trajectories per batch, {arguments.repeats} batches of each. {versions()}.")


if __name__ == "__main__":
    main()
