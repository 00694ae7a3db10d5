"""Loads models and tokenizers by the name that a user gives, with errors that name the cause and the remedy.

- `load_tokenizer`: loads every tokenizer of the package;
- `load_model`: loads a model or an adapter's folder for inference (evaluation, chat);
- `load_base`: loads a model for training, with the keys of TRL's `ModelConfig`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig

from trl_search.common.errors import UserError
from trl_search.common.hub import only_cached
from trl_search.common.vocabulary import refuse_empty_tokenizer
from trl_search.policies.adapters import ADAPTER_CONFIG, adapted, read_adapter
from trl_search.policies.tiny import tiny_policy_path

if TYPE_CHECKING:
    import torch


def base_name(model_config: ModelConfig) -> str:
    """The model's name for `from_pretrained`; `tiny` is a folder of this package.

    Raises:
        UserError: if no model is named.
    """
    if not model_config.model_name_or_path:
        raise UserError("model_name_or_path is missing: give a model on the hub, a folder, or 'tiny'")
    return tiny_policy_path() if model_config.model_name_or_path == "tiny" else model_config.model_name_or_path


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, eos_token: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model on the hub or in a folder. For an adapter without one, that of its base model.
    `eos_token`: the token that ends the assistant's turn, if the tokenizer's EOS is another one (`<|im_end|>` for a
    base model with a ChatML template).

    Raises:
        UserError: if there is no such tokenizer, or it has no such token.
    """
    folder = Path(name).expanduser()
    if (folder / "tokenizer_config.json").is_file():  # also a folder without a model
        name = str(folder)
    elif adapter := read_adapter(Path(name := model_source(name))):
        name = adapter["base_model_name_or_path"]
    local = only_cached(name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            local_files_only=local,
            padding_side="left",
            truncation_side="left",
        )
    except (OSError, ValueError) as error:
        raise _unusable(name, "tokenizer", error) from error
    refuse_empty_tokenizer(tokenizer, name)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise UserError(f"eos_token={eos_token!r} is not a token of {name}: give the token that ends a turn")
        tokenizer.eos_token = eos_token
    return tokenizer


def load_base(name: str, model_config: ModelConfig, config: Any) -> PreTrainedModel:
    """Loads the model to train, or another one with the same options: a teacher, a warm start."""
    options: dict[str, Any] = {"dtype": model_config.dtype or "float32"}
    if isinstance(config.model_init_kwargs, dict):
        options |= config.model_init_kwargs
    if name == base_name(model_config):
        options["revision"] = model_config.model_revision
    if model_config.attn_implementation:
        options["attn_implementation"] = model_config.attn_implementation
    return _pretrained(model_source(name), trust_remote_code=config.trust_remote_code, **options)


def load_model(name: str, *, device: str | None = None, dtype: str | None = None) -> PreTrainedModel:
    """Loads a decoder onto a device, by default a GPU if there is one, in bfloat16 on a GPU and float32 on a CPU,
    where bfloat16 is slow. For a PEFT adapter, loads the base model and applies the adapter."""
    name = model_source(name)
    target, dtype = placement(device, dtype)
    return _pretrained(name, dtype=dtype).to(target).eval()  # type: ignore[arg-type]


def placement(device: str | None, dtype: str | None) -> tuple[torch.device, str]:
    """The device and dtype of a model, with the defaults of [`load_model`].

    Raises:
        UserError: for a device or a dtype that does not exist on this machine.
    """
    import torch

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
        raise UserError(f"device {device} was given, but torch finds no GPU here: use cpu")
    return target, dtype


