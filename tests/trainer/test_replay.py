"""Our rollouts, replayed into TRL's own trainer, give the same weights and metrics: only the rollout differs.

Our trainer computes log-probs over packs or sorted rows and only for tokens of the loss, TRL's for all padded tokens.
"""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig
from transformers.trainer_callback import PrinterCallback
from trl import GRPOTrainer

from tests.conftest import make_random_model
from tests.support.scripted_trainer import ScriptedTrainer, config, later_is_better, scripted_trainer, steps

pytestmark = pytest.mark.slow

LORA = {"peft_config": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")}
CASES = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo", "scale_rewards": "batch"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "sequence": {"importance_sampling_level": "sequence", "num_iterations": 2},
    "iterations": {
        "num_iterations": 2,
        "beta": 0.1,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    },
    "entropy": {"top_entropy_quantile": 0.5},
    "truncated": {"mask_truncated_completions": True, "max_completion_length": 320},
    "lora": {"trainer": LORA, "beta": 0.1},
    "packs": {"packed_attention": "sdpa", "max_packed_tokens": 700, "beta": 0.1},
}
# Times, and what TRL counts only when it decodes itself.
NOT_COMPARED = ("time", "runtime", "per_second", "num_tokens")


@pytest.mark.parametrize("case", CASES)
def test_a_replay_in_the_parent_gives_the_same_weights_and_metrics(case, tokenizer, tmp_path, monkeypatch):
    options = {"max_steps": 2, "learning_rate": 1e-3, "rewards": later_is_better, **CASES[case]}
    extra = options.get("trainer", {})
    folder = str(tmp_path / "model")  # a reference model is loaded from there
    make_random_model(tokenizer).save_pretrained(folder)
    ours = scripted_trainer(tmp_path / "ours", folder, tokenizer, **options)
    recorded = []
    rollout = ScriptedTrainer._rollout

    def recording(self, prompts, trainer):
        recorded.append(rollout(self, prompts, trainer))
        return recorded[-1]

    monkeypatch.setattr(ours, "rollout_func", lambda prompts, trainer: recording(ours, prompts, trainer))
    start = {name: tensor.clone() for name, tensor in ours.model.state_dict().items()}
    ours.train()

    kept = {key: value for key, value in options.items() if key not in ("trainer", "rewards")}
    replayed = iter(recorded)
    parent = GRPOTrainer(
        folder,
        later_is_better,
        config(tmp_path / "parent", **kept),
        ours.train_dataset,
        processing_class=tokenizer,
        rollout_func=lambda prompts, trainer: next(replayed),
        **extra,
    )
    parent.remove_callback(PrinterCallback)
    parent.model.load_state_dict(start)
    parent.train()
    assert next(replayed, None) is None, "the parent must use all rollouts"

    theirs = parent.model.state_dict()
    moved = False
    for name, tensor in ours.model.state_dict().items():
        torch.testing.assert_close(
            tensor, theirs[name], atol=1e-5, rtol=1e-4, msg=lambda said, name=name: f"{name}: {said}"
        )
        moved |= not torch.equal(tensor, start[name])
    assert moved
    for mine, expected in zip(steps(ours), steps(parent), strict=True):
        for name in expected.keys() & mine.keys():
            if any(part in name for part in NOT_COMPARED):
                continue
            assert math.isclose(mine[name], expected[name], rel_tol=1e-3, abs_tol=1e-5), name
    compared = steps(parent)[0].keys() & steps(ours)[0].keys()
    assert {"loss", "grad_norm", "reward", "entropy", "completions/mean_length"} <= compared
