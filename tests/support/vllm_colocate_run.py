"""All that tests/policies/test_vllm_colocate.py does with a real engine, in one process, because it starts slowly.

    python -m tests.support.vllm_colocate_run FOLDER        # trains FOLDER/model, writes FOLDER/colocate.json

The trainer creates the engine. It has no adapter until the first sync, so until then it samples from FOLDER/model.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from tests.support.scripted_trainer import ROWS, real_trainer, steps
from trl_search.common.errors import UserError
from trl_search.common.event_loop import run_sync
from trl_search.data.world import generate_world
from trl_search.environment import SearchEnvironment
from trl_search.evaluation.evaluate import answer_questions
from trl_search.evaluation.outcomes import Evaluation, summarize
from trl_search.policies.base import Policy
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.protocols import load_protocol
from trl_search.retrieval import load_retriever
from trl_search.rollout import Limits, rollout
from trl_search.trainer.callbacks.held_out import HeldOut
from trl_search.trainer.grpo import SearchGRPOTrainer
from trl_search.types import Completion, Sampling

ROOM = 1024
LIMITS = Limits(completion_tokens=320, turn_tokens=48, observation_tokens=128)
GREEDY = Sampling(temperature=0.0)
# Greedy decoding continues to the maximum length.
ENDLESS = ([300, 400, 500], {"max_tokens": 1000, "sampling": GREEDY})
PROTOCOLS = ("qwen_tools", "search_r1")
Request = tuple[list[int], dict[str, Any]]


def make_trainer(folder: Path, **options: Any) -> SearchGRPOTrainer:
    """Trains a LoRA adapter of FOLDER/model and sends only that to vLLM: its CPU build cannot load other weights.

    The retriever is not bm25, because numba must not be imported before vLLM's CPU build has started (its
    `register_triton_kernel_overrides` inspects every module and fails at llvmlite's).
    """
    return real_trainer(
        folder / "run",
        str(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
        trainer={"peft_config": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")},
        use_vllm=True,
        vllm_lora_sync="adapter",
        max_completion_length=200,
        max_turn_length=48,
        max_observation_length=100,
        **options,
    )


def adapter_after_two_steps(trainer: SearchGRPOTrainer) -> dict[str, Any]:
    """Trains, and compares the engine's logprobs with the trainer's before and after the last sync."""
    trainer.train()
    stale = disagreement(trainer)
    evaluated = held_out(trainer)  # this sends the latest weights
    logged = [step["sampling/sampling_logp_difference/max"] for step in steps(trainer)]
    return {"logged": logged, "stale": stale, "synced": disagreement(trainer), "held_out": evaluated}


def held_out(trainer: SearchGRPOTrainer) -> dict[str, Any]:
    """An evaluation during training with the engine, and the same questions with the model itself."""
    questions = [{**row, "id": str(number), "data_source": "books"} for number, row in enumerate(ROWS)]
    by_engine = HeldOut(trainer, Dataset.from_list(questions)).measure()
    args, tokenizer = trainer.args, trainer.processing_class
    by_model = answer_questions(
        "search",
        questions,
        policy=TransformersPolicy(trainer.model, tokenizer),
        tokenizer=tokenizer,
        environment=trainer.environment,
        agent=args.agent,
        progress=False,
    )
    return {"engine": by_engine.average, "model": summarize("search", by_model)}


def disagreement(trainer: SearchGRPOTrainer) -> float:
    """The largest difference between the engine's logprobs of what it samples and the trainer's."""
    prompt = list(range(300, 340))
    with trainer.vllm_generation.policy(ROOM) as policy:
        (completion,) = generate(policy, (prompt, {"max_tokens": 64, "sampling": Sampling(seed=1)}))
    trainer.model.eval()
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *completion.ids]])
        logits = trainer.model(ids).logits[0, len(prompt) - 1 : -1].float()
    own = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
    return float((own - torch.tensor(completion.logprobs)).abs().max())


def generate(policy: Policy, *requests: Request) -> list[Any]:
    """Runs `(prompt, options)` requests at once; an error takes the place of its completion."""

    async def go() -> list[Any]:
        await policy.open()
        try:
            asked = (policy.generate(prompt, **options) for prompt, options in requests)
            return await asyncio.gather(*asked, return_exceptions=True)
        finally:
            await policy.close()
            await policy.close()

    return run_sync(go())


def rollouts(policy: Policy, folder: Path) -> dict[str, Any]:
    """48 trajectories of each protocol, in a small world."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    world = generate_world(passages=1000, seed=3)
    rows = [question.row() for question in world.questions("train")[:48]]
    retriever = load_retriever("bm25", passages=world.passages, backend="numpy")  # numba takes longer to import
    found = {}
    for name in PROTOCOLS:
        protocol = load_protocol(name, tokenizer, instruction="")
        trajectories = rollout(
            [protocol.prompt_ids([{"role": "user", "content": row["question"]}]) for row in rows],
            rows,
            policy=policy,
            environment=SearchEnvironment(retriever, max_searches=3),
            protocol=protocol,
            limits=LIMITS,
            sampling=Sampling(temperature=0.8, seed=3),
        )
        found[name] = [
            {
                "prompt_ids": trajectory.prompt_ids,
                "ids": trajectory.ids,
                "mask": trajectory.mask,
                "logprobs": trajectory.logprobs,
                "searches": trajectory.searches,
                "stop_reason": trajectory.stop_reason,
            }
            for trajectory in trajectories
        ]
    return found


