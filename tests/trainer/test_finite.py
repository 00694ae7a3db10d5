"""Steps that are not finite are skipped and counted; three in a row stop the run; bad weights are never saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM
from trl import SFTTrainer

from tests.support.scripted_trainer import scripted_trainer, steps
from trl_search.common.errors import UserError
from trl_search.trainer.finite import FiniteSteps, avoid_cudnn_attention, refuse_nonfinite_weights
from trl_search.trainer.sft import SearchSFTConfig


class Poisoned(FiniteSteps, SFTTrainer):
    """Its loss or a gradient is not finite at the given micro-steps."""

    poison: tuple[int, ...] = ()
    gradient_only: bool = False
    calls = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.calls += 1
        if self.calls not in self.poison:
            return loss
        if not self.gradient_only:
            return loss * torch.nan
        loss.register_hook(lambda gradient: gradient * torch.nan)
        return loss * 1.0


def trainer(
    folder: Path, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, *poison: int, **options: Any
) -> Poisoned:
    config = SearchSFTConfig(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=1, learning_rate=1e-2, weight_decay=0.1,
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, gradient_checkpointing=False,
        disable_tqdm=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "assistant_masks": [0, 1, 1, 1]}] * 12)
    made = Poisoned(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    made.poison = poison
    return made


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("gradient_only", [False, True], ids=["loss", "gradient"])
def test_a_nonfinite_step_changes_no_weight_and_is_counted(
    gradient_only: bool, tmp_path: Path, random_model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = trainer(tmp_path, random_model, tokenizer, 2, 4)
    made.gradient_only = gradient_only
    seen: list[list[torch.Tensor]] = [weights(random_model)]
    step = made._get_grad_norm

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(weights(random_model))
        return step(*args, **kwargs)

    made._get_grad_norm = watched  # type: ignore[method-assign]
    made.train()
    seen.append(weights(random_model))
    # seen[i + 1] is before the effect of step i + 1 (counted from 1), seen[i + 2] after it.
    unchanged = [all(map(torch.equal, seen[i + 1], seen[i + 2])) for i in range(6)]
    assert unchanged == [False, True, False, True, False, False]
    assert made.state.log_history[-2]["skipped_steps"] == 2
    assert all(torch.isfinite(weight).all() for weight in weights(random_model))


def test_three_nonfinite_steps_in_a_row_stop_the_run_with_step_and_text(
    tmp_path: Path, random_model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = trainer(tmp_path, random_model, tokenizer, 1, 3, 4, 5)
    before = weights(random_model)
    with pytest.raises(UserError, match=r"step 5: .*3 steps in a row") as error:
        made.train()
    assert repr(tokenizer.decode([5, 6, 7, 8])) in str(error.value)
    assert not all(map(torch.equal, before, weights(random_model)))  # the good step was taken


def test_one_nonfinite_micro_step_skips_the_whole_step(
    tmp_path: Path, random_model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = trainer(tmp_path, random_model, tokenizer, 3, gradient_accumulation_steps=2)
    made.train()
    assert made.skipped == 1 and all(torch.isfinite(weight).all() for weight in weights(random_model))


def test_nonfinite_weights_are_never_saved_over_a_good_model(
    tmp_path: Path, random_model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = trainer(tmp_path, random_model, tokenizer)
    made.save_model(str(tmp_path / "model"))
    good = (tmp_path / "model" / "model.safetensors").read_bytes()
    with torch.no_grad():
        next(random_model.parameters())[0, 0] = torch.inf
    with pytest.raises(UserError, match="nothing was written to"):
        made.save_model(str(tmp_path / "model"))
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == good
    refuse_nonfinite_weights([("ids", torch.tensor([1]))], None)  # integers are always finite


def test_grpo_stops_too_with_step_and_question(
    tmp_path: Path, random_model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = scripted_trainer(tmp_path, random_model, tokenizer, max_steps=6)
    made.tamper = lambda logps, entropies: (logps * torch.nan, entropies)
    before = weights(random_model)
    with pytest.raises(UserError, match=r"step 3: .*3 steps in a row.*Who wrote book \d"):
        made.train()
    assert all(map(torch.equal, before, weights(random_model)))
    assert [row["skipped_steps"] for row in steps(made)] == [1, 2]


def test_cudnn_attention_is_switched_off_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    switched: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: not switched)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", switched.append)
    avoid_cudnn_attention()
    avoid_cudnn_attention()
    assert switched == [False] and caplog.text.count("is disabled") == 1
