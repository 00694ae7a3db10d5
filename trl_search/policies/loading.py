"""Loads a model and its tokenizer from a name that a user typed, and says what is wrong with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_search.common.errors import UserError
from trl_search.common.files import read_object

ADAPTER_CONFIG = "adapter_config.json"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model on the hub or in a folder; an adapter's folder without one has its base model's."""
    name = model_source(name)
    adapter = read_adapter(Path(name))
    if adapter is not None and not (Path(name) / "tokenizer_config.json").is_file():
        name = adapter["base_model_name_or_path"]
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _unusable(name, "tokenizer", error) from error
    return tokenizer


def load_model(name: str, *, device: str | None = None, dtype: str | None = None) -> PreTrainedModel:
    """A decoder on its device; the folder or repository of a PEFT adapter gives its base model with the adapter on it.

    Args:
        device (`str`, *optional*): `"cuda"` if there is one, else `"cpu"`.
        dtype (`str`, *optional*): A dtype of torch, or `"auto"` for the checkpoint's own. Default: bfloat16 on a GPU,
            float32 on a CPU, where bfloat16 is slow.
    """
    import torch

    name = model_source(name)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"there is no device {device!r}: choose cpu, cuda, or cuda:1") from error
    if dtype is None:
        dtype = "float32" if target.type == "cpu" else "bfloat16"
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UserError(f"there is no dtype {dtype!r}: choose float32, bfloat16, float16 or auto")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{device} was asked for, and torch finds no GPU here: use cpu")
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise _unusable(name, "model", error) from error
    return model.to(target).eval()  # type: ignore[arg-type]


def read_adapter(folder: Path) -> dict[str, Any] | None:
    """The configuration of the PEFT adapter in a folder, which names its base model; `None` where there is none."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    config = read_object(path, "save the adapter anew")
    if not isinstance(config.get("base_model_name_or_path"), str):
        raise UserError(f"{path} names no base model (base_model_name_or_path): save the adapter anew")
    return config


def model_source(name: str) -> str:
    """The name as `from_pretrained` takes it; a folder without a model, or one that is not there, is an error."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
            found = sorted((folder for folder in path.glob("*/") if (folder / "config.json").is_file()), key=_number)
            hint = f"; one lies in {found[-1]}" if found else ""
            raise UserError(f"{path} holds no model: it has neither config.json nor {ADAPTER_CONFIG}{hint}")
        return str(path)
    if path.exists():
        raise UserError(f"{path} is a file: give the folder that it lies in")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or name.startswith("runs/"):
        raise UserError(f"there is no model at {path}: give a folder, a model of the hub (owner/name), or 'tiny'")
    return name


def _number(folder: Path) -> int:
    found = re.search(r"(\d+)$", folder.name)
    return int(found[1]) if found else -1


def _unusable(name: str, what: str, error: Exception) -> UserError:
    said = " ".join(str(error).split())[:400]
    return UserError(
        f"the {what} of {name} cannot be loaded: give a folder, a model of the hub (owner/name), or 'tiny'. "
        f"transformers says: {said}"
    )
