"""A run is resumed only with the adapter of its checkpoint."""

from __future__ import annotations

import copy

import pytest
from peft import LoraConfig

from tests.support.scripted_trainer import four_ways, scripted_trainer
from trl_search.common.errors import UserError


def run(folder, model, tokenizer, *, steps, **adapter):
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | adapter)
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": steps}
    trainer = {"peft_config": None if adapter.get("r") == 0 else config}
    return scripted_trainer(folder, copy.deepcopy(model), tokenizer, four_ways, trainer=trainer, **options)


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [
        ({}, {"r": 8}, "^lora_r: 8 is not that of the adapter in .*, 4: resume with that of the first run"),
        ({}, {"lora_alpha": 16}, "^lora_alpha: 16 is not that of the adapter"),
        ({}, {"target_modules": ["q_proj", "k_proj"]}, r"^lora_target_modules: \['k_proj', 'q_proj'\] is not that"),
        ({}, {"r": 0}, "holds an adapter, but this run would train the whole model: resume with use_peft: true"),
        ({"r": 0}, {}, "holds the weights of a whole model, but this run would train an adapter: .* use_peft: false"),
    ],
)
def test_the_checkpoint_of_another_adapter_is_refused(tmp_path, random_model, tokenizer, first, then, told):
    """Other target modules and another alpha were taken in silence."""
    run(tmp_path, random_model, tokenizer, steps=1, **first).train()
    with pytest.raises(UserError, match=told):
        run(tmp_path, random_model, tokenizer, steps=2, **then).train(resume_from_checkpoint="last")


@pytest.mark.parametrize("adapter", [{"target_modules": "all-linear"}, {"use_dora": True, "bias": "lora_only"}])
def test_the_same_adapter_is_resumed(tmp_path, random_model, tokenizer, adapter):
    run(tmp_path, random_model, tokenizer, steps=1, **adapter).train()
    resumed = run(tmp_path, random_model, tokenizer, steps=2, **adapter)
    resumed.train(resume_from_checkpoint="last")
    assert resumed.state.global_step == 2
