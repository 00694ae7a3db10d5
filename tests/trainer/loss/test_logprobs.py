"""Packed and padded log-probs equal TRL's own in values, loss, metrics and gradients, and skip unneeded tokens."""

from __future__ import annotations

import contextlib
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import Qwen2ForCausalLM

from tests.conftest import make_random_model
from tests.support.packed_ddp import TEMPERATURE, TOKENIZER, a_batch, changed, gradient, ids_for, make_model
from tests.support.scripted_trainer import real_trainer, scripted_trainer
from tests.support.two_ranks import run_ranks
from tests.trainer.loss.test_packing import ragged_batches
from tests.trainer.test_mask import SETTINGS, loss_mask
from trl_search import SearchGRPOConfig
from trl_search.common.errors import UserError
from trl_search.trainer.loss.attention import choose_attention, set_attention
from trl_search.trainer.loss.logprobs import MAX_CHUNKS, LogProbs

WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}  # the second layer's


def in_full(model, ids, attention_mask, columns):
    """Log-probs and entropies of all completion tokens, from the logits of the padded batch."""
    logits = model(input_ids=ids, attention_mask=attention_mask).logits[:, :-1].float() / TEMPERATURE
    log_p = logits.log_softmax(-1)
    logps = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return logps[:, -columns:], -(log_p.exp() * log_p).sum(-1)[:, -columns:]


MODELS = {attention: make_model(attention) for attention in ("sdpa", "padded")}


