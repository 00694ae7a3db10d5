"""Checks before a training that it can change the weights: a reward counts, weights are trainable, updates survive.

    weight 0.02 in bfloat16     neighbours at a distance of 1.2e-4
    update of Adam              about learning_rate, 1e-6: rounded away

transformers 5 loads a model in the precision of its checkpoint, mostly bfloat16, unless told otherwise.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel

from trl_search.common.errors import UserError
from trl_search.common.hub import cached_folder
from trl_search.config.refused_keys import refuse_weightless_rewards
from trl_search.policies.lora import leaves_the_base

logger = logging.getLogger(__name__)

_SAMPLE = 1 << 16  # weights per tensor that are looked at


def check_can_learn(trainer: Any) -> None:
    """Refuses a training that cannot change the weights, and warns if most updates would be rounded away.

    Raises:
        UserError: if no weight is trainable, or no reward has a weight.
    """
    check_trainable(trainer.model)
    warn_of_dropout(trainer.model)
    refuse_weightless_rewards(trainer.reward_func_names, trainer.reward_weights.tolist(), trainer.args)
    # DeepSpeed and FSDP update copies in float32, and shard both models.
    if trainer.accelerator.distributed_type not in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        warn_of_lost_updates(trainer.model, trainer.args)
        if trainer.state.global_step == 0:
            warn_of_changed_base(trainer.model)
            if trainer.ref_model is not None:
                warn_of_another_reference(trainer.model, trainer.ref_model)


def check_trainable(model: torch.nn.Module) -> None:
    """Raises `UserError` if no weight is trainable, as with an adapter that was loaded for inference."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "no weight of the model is trainable: load an adapter with PeftModel.from_pretrained(..., "
            "is_trainable=True), give peft_config for a new one, or call model.requires_grad_(True)"
        )


def warn_of_dropout(model: torch.nn.Module) -> None:
    """Warns if the loss drops units, as no engine does. TRL's `lora_dropout` is 0.05 by default."""
    share = max((one.p for one in model.modules() if isinstance(one, torch.nn.Dropout)), default=0.0)
    if share:
        logger.warning(
            "the loss is computed with a dropout of %g, and rollouts without, so that another policy is trained than "
            "the one that sampled: set lora_dropout: 0, or disable_dropout: true",
            share,
        )


def warn_of_lost_updates(model: torch.nn.Module, args: Any) -> None:
    """Warns if most updates of Adam would be rounded away, because the weights themselves have a low precision."""
    if "adam" not in str(args.optim).lower():
        return
    lost = total = 0
    low = [one for one in model.parameters() if one.requires_grad and one.dtype in (torch.bfloat16, torch.float16)]
    for parameter in low:
        weights = parameter.detach().flatten()[:_SAMPLE].float().abs()
        # The neighbours of a weight w are at least w × eps / 2 away, and less than half of that is rounded away.
        lost += int((weights * torch.finfo(parameter.dtype).eps / 4 > args.learning_rate).sum())
        total += len(weights)
    if lost > total / 2:
        logger.warning(
            "the weights are in %s, where updates as small as learning_rate=%g are rounded away for %.0f %% of them: "
            "load the model in float32 (dtype=torch.float32; it still computes in bfloat16 with bf16=True), or train "
            "an adapter",
            str(low[0].dtype).removeprefix("torch."), args.learning_rate, 100 * lost / total,
        )  # fmt: skip


def warn_of_another_reference(model: torch.nn.Module, reference: torch.nn.Module) -> None:
    """Warns if the reference of the KL term, which TRL loads by the model's name, has other weights than the model."""
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if differ(parameter.flatten()[:_SAMPLE], theirs[name].flatten()[:_SAMPLE]):
            logger.warning(
                "the reference of beta, which TRL loaded from %s, has other weights than the trained model: to "
                "compare with the model as it is now, save it (model.save_pretrained(folder)) and give the folder",
                reference.config._name_or_path,  # type: ignore[union-attr]
            )
            return


def warn_of_changed_base(model: torch.nn.Module) -> None:
    """Warns if the base of an adapter, which is not saved with it, is not the one that a later loading will take."""
    if not isinstance(model, PeftModel) or not leaves_the_base(model.active_peft_config):
        return
    base: Any = model.get_base_model()
    if changed := changed_weight(base):
        logger.warning(
            "only the adapter is saved, and a later loading takes its base from %s, but the base in memory has other "
            "weights (%s): save it first (base.save_pretrained(folder), and its tokenizer), and load it from there",
            base.config._name_or_path, changed,
        )  # fmt: skip


def changed_weight(base: PreTrainedModel) -> str | None:
    """The name of a weight whose first row differs from that in the files of the model's name. `None` also if there
    are no such files on this machine."""
    weights = {
        name.replace(".base_layer", "").replace(".original_module", ""): w for name, w in base.named_parameters()
    }
    for file in _files(base.config._name_or_path):
        with safe_open(file, "pt") as stored:
            for name in weights.keys() & stored.keys():
                part = stored.get_slice(name)
                if part.get_shape() == list(weights[name].shape) and differ(weights[name][:1], part[:1]):
                    return name
    return None


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors differ by more than the rounding of the coarser type."""
    if not (one.is_floating_point() and other.is_floating_point()):  # quantized
        return False
    dtype = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return not torch.equal(one.detach().cpu().to(dtype), other.detach().cpu().to(dtype))


def _files(name: str) -> list[Path]:
    if not name:
        return []
    folder = Path(name) if Path(name).is_dir() else cached_folder(name) if name.count("/") < 2 else None
    return [] if folder is None else sorted(folder.glob("model*.safetensors"))
