"""The size of packs: the formula checked by hand, and the free memory that it uses. The GPU test measures it."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from tests.support.packed_ddp import a_batch, make_model
from trl_search.trainer.loss.logprobs import LogProbs, enable_scoring
from trl_search.trainer.loss.memory import (
    FALLBACK,
    MOST,
    RoomForPacks,
    bytes_to_come,
    numbers_per_token,
    tokens_that_fit,
)
from trl_search.trainer.loss.packing import needed_tokens, scored_tokens

QWEN_3B = Qwen2Config(
    hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2
)


def test_a_token_of_a_3b_model():
    # 12 x 2048 for the norms, 2 x (2048 + 256) for attention, 4 x 11008 for the MLP: 146 kB per layer in bf16
    assert numbers_per_token(QWEN_3B) == 24_576 + 4_608 + 44_032
    assert tokens_that_fit(38.4e9, QWEN_3B, 2, None) == 7_284


def test_checkpointed_layers_keep_the_inputs_of_the_whole_micro_batch():
    inputs = 100_000 * 36 * 2048 * 2
    one_layer_twice = 2 * 2 * numbers_per_token(QWEN_3B)
    assert tokens_that_fit(inputs + 5_000 * one_layer_twice, QWEN_3B, 2, 100_000) == 5_000
    assert tokens_that_fit(inputs / 2, QWEN_3B, 2, 100_000) == 1  # one trajectory per pack, even if it may not fit
    assert tokens_that_fit(1e15, QWEN_3B, 2, None) == MOST


def test_experts_and_missing_fields():
    config = Qwen2Config(hidden_size=64, intermediate_size=100, num_attention_heads=4, num_key_value_heads=2)
    config.num_experts_per_tok, config.moe_intermediate_size = 8, 50
    assert numbers_per_token(config) == 12 * 64 + 2 * 64 + 2 * 32 + 4 * 400


def test_memory_for_gradients_and_optimizer_states_is_reserved():
    layer = torch.nn.Linear(10, 10, bias=False)
    assert bytes_to_come(layer) == 3 * 400
    layer.weight.grad = torch.zeros(10, 10)
    assert bytes_to_come(layer) == 2 * 400
    layer.requires_grad_(False)
    assert bytes_to_come(layer) == 0


class Room(RoomForPacks):
    """Room for 100 tokens; records its arguments."""

    def __init__(self):
        self.asked = []

    def __call__(self, micro_batch_tokens, *, checkpointing):
        self.asked.append((micro_batch_tokens, checkpointing))
        return 100


def test_packs_are_as_large_as_memory_allows():
    ids, mask, loss_mask = a_batch(rows=6)
    model, room = make_model("sdpa"), Room()
    forwards = []
    model.register_forward_pre_hook(lambda *args: forwards.append(1))
    logps, _ = LogProbs("sdpa", room)(model, ids, mask, loss_mask.shape[1], loss_mask, gradient_checkpointing=True)
    packs = len(forwards)
    assert packs > 1 and room.asked == [(int(needed_tokens(mask, scored_tokens(mask, loss_mask)).sum()), True)]
    expected, _ = LogProbs("sdpa", 100)(model, ids, mask, loss_mask.shape[1], loss_mask)
    assert len(forwards) == 2 * packs and torch.equal(logps, expected)


def test_on_a_cpu_packs_have_a_fixed_size():
    model = make_model("sdpa")
    assert RoomForPacks(model, model.config, 4)(1_000, checkpointing=False) == FALLBACK


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_of_a_pack_matches_the_estimate(checkpointing):
    config = Qwen2Config(
        vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=4,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).cuda().bfloat16().train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    enable_scoring(model, "varlen")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rows, length = 16, 1024
    ids = torch.randint(0, 4096, (rows, length), device="cuda")
    mask = torch.ones_like(ids)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logps, _ = LogProbs("varlen", rows * length)(
        model, ids, mask, length // 2, mask[:, length // 2 :], gradient_checkpointing=checkpointing
    )
    logps.sum().backward()
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    taken = torch.cuda.max_memory_allocated() - before - gradients
    per_token = 2 * numbers_per_token(config) * (2 if checkpointing else 12)
    estimated = rows * length * (per_token + (12 * 1024 * 2 if checkpointing else 0))
    assert 0.5 * estimated < taken < 1.25 * estimated  # USABLE leaves room for the difference
