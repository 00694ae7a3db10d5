"""A resumed cold start trains on each trajectory once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from trl_search.common.errors import UserError
from trl_search.policies.tiny import tiny_policy_path
from trl_search.trainer.sft import SearchSFTConfig, sft_rows, train

NUMBERS = range(10, 18)


def trained(folder: Path, tokenizer: PreTrainedTokenizerBase, numbers: Any = NUMBERS, **options: Any) -> list[str]:
    """Trains on one trajectory per number; the names of the checkpoints."""
    rows: Dataset = sft_rows(((5, 6, 7), (number, 8), (1, 1)) for number in numbers)
    settings = {"per_device_train_batch_size": 2, "max_steps": 2, **options}
    config = SearchSFTConfig(
        str(folder), save_strategy="steps", save_steps=1, use_cpu=True, bf16=False, report_to="none", **settings
    )
    train(AutoModelForCausalLM.from_pretrained(tiny_policy_path()), tokenizer, rows, config)
    return sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"numbers": range(10, 34)}, "number of trajectories: 8 then, 24 now"),
        ({"numbers": [*NUMBERS][::-1]}, "the trajectories differ"),
        ({"per_device_train_batch_size": 4}, "trajectories per step: 2 then, 4 now"),
        ({"seed": 2}, "seed: 42 then, 2 now"),
    ],
)
def test_another_order_is_refused(tmp_path, tokenizer, options, said):
    trained(tmp_path, tokenizer)
    resumed = {"max_steps": 4, "resume_from_checkpoint": "last"}
    with pytest.raises(UserError, match=rf"checkpoint-2 was trained with other trajectories or batches \({said}\)"):
        trained(tmp_path, tokenizer, **resumed, **options)
    assert "checkpoint-4" in trained(tmp_path, tokenizer, **resumed, **options, ignore_data_skip=True)


def test_the_same_trajectories_are_continued(tmp_path, tokenizer):
    trained(tmp_path, tokenizer)
    halved = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    assert "checkpoint-4" in trained(tmp_path, tokenizer, max_steps=4, resume_from_checkpoint="last", **halved)
