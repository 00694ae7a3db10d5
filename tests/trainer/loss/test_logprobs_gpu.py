"""Packed log-probs on a CUDA device: every available kernel against TRL's own padded forward."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from tests.support.packed_ddp import a_batch, changed
from tests.support.scripted_trainer import four_ways, later_is_better, scripted_trainer
from trl_search.common.errors import UserError
from trl_search.policies.tiny import tiny_policy_path
from trl_search.trainer.loss.attention import choose_attention
from trl_search.trainer.loss.logprobs import LogProbs, enable_scoring

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

KERNELS = ["varlen", "flash_attention_2", "flex_attention", "sdpa", "padded"]
CONFIG = Qwen2Config(
    vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 2}


def usable(kernel, config, dtype):
    try:
        choose_attention(kernel, Qwen2ForCausalLM(config), device=torch.device("cuda"), dtype=dtype)
    except UserError as error:
        pytest.skip(str(error))


def run(config, dtype, attention, *, autocast=False, checkpointing=False, max_tokens=2000):
    """Log-probs, entropies and the gradient of a weighted sum; if `attention` is None, TRL's padded ones."""
    torch.manual_seed(0)
    # A copy, because the kernel's name is set in the model's configuration.
    model = Qwen2ForCausalLM(copy.deepcopy(config)).cuda().to(torch.float32 if autocast else dtype).train()
    add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", "entropy"))
    ids, mask, loss_mask = (x.cuda() for x in a_batch(rows=12, prompt=60, completion=900))
    wanted = loss_mask * mask[:, 60:]
    if attention is not None:
        enable_scoring(model, attention)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cuda", dtype, enabled=autocast):
        if attention is None:
            labels = ids.masked_fill(mask == 0, -100)
            labels[:, :60] = -100
            out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
            logps, entropies = out.log_probs[:, -900:] * wanted, out.entropy[:, -900:] * wanted
        else:
            logps, entropies = LogProbs(attention, max_tokens)(
                model, ids, mask, 900, loss_mask, gradient_checkpointing=checkpointing
            )
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).cuda()
    (logps * weights).sum().backward()
    return logps.detach(), entropies.detach(), torch.cat([p.grad.flatten().float() for p in model.parameters()])


def noise(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
@pytest.mark.parametrize("attention", KERNELS)
def test_bf16_equals_padded_to_the_noise_floor(attention, autocast, checkpointing):
    """The noise floor is the difference between TRL's own padded forwards in bf16 and in float32."""
    usable(attention, CONFIG, torch.bfloat16)
    exact = run(CONFIG, torch.float32, None)
    padded = run(CONFIG, torch.bfloat16, None, autocast=autocast)
    packed = run(CONFIG, torch.bfloat16, attention, autocast=autocast, checkpointing=checkpointing)
    for mine, theirs, truth in zip(packed, padded, exact, strict=True):
        assert 0 < noise(theirs, truth) < 0.2
        assert noise(mine, truth) < 1.3 * noise(theirs, truth)


@pytest.mark.parametrize("attention", ["varlen", "flex_attention"])
def test_packs_of_a_model_loaded_with_flash_attention(attention):
    usable("flash_attention_2", CONFIG, torch.bfloat16)
    exact, padded = run(CONFIG, torch.float32, None), run(CONFIG, torch.bfloat16, None)
    packed = run(changed(CONFIG, _attn_implementation="flash_attention_2"), torch.bfloat16, attention)
    for mine, theirs, truth in zip(packed, padded, exact, strict=True):
        assert noise(mine, truth) < 1.3 * noise(theirs, truth)


@pytest.mark.parametrize("attention", ["flex_attention", "sdpa", "padded"])
def test_float32_equals_padded(attention):
    usable(attention, CONFIG, torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = False
    exact, packed = run(CONFIG, torch.float32, None), run(CONFIG, torch.float32, attention)
    for mine, truth in zip(packed, exact, strict=True):
        assert noise(mine, truth) < 1e-4


@pytest.mark.parametrize("attention", ["varlen", "flash_attention_2"])
def test_sliding_windows(attention):
    config = changed(CONFIG, **WINDOW)
    usable(attention, config, torch.bfloat16)
    exact, padded = run(config, torch.float32, None), run(config, torch.bfloat16, None)
    packed = run(config, torch.bfloat16, attention)
    assert noise(run(CONFIG, torch.float32, None)[0], exact[0]) > 2 * noise(padded[0], exact[0])  # the window matters
    for mine, theirs, truth in zip(packed, padded, exact, strict=True):
        assert noise(mine, truth) < 1.3 * noise(theirs, truth)


def test_without_checkpointing_the_activations_of_one_pack_are_kept_at_a_time():
    usable("varlen", CONFIG, torch.bfloat16)
    peaks = []
    for max_tokens in (1000, 100_000):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated()  # frees memory of earlier tests
        run(CONFIG, torch.bfloat16, "varlen", max_tokens=max_tokens)
        peaks.append(torch.cuda.max_memory_allocated() - others)
    assert peaks[0] < 0.7 * peaks[1]


def test_training_chooses_varlen_and_runs(tmp_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_path())
    trainer = scripted_trainer(
        tmp_path, model, tokenizer, four_ways, rewards=later_is_better, beta=0.1, num_iterations=2, use_cpu=False,
        bf16=True, gradient_checkpointing=True, max_packed_tokens=800,
    )  # fmt: skip
    assert trainer.logprobs.attention == "varlen"
    trainer.train()
    logged = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert len(logged) == 2 and all(0 < row["grad_norm"] < 1e3 for row in logged)
