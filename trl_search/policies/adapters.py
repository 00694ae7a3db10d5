"""PEFT adapters: the configuration of a new one, the folder of a trained one, and what cannot be trained here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from transformers import PreTrainedModel
from trl import ModelConfig, get_peft_config

from trl_search.common.bounds import check_minima, check_positive, check_share
from trl_search.common.errors import UserError
from trl_search.common.files import read_object
from trl_search.policies.lora import leaves_the_base

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def adapter_config(model_config: ModelConfig) -> PeftConfig | None:
    """The configuration of the adapter to train, by default on every linear layer; `None` for full fine-tuning.

    Raises:
        UserError: for a value that PEFT would refuse once the model is loaded, or train without effect.
    """
    if not model_config.use_peft:
        return None
    check_minima(model_config, lora_r=1)
    check_share(lora_dropout=model_config.lora_dropout)
    check_positive(lora_alpha=model_config.lora_alpha)
    adapter: Any = get_peft_config(model_config)
    adapter.target_modules = adapter.target_modules or "all-linear"
    return adapter


def check_target_modules(model: PreTrainedModel, adapter: PeftConfig | None) -> None:
    """Raises `UserError` if the model has no module that an adapter names. PEFT would say so after the warm start."""
    wanted: Any = getattr(adapter, "target_modules", None)
    names = [name for name, _ in model.named_modules()]
    if wanted in (None, "all-linear") or any(check_target_module_exists(adapter, name) for name in names):
        return
    there = sorted(
        {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if "Linear" in str(type(module))}
    )
    shown = wanted if isinstance(wanted, str) else ", ".join(sorted(wanted))
    raise UserError(f"the model has no module {shown} (lora_target_modules): it has {', '.join(there)}; or all-linear")


def read_adapter(folder: Path) -> dict[str, Any] | None:
    """The configuration of the PEFT adapter in a folder, which names its base model; `None` if there is no adapter.

    Raises:
        UserError: if the adapter names no base model.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    config = read_object(path, "save the adapter again")
    if not isinstance(config.get("base_model_name_or_path"), str):
        raise UserError(f"{path} names no base model (base_model_name_or_path): save the adapter again")
    return config


def refuse_adapter_folder(name: str) -> None:
    """Raises `UserError` if the model to train is only an adapter: PEFT would begin it anew, or train nothing."""
    if adapter := read_adapter(Path(name).expanduser()):
        raise UserError(
            f"{name} is an adapter of {adapter['base_model_name_or_path']}, not a whole model: train the merged model "
            "(merge_adapter: true in its sft recipe, or .merge_and_unload() and .save_pretrained(folder) in Python), "
            "or, in Python, train the adapter on: model=PeftModel.from_pretrained(base, folder, is_trainable=True)"
        )


