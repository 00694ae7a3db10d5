"""Warms a policy up on scripted trajectories of the embedded world, good and bad ones mixed.

    trl-search sft --output runs/warm                                       weak behaviour, for GRPO to turn around
    trl-search sft --output runs/good --quality good=1.0 --steps 200        a policy that searches as it should

The loss is on what the policy itself writes; thoughts, calls and answers, never the passages. The output folder holds
the model and its tokenizer: `trl-search train RECIPE --model_name_or_path runs/warm --warm_start_steps 0` goes on.
"""

from __future__ import annotations

import argparse

from trl_search.scripts import PLAYERS, WEAK


def add_arguments(parser: argparse.ArgumentParser) -> None:
    weak = ",".join(f"{name}={share}" for name, share in WEAK.items())
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the model and its tokenizer")
    parser.add_argument("--model", default="tiny", help="a model of the hub, a folder, or 'tiny' (default: tiny)")
    parser.add_argument("--protocol", default="qwen_tools", help="how searches are written (default: qwen_tools)")
    parser.add_argument("--instruction", default="", help="put before each question (default: nothing)")
    parser.add_argument(
        "--quality", type=_shares, default=WEAK, help=f"shares of {', '.join(PLAYERS)} (default: {weak})"
    )
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (default: 60)")
    parser.add_argument("--batch_size", type=int, default=16, help="trajectories a step (default: 16)")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="at its peak (default: 5e-4)")
    parser.add_argument("--world_passages", type=int, default=2000, help="size of the world (default: 2000)")
    parser.add_argument("--world_seed", type=int, default=0, help="seed of the world (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the scripts and the training (default: 0)")


def run(args: argparse.Namespace) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_search.protocols import load_protocol
    from trl_search.retrieval import load_retriever
    from trl_search.sft import warm_start
    from trl_search.tiny_policy import tiny_policy_path
    from trl_search.world import generate_world

    name = tiny_policy_path() if args.model == "tiny" else args.model
    tokenizer = AutoTokenizer.from_pretrained(name)
    world = generate_world(args.world_passages, args.world_seed)
    trajectories = warm_start(
        AutoModelForCausalLM.from_pretrained(name, dtype="float32"),
        load_protocol(args.protocol, tokenizer, instruction=args.instruction),
        world,
        load_retriever("bm25", passages=world.passages),
        output_dir=args.output,
        steps=args.steps,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        quality=args.quality,
        seed=args.seed,
    )
    searches = sum(trajectory.searches for trajectory in trajectories) / len(trajectories)
    print(f"{args.output}: trained on {len(trajectories):,} trajectories of {searches:.2f} searches on average")
    return 0


def _shares(text: str) -> dict[str, float]:
    try:
        return {name: float(share) for name, share in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"write it as guess=0.5,good=0.5, not {text!r}") from error
