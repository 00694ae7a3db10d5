"""A lower bound on the time of a training step of `vllm_step.py`, from the arithmetic of its parts.

    python benchmarks/vllm_bounds.py                                      # H200: 989 bf16 TFLOP/s, 4.8 TB/s
    python benchmarks/vllm_bounds.py --tflops 989 --tb_per_s 3.35         # H100
    python benchmarks/vllm_bounds.py --efficiency .65 --silent_groups .4  # the rate that cuBLAS reached there

The plan of `vllm_shape.py` gives the numbers of tokens. The time of each part is that of its products at the rate of
the tensor cores, or of its bytes at the memory bandwidth, whichever is longer:

    prefill     prompts once per group, observations once: 2 operations per weight and token
    decode      each sampled token reads its keys and values; each step of the longest trajectory reads all weights
    training    forward and backward of every token once, 6 operations per weight; the output layer for sampled ones
    optimizer   AdamW reads weight, gradient and two moments, and writes all but the gradient, in bfloat16

The products of causal attention are counted. Norms, softmax, sampling, Python, searches, the template's tokens around
an observation, and the second forward of gradient checkpointing are not.
"""

from __future__ import annotations

import argparse
from typing import Any

import vllm_shape
from transformers import AutoTokenizer
from vllm_shape import GROUP, SHAPES, Plan

from trl_search import SearchGRPOConfig
from trl_search.config.agent import protocol_of
from trl_search.policies.tiny import tiny_policy_path
from trl_search.protocols import SEARCH_TOOL

BYTES = 2  # bfloat16


def prompt_tokens() -> int:
    """The prompt of `vllm_step.py`."""
    protocol = protocol_of(
        SearchGRPOConfig("unused", use_cpu=True, bf16=False).agent,
        AutoTokenizer.from_pretrained(tiny_policy_path()),
        (SEARCH_TOOL,),
    )
    return len(protocol.prompt_ids(protocol.messages("question 10")))


def bounds(
    shape: dict[str, Any], plans: list[Plan], prompt: int, silent: float, flops_per_s: float, bytes_per_s: float
) -> dict[str, float]:
    """Seconds of each part."""
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    of_keys = 2 * hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]  # keys and values
    body = layers * (2 * hidden**2 + hidden * of_keys + 3 * hidden * shape["intermediate_size"])
    head = hidden * shape["vocab_size"]
    per_pair = 4 * hidden * layers  # operations of attention per query and key

    prefilled = prompt * len(plans) / GROUP
    prefill_pairs = prompt**2 / 2 * len(plans) / GROUP
    sampled, read, trained, trained_sampled, trained_pairs = 0, 0.0, 0, 0, 0.0
    for plan in plans:
        length = prompt
        for turn, tokens in enumerate(plan.turns):
            sampled += tokens
            read += tokens * (length + tokens / 2)
            length += tokens
            if turn < len(plan.observations):
                prefilled += plan.observations[turn]
                prefill_pairs += plan.observations[turn] * (length + plan.observations[turn] / 2)
                length += plan.observations[turn]
        if plan.index >= int(silent * len(plans) / GROUP) * GROUP:
            trained += length
            trained_sampled += sum(plan.turns)
            trained_pairs += length**2 / 2

    decoding = {
        "products": (2 * (body + head) * sampled + per_pair * read) / flops_per_s,
        "bytes": BYTES
        * (read * of_keys * layers + max(sum(plan.turns) for plan in plans) * (body + head))
        / bytes_per_s,
    }
    return {
        "prefill": (2 * body * prefilled + per_pair * prefill_pairs) / flops_per_s,
        "decode": max(decoding.values()),
        "forward and backward": 3
        * (2 * body * trained + 2 * head * trained_sampled + per_pair * trained_pairs)
        / flops_per_s,
        "optimizer": 7 * BYTES * (body + head) / bytes_per_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="3b")
    parser.add_argument("--trajectories", type=int, default=512)
    parser.add_argument(
        "--silent_groups", type=float, default=0.0, help="share of groups that are not trained on (default: 0)"
    )
    parser.add_argument("--tflops", type=float, default=989.0, help="bfloat16 rate of the tensor cores (default: 989)")
    parser.add_argument("--tb_per_s", type=float, default=4.8, help="memory bandwidth (default: 4.8)")
    parser.add_argument("--efficiency", type=float, default=1.0, help="share of --tflops that is reached (default: 1)")
    arguments = parser.parse_args()
    plans = vllm_shape.make_plans(arguments.trajectories)
    prompt = prompt_tokens()
    rate = arguments.tflops * arguments.efficiency
    seconds = bounds(
        SHAPES[arguments.shape], plans, prompt, arguments.silent_groups, rate * 1e12, arguments.tb_per_s * 1e12
    )
    print(f"{vllm_shape.describe(plans)}, prompts of {prompt}; {rate:.0f} TFLOP/s, {arguments.tb_per_s:g} TB/s")
    print("| part | seconds at least |\n|---|---|")
    for part, least in {**seconds, "all": sum(seconds.values())}.items():
        print(f"| {part} | {least:.2f} |")


if __name__ == "__main__":
    main()
