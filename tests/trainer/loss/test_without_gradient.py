"""Trajectories that cannot change the weights are skipped, with the same loss, gradients and counts."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig

from tests.conftest import make_random_model
from tests.support.scripted_trainer import four_ways, real_trainer, scripted_trainer, steps
from tests.trainer.loss.test_importance import as_vllm, gradients
from trl_search.trainer.loss.without_gradient import METRIC, drop_rounding, tokens_with_gradient

LORA = {"trainer": {"peft_config": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")}}
STEPS = {"num_iterations": 2}
ANY = {"vllm_importance_sampling_clip_min": 1e-30, "vllm_importance_sampling_clip_max": 1e30}
VLLM = {"vllm_importance_sampling_clip_min": 0.5, "vllm_importance_sampling_clip_max": 1.5}
EXACT = {
    **{name: {"loss_type": name, **STEPS} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", **STEPS},
    "sequence": {"importance_sampling_level": "sequence", **STEPS},
    "delta": {"delta": 1.5, **STEPS},
    "off-policy mask": {"off_policy_mask_threshold": 0.01, **STEPS},
    "one step": {},
    "one step, sequence": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "packs": {"packed_attention": "sdpa", "max_packed_tokens": 700, **STEPS},
    "lora": {**LORA, **STEPS},
    "lora, packs": {**LORA, "packed_attention": "sdpa"},
    "lora, checkpointing": {**LORA, "gradient_checkpointing": True},
    "vllm": VLLM,
    "vllm, sequence": {"vllm_importance_sampling_mode": "sequence_truncate", **ANY},
    "vllm, vespo": {"loss_type": "vespo", **VLLM},
    "vllm, geometric": {"vllm_importance_sampling_mode": "geometric_mask", **ANY},
    "vllm, steps": {**VLLM, **STEPS, "off_policy_mask_threshold": 0.01},
}
# Settings in which a trajectory without an advantage changes the weights.
ALL_RUN = {
    "beta": {"beta": 0.1},
    "entropy bonus": {"entropy_coef": 0.1},
    "adaptive entropy": {"use_adaptive_entropy": True},
    "top-entropy quantile": {"top_entropy_quantile": 0.5},
    "llds": {"llds_coef": 0.1, **STEPS},
    "prompt learning": {"logprobs": None},
}


def two_groups(tmp_path, random_model, tokenizer, **options):
    """A trainer and a batch: the first group has advantages, the second has none; the weights have changed since."""
    with torch.no_grad():  # tied to the output, so that log-probs differ between tokens
        random_model.get_input_embeddings().weight.mul_(10)
    random_model.save_pretrained(tmp_path / "model")  # the reference model of beta > 0 is loaded from there
    random_model.config._name_or_path = str(tmp_path / "model")
    vllm = bool(VLLM.keys() & options.keys())

    def script(number, prompt):
        return four_ways(number, prompt) if number < 4 else four_ways(1 + number % 2, prompt)

    trainer = scripted_trainer(
        tmp_path, random_model, tokenizer, script, logprob=-7.0, per_device_train_batch_size=8, **options
    )
    trainer = as_vllm(trainer) if vllm else trainer
    batch = trainer.score([trainer.train_dataset[i // 4] for i in range(8)])
    assert (batch["advantages"] != 0).tolist() == [True] * 4 + [False] * 4
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter))
    return trainer, batch


@pytest.mark.parametrize("setting", EXACT)
def test_loss_and_gradients_equal_those_of_the_full_computation(tmp_path, random_model, tokenizer, setting):
    trainer, batch = two_groups(tmp_path, random_model, tokenizer, **EXACT[setting])
    assert not trainer.all_run
    loss, gradient, logged = gradients(trainer, batch)
    entropies, mask = trainer.entropies.detach(), (batch["completion_mask"] * batch["tool_mask"]).bool()
    assert (entropies[:4][mask[:4]] != 0).all() and not entropies[4:].any(), "the second group must not run"
    assert logged.pop(METRIC) == 0.5
    assert logged["entropy"] == pytest.approx(entropies[:4][mask[:4]].mean().item(), rel=1e-5)

    trainer.all_run = True
    full_loss, full_gradient, full_logged = gradients(trainer, batch)
    assert trainer.entropies[4:].any() and gradient.any()
    torch.testing.assert_close(loss, full_loss, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(gradient, full_gradient, atol=1e-6 * float(full_gradient.abs().max()), rtol=1e-5)
    assert logged.keys() == full_logged.keys()
    for name in logged.keys() - {"entropy", "vespo/phi_seq_mean"}:
        if not name.startswith("sampling/"):  # the clip ratios: nothing is clipped if the advantage is 0
            assert logged[name] == pytest.approx(full_logged[name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("setting", ALL_RUN)
def test_all_trajectories_run_if_a_loss_term_needs_them(tmp_path, random_model, tokenizer, setting, monkeypatch):
    options = dict(ALL_RUN[setting])
    if "logprobs" in options:
        monkeypatch.setattr("trl_search.trainer.loss.seams.make_logprobs", lambda *args: options.pop("logprobs", None))
        options = {}
    trainer, batch = two_groups(tmp_path, random_model, tokenizer, **options)
    assert trainer.all_run
    _, logged = trainer.loss(batch)
    assert trainer.entropies[4:].any() and METRIC not in logged


@pytest.mark.parametrize("options", [{"loss_type": "vespo", **STEPS}, VLLM])
def test_means_are_over_the_trajectories_that_ran(tmp_path, random_model, tokenizer, options):
    """VESPO's weight and the vLLM correction: skipped trajectories have a ratio of 1 and are in no mean."""
    trainer, batch = two_groups(tmp_path, random_model, tokenizer, **options)
    if "old_per_token_logps" in batch:
        trainer.all_run = True
        trainer.loss(batch)
        trainer.all_run, batch["old_per_token_logps"] = False, trainer.logps.detach() - 2e-3
    logged = trainer.loss(batch)[1]
    half = {name: value[:4] if value.dim() else value for name, value in batch.items()}
    expected = trainer.loss(half)[1]
    assert expected.pop(METRIC) == 0 and logged.pop(METRIC) == 0.5
    assert logged == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("attention", ["padded", "sdpa"])
