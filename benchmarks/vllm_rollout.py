"""A rollout batch with colocated vLLM: stock TRL's tool loop, trl-search, and the lower bound of the engine alone.

    python benchmarks/vllm_rollout.py                   # one GPU: 512 trajectories, Qwen2.5-3B shape, 20 ms per search
    python benchmarks/vllm_rollout.py --shape tiny --trajectories 32 --scale 0.1     # CPU, a smoke run

All rows follow one plan of turns and observations (`vllm_shape.py`) on one engine with random weights:

- stock TRL: `GRPOTrainer._generate` with `tools=`; the engine gets the planned length of each turn, and the parser the
  planned call. A call of its search tool takes `--search_ms`, and calls run one after another;
- trl-search: `SearchGRPOTrainer._generate`; a call of the retriever takes `--search_ms` for any number of queries;
- the bound: the engine alone, with the same prompts, turns and observations, without search, protocol or environment.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import cProfile
import pstats
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import vllm_shape
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer
from vllm_shape import CURRENT, GROUP, Plan

from trl_search import SearchGRPOConfig, SearchGRPOTrainer
from trl_search.common.event_loop import run_sync
from trl_search.environment import Environment, SearchEnvironment
from trl_search.policies import vllm_colocate
from trl_search.policies.vllm_colocate import VLLMColocatePolicy
from trl_search.protocols import Protocol, QwenTools
from trl_search.retrieval import Retriever
from trl_search.trainer.batch import Rollout
from trl_search.trainer.prompts import encode_prompts
from trl_search.types import Action, Answer, Completion, FinishReason, Passage, Sampling

MAX_TOKENS = 4096
SILENT_GROUPS = [0.0]  # the share of groups whose rewards are all equal


def random_reward(completions: list[Any], **columns: Any) -> list[float | None]:
    equal = int(SILENT_GROUPS[0] * len(completions) / GROUP) * GROUP
    return [0.0 if place < equal else random.random() for place in range(len(completions))]


class PlannedRetriever(Retriever):
    """Returns the planned number of tokens for the query `"<trajectory> <turn>"`, after a delay per call."""

    def __init__(self, plans: list[Plan], tokenizer: Any, delay_s: float) -> None:
        self.delay_s = delay_s
        self.texts = {
            f"{plan.index} {turn}": vllm_shape.words(tokenizer, tokens, f"{plan.index}/{turn}")
            for plan in plans
            for turn, tokens in enumerate(plan.observations)
        }

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        time.sleep(self.delay_s)
        return [[Passage(query, "", self.texts[query])] for query in queries]


# trl-search with the plan


class PlannedEnvironment(SearchEnvironment):
    """Assigns the plans to trajectories in the order of the prompts."""

    async def open(self) -> None:
        for plan in PLANS:
            plan.spoken = 0
        self.plans = iter(PLANS)
        await super().open()

    def start(self, row: Any) -> Environment:
        # The task of the trajectory calls this, so its context now has the plan.
        CURRENT.set(next(self.plans))
        return super().start(row)


def planned_generate(original: Callable[..., Any]) -> Callable[..., Any]:
    """Generates turns of the planned length, which end as if by EOS."""

    async def generate(self: Any, prompt_ids: Sequence[int], *, max_tokens: int, **options: Any) -> Completion:
        plan = CURRENT.get()
        completion = await original(self, prompt_ids, max_tokens=plan.turns[plan.spoken], **options)
        return Completion(completion.ids, completion.logprobs, FinishReason.EOS)

    return generate


def planned_parse(original: Callable[[Protocol, str], Action]) -> Callable[[Protocol, str], Action]:
    """Parses, because that takes time, and returns the planned action."""

    def parse(self: Protocol, text: str) -> Action:
        original(self, text)
        plan = CURRENT.get()
        plan.spoken += 1
        return plan.action(plan.spoken - 1)

    return parse


# Stock TRL with the plan


class PlannedStock:
    """Replaces `llm.generate` and `parse_response`: plan and turn tell which trajectories are in a call."""

    def __init__(self, generate: Callable[..., Any]) -> None:
        self.original = generate
        self.turn = 0
        self.calls: dict[tuple[int, ...], dict[str, Any]] = {}

    def generate(self, prompts: list[Any], sampling_params: Any, **options: Any) -> list[Any]:
        if len(prompts) == len(PLANS):
            self.turn = 0
        speakers = [plan for plan in PLANS if len(plan.turns) > self.turn]
        assert len(prompts) == len(speakers)
        each = []
        for plan in speakers:
            each.append(sampling_params.clone())
            each[-1].max_tokens = plan.turns[self.turn]
        outputs: list[Any] = self.original(prompts, sampling_params=each, **options)
        for plan, output in zip(speakers, outputs, strict=True):
            action = plan.action(self.turn)
            message: dict[str, Any] = {"role": "assistant", "content": "x"}
            if not isinstance(action, Answer):
                arguments = {"query_list": [f"{plan.index} {self.turn}"]}
                message["tool_calls"] = [{"type": "function", "function": {"name": "search", "arguments": arguments}}]
            self.calls[tuple(output.outputs[0].token_ids)] = message
        self.turn += 1
        return outputs

    def parse(self, tokenizer: Any, ids: Sequence[int], **options: Any) -> dict[str, Any]:
        tokenizer.decode(ids)
        return self.calls[tuple(ids)]


# Measuring


@contextlib.contextmanager
def on_the_plan(trainer: GRPOTrainer) -> Iterator[None]:
    """Within the context, this trainer's rollouts follow `PLANS`."""
    llm = trainer.vllm_generation.llm
    stand_in = PlannedStock(llm.generate)
    with (
        mock.patch.object(llm, "generate", stand_in.generate),
        mock.patch.object(grpo_trainer, "parse_response", stand_in.parse),
        mock.patch.object(VLLMColocatePolicy, "generate", planned_generate(VLLMColocatePolicy.generate)),
        mock.patch.object(QwenTools, "parse", planned_parse(QwenTools.parse)),
    ):
        yield


