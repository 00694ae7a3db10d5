"""Tests that need a CUDA device. `make test-gpu` runs them; docs/performance.md has the results."""

from __future__ import annotations

import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_search import SearchGRPOConfig, SearchGRPOTrainer
from trl_search.config.agent import TINY
from trl_search.config.task import TaskArguments, load_task
from trl_search.environment import SearchEnvironment
from trl_search.evaluation.evaluate import answer_questions
from trl_search.evaluation.outcomes import summarize
from trl_search.policies.tiny import tiny_policy_path
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.trainer.sft import SearchSFTConfig, sft_rows, train
from trl_search.types import Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def tiny():
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    return AutoModelForCausalLM.from_pretrained(tiny_policy_path()).cuda(), tokenizer


def test_greedy_equals_generate(tiny):
    model, tokenizer = tiny
    prompts = [
        tokenizer.encode(text)
        for text in ("Who wrote Quiet Raven?", "In which year was the mayor of Port Oskel born?")
    ]

    async def go():
        policy = TransformersPolicy(model, tokenizer)
        await policy.open()
        try:
            asked = (policy.generate(p, max_tokens=24, sampling=Sampling(temperature=0.0)) for p in prompts)
            return await asyncio.gather(*asked)
        finally:
            await policy.close()

    for prompt, completion in zip(prompts, asyncio.run(go()), strict=True):
        ids = torch.tensor([prompt], device="cuda")
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert list(completion.ids) == out[0, len(prompt) :].tolist()


def test_the_tiny_policy_searches(tiny, world, retriever):
    model, tokenizer = tiny
    result = summarize(
        "search",
        answer_questions(
            "search",
            [question.row() for question in world.questions("test", limit=100)],
            policy=TransformersPolicy(model, tokenizer),
            tokenizer=tokenizer,
            environment=SearchEnvironment(retriever),
            agent=TINY,
        ),
    )
    assert result.em > 0.9


def make_trainer(tiny, folder, reward, **options):
    model, tokenizer = tiny
    task = load_task(TaskArguments(world_passages=1000), seed=0)
    args = SearchGRPOConfig(
        output_dir=str(folder),
        num_generations=8,
        report_to=[],
        instruction="",
        max_completion_length=512,
        max_observation_length=192,
        **options,
    )
    return SearchGRPOTrainer(model, reward, args, task.train, processing_class=tokenizer, retriever=task.retriever)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_training_step(tiny, tmp_path, bf16):
    trainer = make_trainer(
        tiny, tmp_path, "em", max_steps=2, per_device_train_batch_size=16, bf16=bf16, logging_steps=1
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2 and all(abs(loss) < 10 for loss in losses)


@pytest.fixture
def cudnn():
    """Allows cuDNN's attention, as PyTorch does by default."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(False)


def operators(work):
    """The names of the PyTorch operators that run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("packed_attention", ["padded", "sdpa"])
def test_grpo_does_not_use_cudnn_attention(cudnn, tiny, tmp_path, packed_attention):
    """Its backward gives NaN gradients for some padded batches (docs/troubleshooting.md); neither model uses it."""
    options = {"max_steps": 1, "per_device_train_batch_size": 8, "bf16": True, "beta": 0.1}
    trainer = make_trainer(tiny, tmp_path, "f1", packed_attention=packed_attention, **options)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    ran = operators(trainer.train)
    assert any("scaled_dot_product" in name for name in ran)
    assert not [name for name in ran if "cudnn_attention" in name]


@pytest.mark.parametrize("padding_free", [False, True])
def test_sft_does_not_use_cudnn_attention(cudnn, tiny, tmp_path, padding_free):
    model, tokenizer = tiny
    rows = sft_rows([((1, 2), tuple(range(3, 3 + length)), (1,) * length) for length in (5, 60, 100, 17)])
    config = SearchSFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, bf16=True, padding_free=padding_free,
        report_to="none", save_strategy="no",
    )  # fmt: skip
    ran = operators(lambda: train(model, tokenizer, rows, config))
    assert any("scaled_dot_product" in name for name in ran)
    assert not [name for name in ran if "cudnn_attention" in name]


def test_the_operator_of_cudnn_attention_has_the_expected_name(cudnn):
    def attend():
        heads = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)

    assert [name for name in operators(attend) if "cudnn_attention" in name]
