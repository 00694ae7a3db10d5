"""Loads models and tokenizers from a name that a user typed, and says what is wrong with it.

- `load_tokenizer`: every tokenizer of the package comes from here;
- `load_model`: a model that answers questions (evaluation, chat), an adapter's folder included;
- `load_base`: a model that is trained, by the keys of TRL's `ModelConfig`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config

from trl_search.common.errors import UserError
from trl_search.common.files import read_object
from trl_search.common.vocabulary import refuse_empty_tokenizer
from trl_search.policies.tiny import tiny_policy_path

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"


def base_name(model_config: ModelConfig) -> str:
    """What `from_pretrained` takes: `tiny` is a folder of this package.

    Raises:
        UserError: if no model is named.
    """
    if not model_config.model_name_or_path:
        raise UserError("model_name_or_path is missing: give a model of the hub, a folder, or 'tiny'")
    return tiny_policy_path() if model_config.model_name_or_path == "tiny" else model_config.model_name_or_path


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, eos_token: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model on the hub or in a folder; an adapter's folder without one has its base model's.

    Args:
        revision (`str`, *optional*): That of the model: a branch, a tag or a commit.
        eos_token (`str`, *optional*): The token that ends the assistant's turn, where the tokenizer names another: the
            `<|im_end|>` of a base model with a ChatML template.

    Raises:
        UserError: if there is no tokenizer of that name, or no such token in it.
    """
    folder = Path(name).expanduser()
    if (folder / "tokenizer_config.json").is_file():  # a tokenizer may lie there alone
        name = str(folder)
    elif adapter := read_adapter(Path(name := model_source(name))):
        name = adapter["base_model_name_or_path"]
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            padding_side="left",
            truncation_side="left",
        )
    except (OSError, ValueError) as error:
        raise _unusable(name, "tokenizer", error) from error
    refuse_empty_tokenizer(tokenizer, name)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise UserError(f"eos_token={eos_token!r} is no token of {name}: give the one that ends a turn")
        tokenizer.eos_token = eos_token
    return tokenizer


def load_base(name: str, model_config: ModelConfig, config: Any) -> PreTrainedModel:
    """Loads the model that is trained, or another in its place and in its manner: a teacher, a warm start.

    Args:
        config ([`~trl.GRPOConfig`] or [`~trl.SFTConfig`]): `model_init_kwargs` and `trust_remote_code` are read.
    """
    options: dict[str, Any] = {"dtype": model_config.dtype or "float32"}
    if isinstance(config.model_init_kwargs, dict):
        options |= config.model_init_kwargs
    if name == base_name(model_config):
        options["revision"] = model_config.model_revision
    if model_config.attn_implementation:
        options["attn_implementation"] = model_config.attn_implementation
    return _pretrained(model_source(name), trust_remote_code=config.trust_remote_code, **options)


def load_model(name: str, *, device: str | None = None, dtype: str | None = None) -> PreTrainedModel:
    """A decoder on its device; the folder or repository of a PEFT adapter gives its base model with the adapter on it.

    Args:
        device (`str`, *optional*): `"cuda"` if there is one, else `"cpu"`.
        dtype (`str`, *optional*): A dtype of torch, or `"auto"` for the checkpoint's own. Default: bfloat16 on a GPU,
            float32 on a CPU, where bfloat16 is slow.
    """
    name = model_source(name)
    target, dtype = placement(device, dtype)
    return _pretrained(name, dtype=dtype).to(target).eval()  # type: ignore[arg-type]


def placement(device: str | None, dtype: str | None) -> tuple[torch.device, str]:
    """Where a model goes and in what dtype, as [`load_model`] takes them.

    Raises:
        UserError: for a device or a dtype that does not exist here.
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
        raise UserError(f"{device} was asked for, and torch finds no GPU here: use cpu")
    return target, dtype


def adapter_config(model_config: ModelConfig) -> PeftConfig | None:
    """The adapter that is trained, on every linear layer unless it says otherwise; `None` if all weights are."""
    adapter: Any = get_peft_config(model_config)
    if adapter is not None and not adapter.target_modules:
        adapter.target_modules = "all-linear"
    return adapter


def read_adapter(folder: Path) -> dict[str, Any] | None:
    """The configuration of the PEFT adapter in a folder, which names its base model; `None` where there is none.

    Raises:
        UserError: if the adapter names no base model.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    config = read_object(path, "save the adapter anew")
    if not isinstance(config.get("base_model_name_or_path"), str):
        raise UserError(f"{path} names no base model (base_model_name_or_path): save the adapter anew")
    return config


def model_source(name: str) -> str:
    """The name as `from_pretrained` takes it; a folder without a model, or one that is not there, is an error.

    Raises:
        UserError: if it is neither a folder with a model nor a name of the hub.
    """
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
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"{name!r} is neither a folder nor the name of a model of the hub (owner/name), nor 'tiny'"
        ) from error
    return name


def check_model(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Refuses a model that cannot be loaded, by its configuration alone.

    Raises:
        UserError: says what transformers says, in one line.
    """
    try:
        AutoConfig.from_pretrained(model_source(name), revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _unusable(name, "model", error) from error


def check_vocabulary(model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer of another model.

    Args:
        model (`PreTrainedModel` or `str`): The model; or its name, whose configuration alone is read.

    Raises:
        UserError: where the tokenizer has ids that the model has no row for.
    """
    rows, highest = _embedding_rows(model), max(tokenizer.get_vocab().values())
    if 0 < rows <= highest:  # 0: ZeRO-3 holds the rows elsewhere
        raise UserError(
            f"the tokenizer has ids up to {highest}, and the model has rows for {rows} tokens: they do not belong "
            "together. Give the model's own tokenizer, or resize its embeddings (model.resize_token_embeddings) and "
            "save both"
        )


def _embedding_rows(model: PreTrainedModel | str) -> int:
    if isinstance(model, str):
        try:
            return int(AutoConfig.from_pretrained(model_source(model)).get_text_config().vocab_size)
        except (OSError, ValueError, AttributeError):  # an adapter; what else is wrong is said when it is loaded
            return 0
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def _pretrained(name: str, **options: Any) -> PreTrainedModel:
    try:
        read: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        raise _unusable(name, "model", error) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"the weights of {name} have other shapes than its config.json says; the report above names them: the "
            "files of two models lie in one folder. Fetch it again"
        ) from error
    model: PreTrainedModel
    model, loaded = read
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise UserError(
            f"{name} lacks {len(missing)} of its weights, which would be random: {', '.join(missing[:3])}. Fetch or "
            "save it again"
        )
    for weight, tensor in model.named_parameters():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise UserError(
                f"{name} holds numbers that are not finite ({weight}): the run that saved it had overflowed. Go back "
                "to a checkpoint of before"
            )
    return model


def _number(folder: Path) -> int:
    found = re.search(r"(\d+)$", folder.name)
    return int(found[1]) if found else -1


def _unusable(name: str, what: str, error: Exception) -> UserError:
    said = " ".join(str(error).split())[:400]
    if said.startswith("Unrecognized configuration class"):
        return UserError(
            f"{name} is no causal language model ({said[:120]} ...): vision-language and encoder-decoder checkpoints "
            "cannot be trained here; give a text-only model of the family"
        )
    return UserError(
        f"the {what} of {name} cannot be loaded: give a folder, a model of the hub (owner/name), or 'tiny'. "
        f"transformers says: {said}"
    )