def run_stock(trainer: GRPOTrainer, prompts: list[Any]) -> float:
    # As `_generate_and_score_completions` prepares it.
    trainer._sync_tool_dicts = [{tool.__name__: tool for tool in trainer._standalone_tools}] * len(prompts)
    trainer._async_tool_dicts = [{}] * len(prompts)
    with on_the_plan(trainer):
        return timed(lambda: trainer._generate(prompts), trainer)


def run_ours(trainer: SearchGRPOTrainer, prompts: list[Any]) -> float:
    trainer.last_rollout = Rollout(rows=[{}] * len(prompts))
    with on_the_plan(trainer):
        return timed(lambda: trainer._generate(prompts), trainer)


def run_bound(trainer: SearchGRPOTrainer, prompts: list[Any]) -> float:
    encoded = encode_prompts(prompts, trainer.protocol)

    async def trajectory(policy: VLLMColocatePolicy, plan: Plan) -> None:
        draw = random.Random(plan.index)
        ids = list(encoded[plan.index])
        for turn, tokens in enumerate(plan.turns):
            sampling = Sampling(seed=draw.getrandbits(60))
            ids += (await policy.generate(ids, max_tokens=tokens, sampling=sampling)).ids
            if turn < len(plan.observations):
                ids += draw.choices(range(300, 1500), k=plan.observations[turn])

    async def all_of_them(policy: VLLMColocatePolicy) -> None:
        await policy.open()
        await asyncio.gather(*(trajectory(policy, plan) for plan in PLANS))
        await policy.close()

    def go() -> None:
        with trainer.vllm_generation.policy(MAX_TOKENS) as policy:  # type: ignore[attr-defined]
            run_sync(all_of_them(policy))

    return timed(go, trainer)


