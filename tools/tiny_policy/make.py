"""Builds the tiny policy: tokenizer, training, evaluation. About eight minutes on one H200 with 16 CPU cores.

    python -m tools.tiny_policy.make --output trl_search/policies/tiny/model
    python -m tools.tiny_policy.make --output /tmp/tiny --smoke         # seconds on a CPU; learns nothing

Expected EM at the end, in an unseen world: above 0.9 as a search agent with every protocol, about 0.5 with one-shot
RAG, about 0.1 without searches.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from tools.tiny_policy.tokenizer import MAX_TOKENS, make_tokenizer
from tools.tiny_policy.training import Plan, train
from trl_search.config.agent import AgentSettings
from trl_search.data.world import MIX, generate_world
from trl_search.data.world_language import LITERALS, WORDS
from trl_search.environment import SearchEnvironment
from trl_search.evaluation.evaluate import answer_questions
from trl_search.evaluation.outcomes import summarize
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.retrieval.bm25.retriever import BM25Retriever

SMOKE = Plan(
    minutes=1.0,
    max_steps=6,
    workers=1,
    rows=2,
    repetitions=4,
    repetition_tokens=64,
    warmup_steps=2,
    first_rows=8,
    ring_rows=32,
    samples_a_world=32,
    log_steps=2,
    evaluate_steps=3,
)


def make_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """An untrained model: Qwen2 with 4 layers of width 256, 3.5 million parameters."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=684,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def save_model(model: Qwen2ForCausalLM, folder: Path) -> None:
    """Saves the weights in bfloat16, which halves the size, with a config that loads them as float32 for CPUs."""
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"architectures": ["Qwen2ForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def report(folder: Path, device: torch.device, *, questions: int, passages: int, seed: int) -> None:
    """Loads the saved model and prints its greedy EM in a world that was not trained on."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)  # type: ignore[arg-type]
    world = generate_world(passages, seed=2**50 + seed)
    retriever = BM25Retriever.from_passages(world.passages, backend="numpy")
    policy = TransformersPolicy(model, tokenizer, max_sequences=256)
    asked = world.questions("test", limit=4 * questions)
    by_type = {str(name): [q.row() for q in asked if q.type == name][: questions // 3] for name in MIX}
    mixed = [question.row() for question in asked[:questions]]
    groups = {"mixed": mixed, **by_type}
    agent = AgentSettings(instruction="", max_turn_length=96, max_observation_length=512, max_completion_length=1024)
    runs = [("search", "qwen_tools", group) for group in groups]
    runs += [("search", "qwen_inline", "mixed"), ("search", "search_r1", "mixed")]
    runs += [("rag", "qwen_tools", group) for group in groups] + [("direct", "qwen_tools", "mixed")]
    for mode, protocol, group in runs:
        started = time.monotonic()
        outcomes = answer_questions(
            mode,
            groups[group],
            policy=policy,
            tokenizer=tokenizer,
            environment=SearchEnvironment(retriever),
            agent=replace(agent, protocol=protocol),
        )
        result = summarize(mode, outcomes)
        seconds = time.monotonic() - started
        print(
            f"{mode:7} {protocol:12} {group:11} EM {result.em:.3f} ± {result.em_ci95:.3f}  "
            f"searches {result.searches:.2f}  tokens {result.model_tokens:.0f}  "
            f"reflective {result.reflective_ratio:.2f}  ({result.questions} questions, {seconds:.0f} s)",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tiny_policy.make",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="stop the training after this many minutes (default: 7)"
    )
    parser.add_argument("--max-steps", type=int, help="stop the training after this many steps, if that is earlier")
    parser.add_argument("--workers", type=int, default=14, help="processes that generate data (default: 14)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate (default: 1e-3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of all worlds (default: 0)")
    parser.add_argument("--questions", type=int, default=300, help="questions in the evaluation (default: 300)")
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps on the CPU, to test the script")
    parser.add_argument("--evaluate-only", action="store_true", help="only evaluate the model in --output")
    args = parser.parse_args(arguments)

    device = torch.device("cuda" if torch.cuda.is_available() and not args.smoke else "cpu")
    torch.manual_seed(args.seed)
    if not args.evaluate_only:
        plan = SMOKE if args.smoke else Plan(args.minutes, workers=args.workers, learning_rate=args.learning_rate)
        if args.max_steps:
            plan = replace(plan, max_steps=args.max_steps)
        args.output.mkdir(parents=True, exist_ok=True)
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(args.output)
        model = make_model(tokenizer).to(device)  # type: ignore[arg-type]
        print(
            f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens, on {device}",
            flush=True,
        )
        words = [word for pool in (*WORDS.values(), *LITERALS.values()) for word in pool]
        train(
            model,
            tokenizer,
            args.output,
            plan,
            word_ids=[tokenizer.encode(f" {word}")[0] for word in words],
            save=lambda: save_model(model, args.output),
            seed=args.seed,
        )
    size = sum(file.stat().st_size for file in args.output.iterdir())
    print(f"{args.output}: {size / 1e6:.2f} MB", flush=True)
    report(
        args.output,
        device,
        questions=6 if args.smoke else args.questions,
        passages=200 if args.smoke else 2000,
        seed=args.seed,
    )


if __name__ == "__main__":
    main()