def model_source(name: str) -> str:
    """The name in the form that `from_pretrained` takes.

    Raises:
        UserError: if it is neither a folder with a model nor a name on the hub.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        files = ("config.json", ADAPTER_CONFIG)
        if not any((path / file).is_file() for file in files):
            found = sorted({path / one.parent.name for name in files for one in path.glob(f"*/{name}")}, key=_number)
            hint = f": give {found[-1]}, which has a model" if found else ": give the folder of a model"
            raise UserError(f"{path} holds no model (neither config.json nor {ADAPTER_CONFIG}){hint}")
        return str(path)
    if path.exists():
        raise UserError(f"{path} is a file: give the folder that contains it")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or name.startswith("runs/"):
        raise UserError(f"there is no model at {path}: give a folder, a model on the hub (owner/name), or 'tiny'")
    if name != "tiny" and difflib.get_close_matches(name.lower(), ["tiny"], cutoff=0.75):
        raise UserError(f"there is no model {name}: did you mean 'tiny'?")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"{name!r} names no model: give a folder, a model on the hub (owner/name), or 'tiny'"
        ) from error
    return name


def read_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model, with which its weights are not loaded.

    Raises:
        UserError: if there is no such model, with transformers' message in one line.
    """
    source = model_source(name)
    local = only_cached(source)
    try:
        return AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code, local_files_only=local
        )
    except (OSError, ValueError) as error:
        raise _unusable(name, "model", error) from error


def check_vocabulary(model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that a tokenizer fits a model. Of a name, only the configuration is read.

    Raises:
        UserError: if the tokenizer has ids without an embedding in the model. Special tokens may have none, because
            no text is encoded to them: Gemma 3 1B has none for its family's `<image_soft_token>`.
    """
    rows = _embedding_rows(model)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    highest = max(index for index in tokenizer.get_vocab().values() if index not in special)
    if 0 < rows <= highest:  # with ZeRO-3, rows may be 0 here
        raise UserError(
            f"the tokenizer has ids up to {highest}, but the model has embeddings for {rows} tokens: they do not "
            "belong together. Give the model's own tokenizer, or resize the model's embeddings "
            "(model.resize_token_embeddings) and save both"
        )


def _embedding_rows(model: PreTrainedModel | str) -> int:
    if isinstance(model, str):
        try:
            return int(read_config(model).get_text_config().vocab_size)
        except (UserError, AttributeError):  # an adapter, or an error that loading the model will report
            return 0
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def _pretrained(name: str, **options: Any) -> PreTrainedModel:
    if adapter := read_adapter(Path(name)):
        return adapted(_pretrained(adapter["base_model_name_or_path"], **options), name)
    if only_cached(name):
        # `adapter_kwargs`: transformers looks for an adapter in the model's repository without its own option.
        options |= {"local_files_only": True, "adapter_kwargs": {"local_files_only": True}}
    try:
        read: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        raise _unusable(name, "model", error) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"the weights of {name} do not have the shapes in its config.json (see the report above): the folder "
            "probably mixes files of two models. Fetch it again"
        ) from error
    model: PreTrainedModel
    model, loaded = read
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise UserError(
            f"{name} lacks {len(missing)} of its weights, which would be random: {', '.join(missing[:3])}. Fetch or "
            "save the model again"
        )
    if weight := nonfinite(model.named_parameters()):
        raise UserError(
            f"{name} holds weights that are not finite ({weight}), because its training overflowed: go back to an "
            "earlier checkpoint"
        )
    return model


def nonfinite(weights: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first weight with a NaN or an infinite value."""
    floats = ((name, tensor) for name, tensor in weights if tensor.is_floating_point() and not tensor.is_meta)
    return next((name for name, tensor in floats if not bool(tensor.isfinite().all())), None)


def _number(folder: Path) -> int:
    found = re.search(r"(\d+)$", folder.name)
    return int(found[1]) if found else -1


def _unusable(name: str, what: str, error: Exception) -> UserError:
    said = " ".join(str(error).split())[:400]
    if said.startswith("Unrecognized configuration class"):
        return UserError(
            f"{name} is not a causal language model ({said[:120]} ...): vision-language and encoder-decoder "
            "checkpoints cannot be trained here; give a text-only model of the family"
        )
    return UserError(
        f"the {what} of {name} cannot be loaded: give a folder, a model on the hub (owner/name), or 'tiny'. "
        f"transformers says: {said}"
    )
