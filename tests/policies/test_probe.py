"""Every family is sampled correctly, also past its window, or is refused with the advice to use vLLM."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch

from tests.support.miniatures import miniature
from trl_search.common.errors import UserError
from trl_search.policies import kv_cache, probe
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.types import Sampling

SAMPLED = (
    "qwen2",
    "qwen2_window",
    "qwen3",
    "qwen3_moe",
    "llama",
    "smollm3",
    "mistral",
    "mixtral",
    "starcoder2",
    "phi3",
    "gemma3",
    "gpt2",
    "opt",
)
REFUSED = {
    "gemma2": "softcap",
    "gpt_oss": "s_aux",
    "gpt_neo": "cannot be replaced",
    "bloom": "cannot be replaced",  # ALiBi
    "mpt": "cannot be replaced",
    "mamba": "linear_attention",
    "lfm2": "conv",
}


def open_and_close(policy):
    async def go():
        await policy.open()
        await policy.close()

    asyncio.run(go())


@pytest.mark.parametrize("family", SAMPLED)
def test_samples_past_the_window_are_correct(family, tokenizer):
    model = miniature(family)
    policy = TransformersPolicy(model, tokenizer)
    policy.eos_token_ids = set()
    draw = random.Random(0)
    prompts = [[draw.randrange(300) for _ in range(length)] for length in (3, 40, 20)]

    async def go():
        await policy.open()
        asked = (policy.generate(p, max_tokens=6, sampling=Sampling(seed=i)) for i, p in enumerate(prompts))
        completions = await asyncio.gather(*asked)
        await policy.close()
        return completions

    for prompt, completion in zip(prompts, asyncio.run(go()), strict=True):
        expected = probe.plain_logprobs(model, prompt, completion.ids)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", REFUSED)
def test_an_unsupported_family_is_refused(family, tokenizer):
    with pytest.raises(UserError, match=rf"{REFUSED[family]}.*vLLM"):
        open_and_close(TransformersPolicy(miniature(family), tokenizer))


def test_wrong_log_probs_of_the_engine_are_detected(tokenizer, monkeypatch):
    def blind(module, query, key, value, attention_mask, sliding_window=None, **kwargs):
        return kv_cache.slot_attention(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(kv_cache.AttentionInterface._global_mapping, kv_cache.SLOT_ATTENTION, blind)
    open_and_close(TransformersPolicy(miniature("llama"), tokenizer))
    mistral = miniature("mistral")
    with pytest.raises(
        UserError, match=r"does not compute .* correctly: log-probs of the same 8 tokens differ.*use_vllm"
    ):
        open_and_close(TransformersPolicy(mistral, tokenizer))
    assert mistral.config._attn_implementation != kv_cache.SLOT_ATTENTION


def test_a_model_is_probed_once(tokenizer, monkeypatch):
    counted = []
    plain = probe.plain_logprobs
    monkeypatch.setattr(probe, "plain_logprobs", lambda *args: counted.append(1) or plain(*args))
    model = miniature("llama").train()
    heard = []
    for _ in range(2):
        policy = TransformersPolicy(model, tokenizer)
        policy.on_token = heard.append
        open_and_close(policy)
    assert len(counted) == 4 and model.training and not heard


def test_the_probe_goes_past_a_window_only_where_that_is_cheap():
    window = miniature("mistral", sliding_window=4096, max_position_embeddings=32768)
    assert probe.probe_length(window, torch.device("cuda")) > 4096 > probe.probe_length(window, torch.device("cpu"))
    short = miniature("llama", max_position_embeddings=16)
    assert probe.probe_length(short, torch.device("cpu")) + 9 <= 18
