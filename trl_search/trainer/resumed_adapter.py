"""Refuses to resume from the checkpoint of another adapter.

PEFT loads the weights that fit, and leaves the others as they were made: with other `lora_target_modules`, the run
would begin with an untrained adapter, and with another `lora_alpha` with another policy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel

from trl_search.common.errors import UserError
from trl_search.policies.adapters import ADAPTER_CONFIG

# What makes an adapter, besides its weights, and the keys of a recipe.
_KEYS = {
    "peft_type": "peft_type",
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "modules_to_save": "lora_modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "layers_to_transform": "layers_to_transform",
    "bias": "bias",
}


def refuse_another_adapter(model: Any, checkpoint: str | None) -> None:
    """Refuses a checkpoint whose adapter is not that of the model, or that has one where the model has none.

    Raises:
        UserError: names the key to change.
    """
    if checkpoint is None:
        return
    folder, config = Path(checkpoint), None
    if isinstance(model, PeftModel):
        config = model.peft_config[model.active_adapter]
        folder = folder if model.active_adapter == "default" else folder / model.active_adapter
    if (folder / ADAPTER_CONFIG).is_file() != (config is not None):
        holds, wanted = ("the weights of a whole model", "false") if config else ("an adapter", "true")
        raise UserError(
            f"{checkpoint} holds {holds}, but this run would train {'an adapter' if config else 'the whole model'}: "
            f"resume with use_peft: {wanted}, as the first run (in Python, peft_config), or start a new run"
        )
    if config is None:
        return
    theirs = PeftConfig.from_pretrained(str(folder))
    for name, key in _KEYS.items():
        ours, saved = (_plain(getattr(one, name, None)) for one in (config, theirs))
        if ours != saved:
            raise UserError(
                f"{key}: {ours} is not that of the adapter in {checkpoint}, {saved}: resume with that of the first "
                "run, or start a new run"
            )


def _plain(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, set | list | tuple) else getattr(value, "value", value)
