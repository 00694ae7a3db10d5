"""The vLLM importance correction uses the training forward: no extra pass, the same loss and gradients."""

from __future__ import annotations

import math
import types

import pytest
import torch
from trl import GRPOTrainer

from tests.support.scripted_trainer import scripted_trainer
from trl_search.common.errors import UserError
from trl_search.config.grpo import IMPORTANCE_MODES, SearchGRPOConfig
from trl_search.trainer.loss.importance import importance_ratio
from trl_search.trainer.loss.likelihood import action_numbers, llds_penalty

BOUNDS = {"token": (0.5, 1.5), "sequence": (1e-20, 1e20)}


def as_vllm(trainer):
    """Makes TRL treat the scripted policy as a vLLM engine, so that it corrects the log-probs."""
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    trainer.vllm_generation = types.SimpleNamespace(sync_weights=lambda: None)
    return trainer


def gradients(trainer, batch):
    trainer.model.zero_grad()
    loss, logged = trainer.loss(batch)
    loss.backward()
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in trained]), logged


@pytest.mark.parametrize("mode", IMPORTANCE_MODES[:4])
def test_loss_and_gradients_equal_those_with_trls_own_pass(tmp_path, random_model, tokenizer, mode):
    with torch.no_grad():  # tied to the output, so that log-probs differ between tokens
        random_model.get_input_embeddings().weight.mul_(10)
    low, high = BOUNDS[mode.split("_")[0]]
    bounds = {"vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": high}
    options = {"vllm_importance_sampling_mode": mode, **bounds}
    trainer = as_vllm(scripted_trainer(tmp_path, random_model, tokenizer, logprob=-7.0, **options))
    trainer.score()  # the probe of the log-probs runs before the first rollout
    forwards = []
    trainer.model.register_forward_pre_hook(lambda *args: forwards.append(torch.is_grad_enabled()))
    batch = trainer.score()
    assert not forwards and "old_per_token_logps" not in batch
    loss, gradient, logged = gradients(trainer, batch)
    assert forwards == [True] and gradient.any()

    # TRL's result for the same rollout, with its own pass.
    mask = batch["completion_mask"] * batch["tool_mask"]
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        old, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, input_ids, attention, mask.shape[1], batch_size=4
        )
    difference = torch.nan_to_num((old - batch["sampling_per_token_logps"]) * mask, nan=0.0)
    if mode.startswith("sequence"):
        difference = difference.sum(dim=-1, keepdim=True)
    ratio = difference.exp()
    if mode.endswith("truncate"):
        ratio = ratio.clamp(low, high)
    else:
        ratio = ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
    theirs = {**batch, "old_per_token_logps": old, "importance_sampling_ratio": ratio}
    trainer.model.zero_grad()
    its_loss = GRPOTrainer._compute_loss(trainer, trainer.model, theirs)
    its_loss.backward()
    its_gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    torch.testing.assert_close(loss, its_loss.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient, its_gradient, atol=1e-6, rtol=1e-5)
    weights = ratio if mode.startswith("sequence") else ratio[mask.bool()]
    assert logged["sampling/importance_sampling_ratio/mean"] == pytest.approx(weights.mean().item(), rel=1e-5)


def test_with_several_steps_per_batch_the_pass_is_kept(tmp_path, random_model, tokenizer):
    trainer = as_vllm(scripted_trainer(tmp_path, random_model, tokenizer, num_iterations=2))
    assert "old_per_token_logps" in trainer.score()


def test_the_geometric_mask_depends_on_the_mean_and_not_on_the_length():
    log_ratios = torch.tensor(
        [[0.1, 0.1, 0.1, 0.1], [0.1, 0.0, 0.0, 0.0], [0.2, 0.2, 0.0, 0.0], [9.0, -9.0, 0.0, 0.0]]
    )
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]])
    kept = importance_ratio(log_ratios * mask, mask, "geometric_mask", math.exp(-0.15), math.exp(0.15))
    assert kept.flatten().tolist() == [1.0, 1.0, 0.0, 1.0]
    assert importance_ratio(log_ratios * 0, mask * 0, "geometric_mask", 0.9, 1.1).tolist() == [[1.0]] * 4


def test_llds_penalizes_the_decreased_tokens_of_good_actions():
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 0, 1, 1]])
    assert action_numbers(mask)[0].tolist() == [1, 1, 1, 2, 2]
    old = torch.full((2, 5), -0.5)
    new = torch.tensor([[-0.6, -0.5, -9.0, -0.7, -0.1]] * 2, requires_grad=True)
    penalty = llds_penalty(new, old, mask, torch.tensor([0.0, -1.0]))
    assert penalty.item() == pytest.approx(0.1 / 8)  # the second action increased; the second row is a bad one
    penalty.backward()
    assert (new.grad != 0).nonzero().tolist() == [[0, 0]]


def test_llds_is_added_to_the_loss(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(tmp_path, random_model, tokenizer, num_iterations=2, llds_coef=0.5)
    batch = trainer.score()
    batch["old_per_token_logps"] = batch["old_per_token_logps"] + 0.1  # every token decreased by 0.1
    loss, logged = trainer.loss(batch)
    mask = batch["completion_mask"] * batch["tool_mask"]
    good = mask[batch["advantages"] >= 0].sum() / mask.sum()
    assert logged["llds"] == pytest.approx(0.1 * good.item(), rel=1e-4)
    trainer.args.llds_coef = 0.0
    assert loss.item() - trainer.loss(batch)[0].item() == pytest.approx(0.5 * logged["llds"], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"llds_coef": 0.1}, "llds_coef=0.1 has no effect with one optimizer step per batch"),
        ({"llds_coef": -1.0}, "llds_coef=-1.0 must be at least 0"),
        ({"vllm_importance_sampling_mode": "geometric_mask"}, "needs both bounds near 1"),
        ({"vllm_importance_sampling_mode": "geo"}, "unknown vllm_importance_sampling_mode 'geo'"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        SearchGRPOConfig(str(tmp_path), bf16=False, **options)
