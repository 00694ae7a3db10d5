"""Prepares datasets for the trainer: every row gets a conversational `prompt` that leaves room for a completion.

    {"question": "Who?", ...}  ─►  {"prompt": [{"role": "user", "content": "<instruction> Who?"}], "question": ...}

The constructor, `trainer.evaluate(dataset)` and `trainer.predict(dataset)` all use it (`evaluations.py`).
In each batch, `encode_prompts` turns the prompts into ids, and `longest_context` checks their length.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedModel

from trl_search.common.errors import UserError
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.policies.probe import positions_of_model
from trl_search.protocols import Protocol
from trl_search.protocols.prompt_length import too_long_prompts
from trl_search.rewards import check_columns, required_columns
from trl_search.rewards.golden_answers import golden_list
from trl_search.rewards.signature import check_calls
from trl_search.trainer.conversations import conversation_check

logger = logging.getLogger(__name__)

# Formats of `datasets` in which a conversation is not a list of messages.
_ARRAYS = ("numpy", "pandas", "polars", "arrow", "jax", "tensorflow")
_IMAGES = {"image", "images"}


def with_prompts(dataset: Any, protocol: Protocol, rewards: Sequence[Any], name: str) -> Any:
    """Adds `prompt`, as `Protocol.conversation` writes it, to each row of a dataset or of a dict of datasets.

    Raises:
        UserError: if it is not a dataset, is empty, lacks a needed column or golden answers, or has images.
    """
    if dataset is None and name != "train_dataset":
        return None
    if isinstance(dataset, Mapping):
        if name == "train_dataset":
            raise UserError(f"train_dataset has several splits ({', '.join(dataset)}): pass one of them")
        if not dataset:
            raise UserError(f"{name} is empty")
        return {key: with_prompts(one, protocol, rewards, f"{name}[{key!r}]") for key, one in dataset.items()}
    if not isinstance(dataset, Dataset | IterableDataset):
        raise UserError(f"{name} must be a Dataset, not {type(dataset).__name__}: {_how_to_convert(dataset)}")
    if (form := getattr(dataset, "format", {"type": None})["type"]) in _ARRAYS:
        raise UserError(f"{name} returns rows in the format {form}: reset it with dataset.with_format(None)")
    first = next(iter(dataset), None)
    if first is None:
        raise UserError(f"{name} is empty")
    columns = list(first)
    check_columns(rewards, columns)
    if images := _IMAGES & set(columns):
        raise UserError(f"{name} has the column {min(images)!r}, but rollouts are text only: remove that column")
    if not {"prompt", "question"} & set(columns):
        raise UserError(f"{name} needs a column 'question' (or 'prompt'); it has: {', '.join(columns)}")
    if any("golden_answers" in required_columns(reward) for reward in rewards) and isinstance(dataset, Dataset):
        _check_golden(dataset, name)

    check_conversation = conversation_check(protocol)

    def with_prompt(row: dict[str, Any], index: int) -> dict[str, Any]:
        asked = row.get("prompt") or row.get("question")
        if not asked or not isinstance(asked, str | list) or (isinstance(asked, str) and not asked.strip()):
            raise UserError(f"{name}[{index}] has no question: it is {asked!r:.60}, but must be a string")
        if isinstance(asked, list):
            check_conversation(asked, f"the prompt of {name}[{index}]")
        return {"prompt": protocol.conversation(row)}

    options = {"new_fingerprint": fingerprint} if (fingerprint := _fingerprint(dataset, protocol)) else {}
    return dataset.map(with_prompt, with_indices=True, **options)


def _check_golden(dataset: Dataset, name: str) -> None:
    """Refuses blank golden answers and a dataset without any, and warns how many rows have none and so get no reward.

    A blank one would equal every answer that normalizes to nothing, such as "the".
    """
    without = 0
    for row, golden in enumerate(dataset["golden_answers"]):
        answers = golden_list(golden)
        if not all(map(str.strip, answers)):
            raise UserError(f"{name}[{row}] has a blank golden answer, {golden!r:.60}: leave it out of golden_answers")
        without += not answers
    if without == len(dataset):
        raise UserError(f"the column 'golden_answers' of {name} is empty in every row: add golden answers to reward")
    if without:
        logger.warning("%d of %d rows of %s have no golden answers and get no reward", without, len(dataset), name)


def _fingerprint(dataset: Any, protocol: Protocol) -> str | None:
    """The cache key of the prompts for `map`: a hash of everything they depend on.

    By default `map` also hashes the whole tokenizer, which takes most of the trainer's start-up time. Here, only what
    decides how control tokens in a question are escaped is hashed. `None` for a protocol of another package, whose
    prompts may depend on more.
    """
    if not isinstance(dataset, Dataset) or not type(protocol).__module__.startswith("trl_search.protocols."):
        return None
    tokenizer = protocol.tokenizer
    added = sorted((index, token.content, token.special) for index, token in tokenizer.added_tokens_decoder.items())
    normalizer = str(getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None))
    escapes = [added, normalizer, protocol.template_text]
    return Hasher.hash(
        [dataset._fingerprint, type(protocol).__name__, protocol.instruction, protocol.system_prompt, escapes]
    )


def check_reward_calls(rewards: Sequence[Any], dataset: Any, name: str) -> None:
    """Checks that all rewards can be called with the columns of a dataset, or of a dict of datasets.

    Raises:
        UserError: names the reward and what it lacks.
    """
    if isinstance(dataset, Mapping):
        for key, one in dataset.items():
            check_reward_calls(rewards, one, f"{name}[{key!r}]")
    elif isinstance(dataset, Dataset | IterableDataset):
        check_calls([one for one in rewards if not isinstance(one, torch.nn.Module)], next(iter(dataset)), name)


def first_prompt(dataset: Any, protocol: Protocol) -> str:
    """The first prompt of the dataset, as text."""
    return protocol.decode(protocol.prompt_ids(next(iter(dataset))["prompt"]))


def with_room(
    dataset: Any, name: str, protocol: Protocol, model: PreTrainedModel, args: SearchGRPOConfig, *, skip: bool = False
) -> Any:
    """Checks that all prompts of a dataset, or of a dict of datasets, leave room for a completion, and returns it.
    `skip`: rows that do not fit are left out.

    A streamed dataset is not read ahead: `longest_context` checks its prompts in each batch.

    Raises:
        UserError: if some prompts leave too little room; the message names their rows.
    """
    if isinstance(dataset, Mapping):
        return {
            key: with_room(one, f"{name}[{key!r}]", protocol, model, args, skip=skip) for key, one in dataset.items()
        }
    positions, completion = positions_of(model, args), args.max_completion_length
    if positions is None or not hasattr(dataset, "select"):
        return dataset
    too_long = too_long_prompts(dataset["prompt"], protocol, positions - completion)
    if not too_long:
        return dataset
    total, longest = len(dataset), max(too_long.values())
    if skip and len(too_long) < total:
        logger.warning("%s: left out %d of %d rows with prompts that are too long", name, len(too_long), total)
        return dataset.select([row for row in range(total) if row not in too_long])
    rows = ", ".join(f"row {row} has {length} tokens" for row, length in [*too_long.items()][:3])
    remedies = []
    if positions > longest:
        remedies.append(f"lower max_completion_length to {positions - longest}")
    if len(too_long) < total:
        remedies.append("leave these rows out (skip_long_prompts: true for training rows)")
    raise UserError(
        f"{len(too_long)} of {total} prompts of {name} are too long ({rows}). The context has {positions} tokens, "
        f"so max_completion_length={completion} leaves {max(0, positions - completion)} for a prompt: "
        f"{', or '.join(remedies) or 'shorten the prompts'}"
    )


def positions_of(model: Any, args: SearchGRPOConfig) -> int | None:
    """The context length of the model, or of vLLM if it is known and smaller. None: no limit."""
    rooms = [positions_of_model(model)]
    if args.use_vllm and args.vllm_mode == "colocate":
        rooms.append(args.vllm_max_model_length)
    return min((room for room in rooms if room is not None), default=None)


def longest_context(prompt_ids: Sequence[Sequence[int]], model: Any, args: SearchGRPOConfig) -> int:
    """The length of the longest prompt plus a full completion, in tokens. vLLM checks it against its own room.

    Raises:
        UserError: if it exceeds the context length of the model.
    """
    longest = max(map(len, prompt_ids))
    needed = longest + args.max_completion_length
    positions = positions_of_model(model)
    if positions is not None and needed > positions:
        remedy = f"lower max_completion_length to {positions - longest}, or leave such questions out"
        if longest >= positions:
            remedy = "leave such questions out"
        raise UserError(
            f"a prompt of {longest} tokens and max_completion_length={args.max_completion_length} need {needed} "
            f"positions, but the model has {positions}: {remedy}"
        )
    return needed


def encode_prompts(prompts: Sequence[Any], protocol: Protocol) -> list[tuple[int, ...]]:
    """The ids of each prompt. Equal prompts (those of a group) are rendered once."""
    keys = [json.dumps(prompt, sort_keys=True) for prompt in prompts]
    rendered = {key: protocol.prompt_ids(prompt) for key, prompt in dict(zip(keys, prompts, strict=True)).items()}
    return [rendered[key] for key in keys]


def _how_to_convert(rows: Any) -> str:
    if isinstance(rows, str | Path):
        return f"load_questions({str(rows)!r}) reads a file or a set"
    library = type(rows).__module__.partition(".")[0]
    if library in ("pandas", "polars"):
        return f"convert it with Dataset.from_{library}(frame)"
    return "convert a list with Dataset.from_list(rows)"