def turns(policy: Policy, prompts: dict[str, list[list[int]]], words: Callable[[int], str], stop: Any) -> Any:
    """Greedy turns; one truncated by its budget; stop strings that end inside a token or span two tokens."""
    greedy = [(prompt, {"max_tokens": 40, "sampling": GREEDY, "stop": stop}) for prompt in prompts["search_r1"]]
    prompt = prompts["qwen_tools"][0]
    requests = [*greedy, *((prompt, {"max_tokens": tokens, "sampling": GREEDY}) for tokens in (60, 7))]
    *stopped, whole, cut = generate(policy, *requests)
    said = [words(token) for token in whole.ids]
    index = next(i for i in range(4, len(said)) if len(said[i].strip()) > 3 and said[i] not in said[:i])
    ends = [said[index][:-1], said[index - 1][-1] + said[index][:2]]
    inside, border = generate(
        policy, *((prompt, {"max_tokens": 60, "sampling": GREEDY, "stop": (end,)}) for end in ends)
    )
    return {"greedy": stopped, "whole": whole, "cut": cut, "index": index, "inside": inside, "border": border}


def seeds(policy: Policy) -> Any:
    """The same seed alone and among other requests, and another seed."""
    options = {"max_tokens": 24, "sampling": Sampling(temperature=1.5, seed=2**200 + 7)}  # vLLM takes 64 bits
    other = {**options, "sampling": Sampling(temperature=1.5, seed=8)}
    crowd: list[Request] = [([600 + i], other) for i in range(6)]
    prompt = [300, 400, 500]
    (alone,) = generate(policy, (prompt, options))
    *_, again, another = generate(policy, *crowd, (prompt, options), (prompt, other))
    return {"alone": alone, "again": again, "another": another}