def timed(function: Callable[[], Any], trainer: GRPOTrainer) -> float:
    trainer.vllm_generation.llm.reset_prefix_cache()
    random.seed(0)
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def make_trainers(
    folder: Path, arguments: argparse.Namespace, of_stock: dict[str, Any], of_ours: dict[str, Any]
) -> tuple[GRPOTrainer, SearchGRPOTrainer]:
    """Stock TRL and ours, on one engine and one model, each with its own settings."""
    cuda = torch.cuda.is_available()
    model, tokenizer = vllm_shape.load(folder, "cuda" if cuda else "cpu")
    common: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "num_generations": GROUP,
        "max_completion_length": MAX_TOKENS,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.4,
        "vllm_max_model_length": 8192,
        "bf16": cuda,
        "use_cpu": not cuda,
        "report_to": "none",
        "disable_tqdm": True,
    }
    retriever = PlannedRetriever(PLANS, tokenizer, arguments.search_ms / 1000)
    rows = Dataset.from_list([{"question": f"question {i}"} for i in range(arguments.trajectories // GROUP)])
    ours = SearchGRPOTrainer(
        model=model,
        args=SearchGRPOConfig(
            **common,
            **of_ours,
            vllm_engine_options=vllm_shape.options(arguments.shape),
            max_observation_length=MAX_TOKENS,
        ),
        reward_funcs=[random_reward],
        train_dataset=rows,
        processing_class=tokenizer,
        environment=PlannedEnvironment(retriever),
    )

    def search(query_list: list[str]) -> str:
        """
        Searches an encyclopedia.

        Args:
            query_list: Queries.

        Returns:
            Passages.
        """
        return "\n".join(passage.text for found in retriever.search(query_list, 1) for passage in found)

    with mock.patch.object(grpo_trainer, "VLLMGeneration", lambda **options: ours.vllm_generation):
        stock = GRPOTrainer(
            model=model,
            args=GRPOConfig(**common, **of_stock, max_tool_calling_iterations=8),
            reward_funcs=[random_reward],
            train_dataset=rows.map(lambda row: {"prompt": ours.protocol.messages(row["question"])}),
            processing_class=copy.deepcopy(tokenizer),  # TRL makes it parse tool calls
            tools=[search],
        )
    return stock, ours


def profiled(trainer: SearchGRPOTrainer, prompts: list[Any]) -> None:
    """Prints where the engine thread spends its Python time, by function."""
    profile = cProfile.Profile()
    run = VLLMColocatePolicy._run
    with mock.patch.object(VLLMColocatePolicy, "_run", lambda self: profile.runcall(run, self)):
        print(f"under cProfile: {run_ours(trainer, prompts):.1f} s")
    pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(35)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(vllm_shape.SHAPES), default="3b")
    parser.add_argument("--trajectories", type=int, default=512)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for all lengths")
    parser.add_argument("--search_ms", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--stock_repeats", type=int, default=1)
    parser.add_argument(
        "--ablate", action="store_true", help="also measure without the policy's optimizations of Python time"
    )
    parser.add_argument("--profile", action="store_true", help="also profile the engine thread")
    arguments = parser.parse_args()
    PLANS.extend(vllm_shape.make_plans(arguments.trajectories, arguments.scale))
    print(
        f"{vllm_shape.describe(PLANS)}; {arguments.search_ms:g} ms per search\n{vllm_shape.describe_machine()}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        batch = {"per_device_train_batch_size": arguments.trajectories}
        model_folder = vllm_shape.write_model_folder(Path(folder), arguments.shape)
        stock, ours = make_trainers(model_folder, arguments, of_stock=batch, of_ours=batch)
        rows: Any = ours.train_dataset
        prompts = [row["prompt"] for row in rows for _ in range(GROUP)]
        stock._last_loaded_step = ours._last_loaded_step = 0  # the weights are random on both sides
        seconds: dict[str, list[float]] = {}
        run_bound(ours, prompts)
        for repeat in range(arguments.repeats):
            seconds.setdefault("the engine alone (bound)", []).append(run_bound(ours, prompts))
            seconds.setdefault("trl-search", []).append(run_ours(ours, prompts))
            if arguments.ablate:
                with mock.patch.object(vllm_colocate, "_params", without_seed(vllm_colocate._params)):
                    seconds.setdefault("trl-search, no seed per request", []).append(run_ours(ours, prompts))
                with mock.patch.object(vllm_colocate, "SWITCH_INTERVAL_S", 0.005):
                    seconds.setdefault("trl-search, Python's switch interval", []).append(run_ours(ours, prompts))
            if repeat < arguments.stock_repeats:
                seconds.setdefault("stock TRL, tools=", []).append(run_stock(stock, prompts))
            print({name: [round(s, 2) for s in values] for name, values in seconds.items()}, flush=True)
        bound = min(seconds["the engine alone (bound)"])
        print("| rollout | seconds (median) | of the bound |\n|---|---|---|")
        for name, values in sorted(seconds.items(), key=lambda item: -statistics.median(item[1])):
            print(f"| {name} | {statistics.median(values):.1f} | {statistics.median(values) / bound:.2f} |")
        if arguments.profile:
            profiled(ours, prompts)


def without_seed(original: Callable[..., Any]) -> Callable[..., Any]:
    def params(*arguments: Any) -> Any:
        made = original(*arguments)
        made.seed = None
        return made

    return params


PLANS: list[Plan] = []

if __name__ == "__main__":
    main()
