"""Generation only, on CPU, two turns per conversation: our continuous batching against two methods of transformers.

    python benchmarks/engine.py                       # 64 conversations of the shipped tiny policy
    python benchmarks/engine.py --conversations 16 --repeats 1

- `TransformersPolicy`: ours; a conversation's second turn starts as soon as its first has ended;
- `model.generate`: one padded batch per turn; the second turn recomputes the first, as in stock TRL;
- `model.generate_batch`: transformers' continuous batching manager, one call per turn (stock TRL's
  `use_transformers_continuous_batching`), with a cache of the size it needs.

The prompts have different lengths (a question after 0 to 7 passages), as have the three passages between the turns.
Decoding is greedy, so that all three compute the same tokens; the last column is the number of conversations with the
same tokens as `model.generate`. The three run alternately; times are medians of the repeats.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from rollout import versions
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_search.data.world import generate_world
from trl_search.policies.tiny import tiny_policy_path
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.protocols import load_protocol
from trl_search.types import Observation, Sampling

MAX_TOKENS = 96
TURNS = 2

Ids = list[int]
# Prompts and what follows each first turn -> the tokens of each turn of each conversation.
Engine = Callable[[list[Ids], list[Ids]], list[list[Ids]]]


def conversations(tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[list[Ids], list[Ids]]:
    """Prompts, and the observation after each first turn."""
    world = generate_world(passages=2000, seed=0)
    protocol = load_protocol("qwen_tools", tokenizer, instruction="")
    draw = random.Random(0)
    prompts: list[Ids] = []
    observations: list[Ids] = []
    for i, question in enumerate(world.questions("train", limit=count)):
        context = [passage.text for passage in draw.sample(world.passages, i % 8)]
        prompts.append(list(protocol.prompt_ids(protocol.messages("\n".join([*context, question.question])))))
        found = tuple(passage.text for passage in draw.sample(world.passages, 3))
        written = protocol.observation_ids(Observation(documents=found), max_tokens=256, turn_closed=True)
        assert written is not None
        observations.append(list(written[0]))
    return prompts, observations


def ours(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
    greedy = Sampling(temperature=0.0)

    async def converse(policy: TransformersPolicy, prompt: Ids, observation: Ids) -> list[Ids]:
        first = await policy.generate(prompt, max_tokens=MAX_TOKENS, sampling=greedy)
        ids = [*prompt, *first.ids, *observation]
        second = await policy.generate(ids, max_tokens=MAX_TOKENS, sampling=greedy)
        return [list(first.ids), list(second.ids)]

    async def run(prompts: list[Ids], observations: list[Ids]) -> list[list[Ids]]:
        policy = TransformersPolicy(model, tokenizer, max_sequences=len(prompts))
        await policy.open()
        try:
            pairs = zip(prompts, observations, strict=True)
            return list(await asyncio.gather(*(converse(policy, prompt, observed) for prompt, observed in pairs)))
        finally:
            await policy.close()

    return lambda prompts, observations: asyncio.run(run(prompts, observations))


def turn_by_turn(turn: Callable[[list[Ids]], list[Ids]]) -> Engine:
    """An engine that runs the first turn of all conversations, then the second."""

    def run(prompts: list[Ids], observations: list[Ids]) -> list[list[Ids]]:
        first = turn(prompts)
        second = turn([[*p, *ids, *seen] for p, ids, seen in zip(prompts, first, observations, strict=True)])
        return [list(turns) for turns in zip(first, second, strict=True)]

    return run


def padded(model: PreTrainedModel, config: GenerationConfig) -> Engine:
    def turn(prompts: list[Ids]) -> list[Ids]:
        width = max(map(len, prompts))
        padding = [width - len(ids) for ids in prompts]
        with torch.no_grad():
            output = model.generate(  # type: ignore[operator]
                torch.tensor([[config.pad_token_id] * n + ids for n, ids in zip(padding, prompts, strict=True)]),
                attention_mask=torch.tensor([[0] * n + [1] * (width - n) for n in padding]),
                generation_config=config,
            )
        return [_until_eos(ids, config) for ids in output[:, width:].tolist()]

    return turn_by_turn(turn)


def manager(model: PreTrainedModel, config: GenerationConfig, conversations: int) -> Engine:
    # By default its cache takes nine tenths of the memory, and most of its time is spent allocating it.
    sizes = ContinuousBatchingConfig(block_size=32, num_blocks=20 * conversations, max_batch_tokens=4096)

    def turn(prompts: list[Ids]) -> list[Ids]:
        outputs = model.generate_batch(  # type: ignore[operator]
            prompts, generation_config=config, continuous_batching_config=sizes, progress_bar=False
        )
        return [_until_eos(output.generated_tokens, config) for output in outputs.values()]

    return turn_by_turn(turn)


def _until_eos(ids: Ids, config: GenerationConfig) -> Ids:
    return ids[: ids.index(config.eos_token_id) + 1] if config.eos_token_id in ids else ids


def table(seconds: dict[str, list[float]], generated: dict[str, list[list[Ids]]]) -> str:
    reference = generated["model.generate"]
    lines = [
        "| engine | seconds (min–max) | sampled tokens/s | × ours | as model.generate |",
        "|---|---|---|---|---|",
    ]
    ours_s = statistics.median(seconds["TransformersPolicy (ours)"])
    for name, times in seconds.items():
        median = statistics.median(times)
        tokens = sum(len(ids) for turns in generated[name] for ids in turns)
        same = sum(turns == expected for turns, expected in zip(generated[name], reference, strict=True))
        lines.append(
            f"| {name} | {median:.2f} ({min(times):.2f}–{max(times):.2f}) | {tokens / median:.0f} | "
            f"{median / ours_s:.1f} | {same} of {len(reference)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=64, help="conversations at once (default 64)")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each, after a warm-up (default 3)")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity(logging.CRITICAL)

    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_path(), dtype=torch.float32).eval()
    config = GenerationConfig(
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    engines: dict[str, Engine] = {
        "TransformersPolicy (ours)": ours(model, tokenizer),
        "model.generate": padded(model, config),
        "model.generate_batch": manager(model, config, arguments.conversations),
    }
    prompts, observations = conversations(tokenizer, arguments.conversations)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    generated: dict[str, list[list[Ids]]] = {}
    with tqdm(total=(1 + arguments.repeats) * len(engines), unit="run", disable=None) as bar:
        for repeat in range(1 + arguments.repeats):
            for name, engine in engines.items():
                started = time.perf_counter()
                generated[name] = engine(prompts, observations)
                if repeat > 0:
                    seconds[name].append(time.perf_counter() - started)
                bar.update()
    print(table(seconds, generated))
    lengths = sorted(map(len, prompts))
    print(
        f"\n{len(prompts)} conversations of {TURNS} turns, prompts of {lengths[0]} to {lengths[-1]} tokens, at most "
        f"{MAX_TOKENS} tokens per turn, {arguments.repeats} runs of each. {versions()}."
    )


if __name__ == "__main__":
    main()