def faults(policy: Policy, engine: Any) -> Any:
    """Requests that do not end normally; after each, the number of requests in the engine."""

    scheduler = engine.engine_core.engine_core.scheduler

    def left() -> list[int]:
        return [engine.get_num_unfinished_requests(), scheduler.get_num_unfinished_requests()]

    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(600):
            while not condition():
                await asyncio.sleep(0.01)

    async def cancelled() -> Any:
        await policy.open()
        task = asyncio.create_task(policy.generate(ENDLESS[0], **ENDLESS[1]))
        await until(lambda: left() == [1, 1])
        task.cancel()
        await until(lambda: left() == [0, 0])
        after = await policy.generate([300], max_tokens=4, sampling=GREEDY)
        await policy.close()
        return {"cancelled": task.cancelled(), "after": after, "left": left()}

    async def closed() -> Any:
        await policy.open()
        tasks = [asyncio.create_task(policy.generate(ENDLESS[0], **ENDLESS[1])) for _ in range(3)]
        await until(lambda: left() == [3, 3])
        await policy.close()
        await asyncio.wait(tasks, timeout=600)
        return {"cancelled": [task.cancelled() for task in tasks], "left": left()}

    async def broken() -> Any:
        step, taken = engine.step, []

        def breaks() -> Any:
            taken.append(1)
            if len(taken) > 5:
                raise RuntimeError("the engine is on fire")
            return step()

        engine.step = breaks
        await policy.open()
        try:
            asked = [policy.generate(ENDLESS[0], **ENDLESS[1]) for _ in range(8)]
            waiting = await asyncio.gather(*asked, return_exceptions=True)
            (late,) = await asyncio.gather(policy.generate(ENDLESS[0], **ENDLESS[1]), return_exceptions=True)
        finally:
            await policy.close()
            del engine.step
        return {"waiting": waiting, "late": late, "left": left()}

    async def interrupted() -> Any:
        await policy.open()
        tasks = [asyncio.create_task(policy.generate(ENDLESS[0], **ENDLESS[1])) for _ in range(2)]
        await until(lambda: any(len(s.detokenizer.output_token_ids) > 9 for s in states.values()))
        await policy.interrupt()
        cut = [await task for task in tasks]
        rest = await policy.generate([*ENDLESS[0], *cut[0].ids], max_tokens=4, sampling=GREEDY)
        whole = await policy.generate(ENDLESS[0], max_tokens=len(cut[0].ids) + 4, sampling=GREEDY)
        await policy.close()
        return {"cut": cut, "rest": rest, "whole": whole, "left": left()}

    states = engine.output_processor.request_states
    short = ([300], {"max_tokens": 4, "sampling": GREEDY})
    return {
        "interrupted": run_sync(interrupted()),
        "cancelled": run_sync(cancelled()),
        "closed": run_sync(closed()),
        "broken": run_sync(broken()),
        "after": generate(policy, short),
        "too_long": generate(policy, ([300] * (ROOM + 10), ENDLESS[1]), short),
        "left": left(),
    }


def too_little_room(trainer: SearchGRPOTrainer) -> str:
    trainer.args.max_completion_length, asked = ROOM, trainer.args.max_completion_length
    try:
        trainer.train()
    except UserError as error:
        return str(error)
    finally:
        trainer.args.max_completion_length = asked
    return "nothing was refused"


def readable(value: Any) -> Any:
    """Converts completions and evaluations to JSON objects, and errors to text."""
    if isinstance(value, (Completion, Evaluation)):
        return dataclasses.asdict(value)
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    raise TypeError(type(value))


def main(folder: Path) -> None:
    # vLLM's CPU build breaks on a seeded request whose prompt is split over two steps.
    options = {"dtype": "float32", "enforce_eager": True, "enable_chunked_prefill": False}
    trainer = make_trainer(
        folder, vllm_mode="colocate", vllm_max_model_length=ROOM, vllm_engine_options=options, max_steps=2
    )
    tokenizer = trainer.processing_class
    backend: Any = trainer.vllm_generation
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    with backend.policy(ROOM) as policy:
        seen = {
            "rollouts": rollouts(policy, folder),
            "turns": turns(
                policy, prompts, lambda token: tokenizer.decode([token]), load_protocol("search_r1", tokenizer).stop
            ),
            "seeds": seeds(policy),
            "faults": faults(policy, backend.llm.llm_engine),
        }
    seen["too_little_room"] = too_little_room(trainer)
    seen["training"] = adapter_after_two_steps(trainer)
    (folder / "colocate.json").write_text(json.dumps(seen, default=readable), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