def adapted(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The model with the adapter in a folder, in the precision of the model, for inference.

    transformers' own loading does not find the weights of DoRA and of `modules_to_save`, and cannot load VeRA.

    Raises:
        UserError: if the folder lacks weights of the adapter, or the adapter does not fit the model.
    """
    if not any((Path(folder) / name).is_file() for name in _WEIGHTS):
        raise UserError(
            f"{folder} has {ADAPTER_CONFIG}, but no weights ({_WEIGHTS[0]}): fetch or save the adapter again"
        )
    try:
        config = PeftConfig.from_pretrained(folder, inference_mode=True)
        refuse_unsupported(config)
        wrapped: Any = get_peft_model(model, config, autocast_adapter_dtype=False)
        loaded = wrapped.load_adapter(folder, "default", autocast_adapter_dtype=False)
    except (TypeError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:400]
        raise UserError(f"the adapter in {folder} does not fit its base model. PEFT says: {said}") from error
    if missing := loaded.missing_keys:
        raise UserError(
            f"{folder} lacks {len(missing)} of its adapter's weights: {', '.join(missing[:3])}. Fetch or save the "
            "adapter again"
        )
    bare: PreTrainedModel = wrapped.get_base_model()
    bare.config._name_or_path = folder
    return bare


def refuse_unsupported(config: Any) -> None:
    """Refuses adapters with which the policy in rollouts, or the saved one, would not be the one that was trained."""
    if not isinstance(config, PeftConfig):
        raise UserError(f"peft_config must be a configuration of PEFT, LoraConfig(...), not {type(config).__name__}")
    if config.is_prompt_learning:
        kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
        raise UserError(
            f"{kind} puts tokens before every prompt, which no rollout engine supports: use LoRA (LoraConfig), or "
            "another adapter of the weights"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise UserError(
            "alora_invocation_tokens: no rollout engine looks for them, so it would sample without the adapter: leave "
            "them out"
        )
    if str(initialisation := getattr(config, "init_lora_weights", True)).startswith("pissa_niter"):
        raise UserError(
            f"init_lora_weights={initialisation!r} changes the base model by a random approximation, which no later "
            "loading repeats, so the saved adapter would belong to a lost base: use 'pissa'"
        )


def refuse_shifted_reference(config: PeftConfig, beta: float) -> None:
    """Refuses adapters that change the base if there is a KL term: its reference is the model without the adapter."""
    if not beta:
        return
    if not leaves_the_base(config):
        raise UserError(
            f"init_lora_weights={getattr(config, 'init_lora_weights', True)!r} changes the base model, so the model "
            f"without the adapter, which is the reference of beta={beta}, would not be the model at the start: set "
            "beta: 0, or another init_lora_weights"
        )
    if (bias := getattr(config, "bias", "none")) not in ("none", None):
        raise UserError(
            f"bias={bias!r} trains biases of the base model, so the model without the adapter, which is the reference "
            f"of beta={beta}, would change, too: set beta: 0, or bias='none'"
        )


def check_adapter(model: Any, config: PeftConfig | None, beta: float) -> None:
    """Checks the adapter of a training, which is new (`config`) or around `model`.

    Raises:
        UserError: if it cannot be trained here, or would replace another one.
    """
    wrapped = isinstance(model, PeftModel)
    if config is None and not wrapped:
        return
    if config is not None and not wrapped and isinstance(model, torch.nn.Module):
        refuse_second_adapter(model)
    mine = model.active_peft_config if config is None else config
    refuse_unsupported(mine)
    refuse_shifted_reference(mine, beta)
    if wrapped and beta and model.active_adapter != "default":
        raise UserError(
            f"the adapter {model.active_adapter!r} is trained, but the reference of beta={beta} is made from the one "
            "called 'default': load yours under that name, or set beta: 0"
        )
    if wrapped and beta and "ref" in model.peft_config:
        raise UserError(
            f"the model still has the adapter 'ref', the reference of an earlier trainer with beta={beta}: delete it, "
            "model.delete_adapter('ref'), to make the model as it is now the reference"
        )


def refuse_second_adapter(model: torch.nn.Module) -> None:
    """Raises `UserError` if a model has an adapter inside, as after `AutoModelForCausalLM.from_pretrained(adapter)`.

    PEFT would begin it anew, and what it had learnt would be lost.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError(
            "the model already has an adapter, which a new one would replace: merge the first "
            "(PeftModel.from_pretrained(base, folder).merge_and_unload(), then save_pretrained), or train it on "
            "(model=PeftModel.from_pretrained(base, folder, is_trainable=True), without peft_config)"
        )


def refuse_tied(model: Any, remedy: str) -> None:
    """Refuses to merge an adapter of embeddings that are the output layer too: it would change both, but is in one."""
    bare = model.get_base_model()
    if not bare.config.get_text_config().tie_word_embeddings:
        return
    tied = getattr(model.active_peft_config, "ensure_weight_tying", False)
    for part in (bare.get_input_embeddings(), bare.get_output_embeddings()):
        if isinstance(part, BaseTunerLayer) or (isinstance(part, ModulesToSaveWrapper) and not tied):
            raise UserError(
                "the model has one weight for its embeddings and its output layer (tie_word_embeddings), and the "
                "adapter changes only one of them, so merging it makes another model: leave embed_tokens and lm_head "
                "out of the adapter, or train both as one (modules_to_save=['embed_tokens'], "
                f"ensure_weight_tying=True), {remedy}"
            )


def refuse_tokens_of_the_head(model: Any) -> None:
    """Raises `UserError` for `trainable_token_indices` of tied embeddings: TRL's loss cannot run the output layer."""
    if isinstance(model, PeftModel) and isinstance(model.get_output_embeddings(), TrainableTokensWrapper):
        raise UserError(
            "trainable_token_indices also wraps the output layer of this model, whose weight is that of the "
            "embeddings (tie_word_embeddings), and TRL's loss cannot run it: use modules_to_save=['embed_tokens'] "
            "with ensure_weight_tying=True, or load the model with tie_word_embeddings=False"
        )