@pytest.mark.parametrize("attention", MODELS)
@settings(max_examples=25)
@given(
    ragged_batches(max_rows=13), st.integers(1, 120), st.sampled_from([None, 2, 5]), st.booleans(), st.integers(0, 9)
)
def test_values_and_gradients_equal_those_of_the_full_forward(
    attention, batch, max_tokens, batch_size, checkpointing, seed
):
    mask, loss_mask_BC = batch
    ids, columns = ids_for(mask, seed), loss_mask_BC.shape[1]
    model = MODELS[attention].train()
    (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
    logps, entropies = LogProbs(attention, max_tokens)(
        model, ids, mask, columns, loss_mask_BC, batch_size=batch_size, gradient_checkpointing=checkpointing
    )
    wanted = loss_mask_BC * mask[:, -columns:]
    expected = in_full(model, ids, mask, columns)
    assert logps.shape == entropies.shape == wanted.shape
    torch.testing.assert_close(logps, expected[0] * wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, expected[1] * wanted, atol=1e-5, rtol=1e-5)
    weights = torch.randn(2, *wanted.shape)
    mine = gradient(model, (logps * weights[0] + entropies * weights[1]).sum())
    theirs = gradient(model, ((expected[0] * weights[0] + expected[1] * weights[1]) * wanted).sum())
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_without_a_mask_all_completion_tokens_are_scored():
    ids, mask, _ = a_batch()
    logps, _ = LogProbs("sdpa", 100)(MODELS["sdpa"], ids, mask, 40, None)
    torch.testing.assert_close(logps, in_full(MODELS["sdpa"], ids, mask, 40)[0] * mask[:, -40:], atol=1e-5, rtol=1e-5)


@contextlib.contextmanager
def calls(module):
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    yield seen
    handle.remove()


@pytest.mark.parametrize("attention", MODELS)
def test_the_lm_head_sees_tokens_of_the_loss_only(attention):
    ids, mask, loss_mask_BC = a_batch()
    with calls(MODELS[attention]) as seen:
        LogProbs(attention, 100)(MODELS[attention], ids, mask, 40, loss_mask_BC)
    assert sum(kwargs["shift_labels"].numel() for _, kwargs in seen) == (loss_mask_BC * mask[:, 10:]).sum()


def test_packs_run_no_padding():
    ids, mask, loss_mask_BC = a_batch()
    with calls(MODELS["sdpa"]) as seen:
        LogProbs("sdpa", 100)(MODELS["sdpa"], ids, mask, 40, loss_mask_BC)
    widths = [kwargs["input_ids"].shape[1] for _, kwargs in seen]
    assert max(widths) <= 100 and sum(widths) <= mask.sum() - 8  # the last token of each is not an input


def test_short_rows_are_not_padded_to_long_ones():
    mask = torch.zeros(8, 200, dtype=torch.long)
    mask[:, 90:110] = 1
    mask[0, 90:] = 1
    with calls(MODELS["padded"]) as seen:
        LogProbs("padded", 1)(MODELS["padded"], ids_for(mask), mask, 100, None)
    assert [kwargs["input_ids"].shape for _, kwargs in seen] == [(4, 19), (4, 109)] and len(seen) <= MAX_CHUNKS


@pytest.mark.parametrize(("max_tokens", "packs"), [(1000, 1), (100, 3)])
def test_what_is_recomputed_in_the_backward(max_tokens, packs):
    """With gradient checkpointing every layer, as in TRL; without it, every pack except the last, which is kept."""
    ids, mask, loss_mask_BC = a_batch()
    model = MODELS["sdpa"].train()
    for checkpointing, again in ((False, packs - 1), (True, packs)):
        (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
        # Inside the layer, because `GradientCheckpointingLayer` calls the layer's own hooks within its checkpoint.
        with calls(model.model.layers[0].mlp) as seen:
            logps, _ = LogProbs("sdpa", max_tokens)(
                model, ids, mask, 40, loss_mask_BC, gradient_checkpointing=checkpointing
            )
            assert len(seen) == packs
            logps.sum().backward()
            assert len(seen) == packs + again
    model.gradient_checkpointing_disable()


def test_a_rank_with_fewer_packs_runs_idle_packs():
    ids, mask, loss_mask_BC = a_batch()
    model, alone = MODELS["sdpa"].train(), LogProbs("sdpa", 1000)
    asked = []
    together = LogProbs("sdpa", 1000, agree=lambda packs: asked.append(packs) or 4)
    results = [logprobs(model, ids, mask, 40, loss_mask_BC)[0] for logprobs in (alone, together)]
    assert asked == [1] and torch.equal(results[0], results[1])
    gradients = [gradient(model, logps.sum()) for logps in results]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_nothing_to_score_gives_zeros_and_zero_gradients():
    ids, mask, loss_mask_BC = a_batch()
    for attention, model in MODELS.items():
        logps, entropies = LogProbs(attention, 100)(model.train(), ids, mask, 40, torch.zeros_like(loss_mask_BC))
        assert not logps.any() and not entropies.any()
        assert not gradient(model, logps.sum()).any()


# In the trainer: loss, metrics and gradients equal those with TRL's own log-probs.


@pytest.mark.parametrize("attention", MODELS)
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("setting", [*SETTINGS, "accumulation"])
def test_the_loss_equals_the_parents(tmp_path, random_model, tokenizer, setting, lora, attention):
    with torch.no_grad():  # tied to the output, so that probabilities differ between tokens
        random_model.get_input_embeddings().weight.mul_(10)
    random_model.save_pretrained(tmp_path / "model")  # the reference model of beta > 0 is loaded from there
    random_model.config._name_or_path = str(tmp_path / "model")
    options = SETTINGS.get(setting, {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "beta": 0.1})
    arguments = {**options, "temperature": 0.8, "packed_attention": attention, "max_packed_tokens": 900}
    extra = {"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)} if lora else {}
    trainer = scripted_trainer(tmp_path, random_model, tokenizer, trainer=extra, **arguments)
    ours = trainer.logprobs
    assert ours.attention == attention
    results = []
    for logprobs in (ours, None):
        trainer.logprobs = logprobs
        batch = trainer.score()
        batch["advantages"] = torch.tensor([1.0, -0.5, 0.7, -1.2])
        torch.manual_seed(5)
        state = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        with torch.no_grad():  # changes the weights after the batch was sampled
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter))
        loss, logged = trainer.loss(batch)
        trainer.model.zero_grad()
        loss.backward()
        grads = [p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad]
        results.append((batch, loss.detach(), logged, torch.cat(grads)))
        trainer.model.load_state_dict(state, strict=False)
    (batch, loss, logged, grad), (expected, its_loss, its_logged, its_grad) = results
    assert grad.any()
    torch.testing.assert_close(loss, its_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad, its_grad, atol=1e-5, rtol=1e-4)
    assert logged == pytest.approx(its_logged, abs=1e-5, rel=1e-4, nan_ok=True)
    where = loss_mask(batch)
    for name in {"old_per_token_logps", "ref_per_token_logps"} & set(expected):
        torch.testing.assert_close(batch[name], expected[name] * where, atol=1e-5, rtol=1e-5)
        assert batch[name][where].any() and expected[name][~where].any()


def test_each_rollout_is_scored_with_its_own_mask(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(tmp_path, random_model, tokenizer, num_iterations=2)
    first = trainer.score()
    trainer.loss({name: value[:1] if value.dim() else value for name, value in first.items()})
    again = trainer.score()
    where = loss_mask(again)
    assert again["old_per_token_logps"][where].all() and not again["old_per_token_logps"][~where].any()
    trainer.actor.script = None  # a failed rollout leaves nothing behind
    with pytest.raises(TypeError):
        trainer.score()
    assert trainer.last_rollout.trajectories == trainer.last_rollout.loss_masks == []


def test_training_with_packs_equals_padded_training(tmp_path, random_model, tokenizer):
    """The whole loop, with gradient checkpointing, gives the same weights as padded forwards."""
    weights = {}
    for attention in MODELS:
        model = Qwen2ForCausalLM(random_model.config)
        model.load_state_dict(random_model.state_dict())
        trainer = real_trainer(
            tmp_path, model, tokenizer, packed_attention=attention, max_packed_tokens=300,
            per_device_train_batch_size=8, gradient_checkpointing=attention == "sdpa", learning_rate=1e-4,
        )  # fmt: skip
        trainer.train()
        weights[attention] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    torch.testing.assert_close(weights["sdpa"], weights["padded"], atol=1e-6, rtol=1e-4)
    assert (weights["sdpa"] - torch.cat([p.flatten() for p in random_model.parameters()])).abs().max() > 1e-5


# Kernels: which one is chosen, and its inputs.


def test_on_a_cpu_nothing_is_packed_by_default_and_the_log_says_why(tmp_path, random_model, tokenizer, caplog):
    with caplog.at_level("INFO", logger="trl_search.trainer.loss.logprobs"):
        trainer = real_trainer(tmp_path, random_model, tokenizer)
    assert trainer.logprobs.attention == "padded"
    assert "padded attention (no varlen: it needs CUDA, but the model is on cpu; no flash_attention_2" in caplog.text
    with pytest.raises(UserError, match="packed_attention='varlen' does not work here: it needs CUDA"):
        real_trainer(tmp_path, random_model, tokenizer, packed_attention="varlen")
    with pytest.raises(ValueError, match="unknown packed_attention 'fast'"):
        SearchGRPOConfig(str(tmp_path), packed_attention="fast", use_cpu=True, bf16=False)


def test_on_cuda_varlen_is_preferred_and_models_that_cannot_pack_are_padded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    plain = make_random_model(TOKENIZER)

    def chosen(model, dtype=bf16):
        return choose_attention("auto", model, device=cuda, dtype=dtype)[0]

    assert chosen(plain) == "varlen"
    assert chosen(plain, torch.float32) == "flex_attention"
    odd_heads = Qwen2ForCausalLM(changed(plain.config, hidden_size=48))  # head dimension 12
    assert chosen(odd_heads) == "flex_attention"
    sliding = Qwen2ForCausalLM(changed(plain.config, **WINDOW))
    assert chosen(sliding) == "varlen" and chosen(sliding, torch.float32) == "padded"
    plain.config.layer_types = ["full_attention", "linear_attention"]
    name, why = choose_attention("auto", plain, device=cuda, dtype=bf16)
    assert name == "padded" and "linear_attention would mix the trajectories" in why
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    assert chosen(make_random_model(TOKENIZER)) == "flex_attention"


@pytest.mark.parametrize("own", ["eager", "flash_attention_2", "flash_attention_3", "sdpa"])
def test_a_kernel_for_packs_works_with_any_attention_the_model_was_loaded_with(own):
    """transformers looks for a flash attention package if the name contains "flash"."""
    model = make_random_model(TOKENIZER)
    model.config._attn_implementation = own
    set_attention(model, "varlen")
    assert model.config._attn_implementation == "trl_search_varlen_or_sdpa"


@pytest.mark.parametrize(("own", "kernel"), [("eager", "padded"), ("sdpa", "flex_attention")])
def test_soft_capping_is_kept_in_calls_without_packs(own, kernel):
    model = make_random_model(TOKENIZER)
    model.config.attn_logit_softcapping = 50.0
    model.config._attn_implementation = own
    assert choose_attention("auto", model, device=torch.device("cuda"), dtype=torch.float32)[0] == kernel


def varlen_by_hand(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """The documented behaviour of `varlen_attn`, one trajectory at a time; its kernel exists only on CUDA."""
    ends = cu_q.tolist()
    assert torch.equal(cu_q, cu_k) and cu_q.dtype == torch.int32 and ends[-1] == len(query) == len(key)
    assert max_q == max_k == max(end - start for start, end in itertools.pairwise(ends))
    assert enable_gqa == (query.shape[1] != key.shape[1]) and window_size[1] == 0
    outputs = []
    for start, end in itertools.pairwise(ends):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        age = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (age >= 0) & (age <= window_size[0] if window_size[0] >= 0 else True)
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        outputs.append(attended.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sliding", [False, True])
def test_varlen_attention_gets_the_right_inputs(monkeypatch, sliding, checkpointing):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_hand)
    model = make_model("varlen", **(WINDOW if sliding else {})).train()
    assert sliding == ("sliding_attention" in model.config.layer_types)
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids, mask, loss_mask_BC = a_batch()
    logps, _ = LogProbs("varlen", 100)(model, ids, mask, 40, loss_mask_BC, gradient_checkpointing=checkpointing)
    wanted = loss_mask_BC * mask[:, 10:]
    expected, _ = in_full(model, ids, mask, 40)  # a padded call of the same model does not use varlen
    torch.testing.assert_close(logps, expected * wanted, atol=1e-5, rtol=1e-5)
    weights = torch.randn(wanted.shape)
    mine = gradient(model, (logps * weights).sum())
    torch.testing.assert_close(mine, gradient(model, (expected * weights * wanted).sum()), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_ddp_ranks_with_different_numbers_of_packs(tmp_path):
    """Two gloo processes, rank 1 with one pack, rank 0 with several: no hang, and the gradient is the mean."""
    run_ranks("tests.support.packed_ddp", [str(tmp_path)], tmp_path)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert seen[0]["packs"] != seen[1]["packs"] and seen[0]["forwards"] == seen[1]["forwards"]
    for rank in seen:
        assert rank["difference"] < 1e-6 < rank["norm"]