def test_a_micro_batch_without_any_gradient_gives_a_zero_loss_with_a_graph(
    tmp_path, random_model, tokenizer, attention
):
    trainer, batch = two_groups(tmp_path, random_model, tokenizer, packed_attention=attention, **VLLM)
    silent = {name: value[4:] if value.dim() else value for name, value in batch.items()}
    loss, gradient, logged = gradients(trainer, silent)
    assert loss == 0 and not gradient.any()
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())  # DDP waits for every parameter
    assert logged[METRIC] == 1 and "entropy" not in logged
    assert not [name for name in logged if name.startswith("sampling/")]  # a mean over nothing would be NaN


def test_a_training_with_accumulation_gives_the_same_weights_as_the_full_one(tmp_path, tokenizer):
    """Two optimizer steps of four micro-batches, most of them without any gradient."""

    def rewards(completions, **kwargs):
        return [1.0, 0.0, 0.25, 0.5] + [0.3] * (len(completions) - 4)  # one group of four has a gradient

    weights = []
    for all_run in (False, True):
        torch.manual_seed(0)
        trainer = real_trainer(
            tmp_path / str(all_run), make_random_model(tokenizer), tokenizer, rewards=rewards,
            per_device_train_batch_size=4, gradient_accumulation_steps=4, learning_rate=1e-3, shuffle_dataset=False,
        )  # fmt: skip
        trainer.all_run = all_run
        trainer.train()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
        logged = steps(trainer)
        assert [entry.get(METRIC) for entry in logged] == [None if all_run else 0.75] * 2
        assert all(entry["grad_norm"] > 0 and math.isfinite(entry["entropy"]) for entry in logged)
        assert not any(entry["alarm/not_finite"] for entry in logged)
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=1e-5)


def test_a_step_without_any_gradient_raises_no_alarm(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(tmp_path, random_model, tokenizer, lambda number, prompt: four_ways(2, prompt))
    trainer.train()
    for entry in steps(trainer):
        assert entry[METRIC] == 1 and entry["grad_norm"] == 0 and "entropy" not in entry
        assert entry["alarm/not_finite"] == 0


def test_a_token_needs_both_an_advantage_and_a_place_in_the_loss():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 1]])
    assert tokens_with_gradient(torch.tensor([0.0, -0.5, 1.0, math.nan]), mask).tolist() == [
        [0, 0, 0], [1, 1, 1], [0, 0, 0], [1, 0, 1],
    ]  # fmt: skip
    of_each_token = torch.tensor([[0.0, 0.0, 2.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert tokens_with_gradient(of_each_token, mask).any(dim=1).tolist() == [False, True, False, False]


def test_advantages_of_equal_rewards_are_exactly_zero(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(
        tmp_path, random_model, tokenizer, rewards=lambda completions, **kwargs: [1.2] * len(completions),
        num_generations=6, per_device_train_batch_size=6,
    )  # fmt: skip
    batch = trainer.score([trainer.train_dataset[0]] * 6)
    assert (batch["advantages"] == 0).all()
    rounded = torch.full((6,), 1e-3)
    trainer.multi_objective_aggregation = (
        "normalize_then_sum"  # this setting compares groups, so equal rewards may have an advantage
    )
    drop_rounding(rounded, torch.full((6, 1), 1.2), trainer)
    assert (rounded == 1e-3).all()
