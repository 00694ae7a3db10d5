"""What only a CUDA device can show. Run by `make test-gpu`; results are recorded in docs/performance.md."""

from __future__ import annotations

import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_search import SearchGRPOConfig, SearchGRPOTrainer
from trl_search.config.agent import TINY
from trl_search.environment import SearchEnvironment
from trl_search.evaluation.evaluate import answer_questions
from trl_search.evaluation.outcomes import summarize
from trl_search.policies.tiny import tiny_policy_path
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.trainer.pipeline import TaskArguments, load_task
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


@pytest.mark.parametrize("bf16", [False, True])
def test_a_training_step(tiny, tmp_path, bf16):
    model, tokenizer = tiny
    task = load_task(TaskArguments(world_passages=1000), seed=0)
    args = SearchGRPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=16,
        num_generations=8,
        bf16=bf16,
        report_to=[],
        instruction="",
        max_completion_length=512,
        max_observation_length=192,
        logging_steps=1,
    )
    trainer = SearchGRPOTrainer(model, "em", args, task.train, processing_class=tokenizer, retriever=task.retriever)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2 and all(abs(loss) < 10 for loss in losses)
