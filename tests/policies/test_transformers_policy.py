"""The transformers policy samples from the model's distribution, whatever requests run at the same time."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest
import torch

from trl_search.common.errors import UserError
from trl_search.policies.token_sampling import sample
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.types import FinishReason, Sampling

GREEDY = Sampling(temperature=0.0)


@pytest.fixture
def probed_model(random_model, tokenizer):
    """A model that the probe has already checked, so its forwards can be counted."""
    generate(TransformersPolicy(random_model, tokenizer), [])
    return random_model


def prompts(count, seed=0, low=3, high=40):
    draw = random.Random(seed)
    return [[draw.randrange(300, 1500) for _ in range(draw.randrange(low, high))] for _ in range(count)]


def generate(policy, requests):
    """Runs `(prompt, options)` requests at once."""

    async def go():
        await policy.open()
        try:
            return await asyncio.gather(*(policy.generate(prompt, **options) for prompt, options in requests))
        finally:
            await policy.close()

    return asyncio.run(go())


def reference_logprobs(model, prompt, ids, temperature=1.0):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()
    return torch.log_softmax(logits / temperature, -1)


def test_greedy_equals_generate(random_model, tokenizer):
    random_model.generation_config.eos_token_id = None
    policy = TransformersPolicy(random_model, tokenizer, max_sequences=8)
    policy.eos_token_ids = set()
    asked = prompts(20)
    completions = generate(policy, [(p, {"max_tokens": 12, "sampling": GREEDY}) for p in asked])
    for prompt, completion in zip(asked, completions, strict=True):
        with torch.no_grad():
            out = random_model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12, do_sample=False
            )
        assert list(completion.ids) == out[0, len(prompt) :].tolist()


def test_logprobs_are_those_of_the_model(random_model, tokenizer):
    policy = TransformersPolicy(random_model, tokenizer, max_sequences=4)
    asked = prompts(9, seed=1)
    how = [Sampling(temperature=0.7, top_p=0.9, top_k=50, seed=i) for i in range(9)]
    completions = generate(policy, [(p, {"max_tokens": 10, "sampling": s}) for p, s in zip(asked, how, strict=True)])
    for prompt, completion in zip(asked, completions, strict=True):
        expected = reference_logprobs(random_model, prompt, completion.ids, 0.7)
        chosen = expected.gather(1, torch.tensor(completion.ids).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(completion.logprobs), chosen, atol=1e-4, rtol=1e-4)


def test_a_request_gives_the_same_tokens_in_any_batch(random_model, tokenizer):
    asked = prompts(12, seed=2)
    options = {"max_tokens": 15, "sampling": Sampling(seed=7)}
    alone = generate(TransformersPolicy(random_model, tokenizer), [(asked[0], options)])[0]
    others = [(p, {"max_tokens": 5 + i, "sampling": Sampling(seed=i)}) for i, p in enumerate(asked[1:])]
    for size in (2, 16):
        together = generate(
            TransformersPolicy(random_model, tokenizer, max_sequences=size), [*others, (asked[0], options)]
        )
        assert together[-1].ids == alone.ids


def test_a_group_shares_its_prompt_and_draws_different_samples(random_model, tokenizer):
    prompt = prompts(1, low=30)[0]
    completions = generate(
        TransformersPolicy(random_model, tokenizer),
        [(prompt, {"max_tokens": 8, "sampling": Sampling(seed=i)}) for i in range(8)],
    )
    assert len({completion.ids for completion in completions}) > 1
    for completion in completions:
        expected = reference_logprobs(random_model, prompt, completion.ids)
        chosen = expected.gather(1, torch.tensor(completion.ids).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(completion.logprobs), chosen, atol=1e-4, rtol=1e-4)


def test_a_later_turn_computes_only_its_new_tokens(probed_model, tokenizer):
    policy = TransformersPolicy(probed_model, tokenizer, max_sequences=4)
    policy.eos_token_ids = set()
    widths = []
    hook = probed_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    prompt = prompts(1, low=39, high=40)[0]

    async def conversation():
        await policy.open()
        first = await policy.generate(prompt, max_tokens=6, sampling=GREEDY)
        again = [*prompt, *first.ids, *range(400, 410)]
        second = await policy.generate(again, max_tokens=6, sampling=GREEDY)
        await policy.close()
        return again, second

    again, second = asyncio.run(conversation())
    hook.remove()
    assert widths[0] == 39 and widths[6] == 11  # the last sampled token and the ten tokens of the observation
    expected = reference_logprobs(probed_model, again, second.ids)
    assert list(second.ids) == expected.argmax(-1).tolist()


def test_a_long_prompt_does_not_pad_short_ones(probed_model, tokenizer):
    """A second turn and new questions wait together while the engine is busy with another request."""
    policy = TransformersPolicy(probed_model, tokenizer, max_sequences=8)
    policy.eos_token_ids = set()
    shapes, all_asked = [], threading.Event()
    policy.on_token = lambda ids: all_asked.wait(60)
    hook = probed_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    asked = [*prompts(1), *prompts(4, seed=1, low=20, high=30), *prompts(2, seed=2, low=300, high=310)]

    async def go():
        await policy.open()
        running = [asyncio.create_task(policy.generate(ids, max_tokens=2, sampling=GREEDY)) for ids in asked[:1]]
        while not shapes:
            await asyncio.sleep(0)
        running += [asyncio.create_task(policy.generate(ids, max_tokens=2, sampling=GREEDY)) for ids in asked[1:]]
        await asyncio.sleep(0)  # now they are in the engine's inbox
        all_asked.set()
        completions = await asyncio.gather(*running)
        await policy.close()
        return completions

    completions = asyncio.run(go())
    hook.remove()
    prefills = [shape for shape in shapes[1:] if shape[1] > 1]
    assert [rows for rows, _ in prefills] == [4, 2] and prefills[0][1] < 30 <= 300 <= prefills[1][1]
    for ids, completion in zip(asked, completions, strict=True):
        assert list(completion.ids) == reference_logprobs(probed_model, ids, completion.ids).argmax(-1).tolist()


def test_more_conversations_than_slots(random_model, tokenizer):
    """Other conversations use the slots between two turns, and nothing of them is left."""
    policy = TransformersPolicy(random_model, tokenizer, max_sequences=3)
    policy.eos_token_ids = set()

    async def conversation(prompt):
        for _ in range(3):
            completion = await policy.generate(prompt, max_tokens=4, sampling=GREEDY)
            expected = reference_logprobs(random_model, prompt, completion.ids).argmax(-1).tolist()
            assert list(completion.ids) == expected
            prompt = [*prompt, *completion.ids, 450, 451]

    async def go():
        await policy.open()
        await asyncio.gather(*(conversation(prompt) for prompt in prompts(10, seed=5)))
        await policy.close()

    asyncio.run(go())


def test_stop_strings_budgets_and_eos(probed_model, tokenizer):
    policy = TransformersPolicy(probed_model, tokenizer)
    script = tokenizer.encode("<search> a </search>\n\n more", add_special_tokens=False)
    says = iter([])

    def fake_forward(new):
        nonlocal says
        logits = torch.full((len(new), len(tokenizer)), -50.0)
        for i, (slot, _) in enumerate(new):
            position = len(slot.turn.ids)
            logits[i, script[position] if position < len(script) else tokenizer.eos_token_id] = 50.0
        return logits

    policy._forward = fake_forward
    stopped, cut, ended = generate(
        policy,
        [
            ([5], {"max_tokens": 50, "sampling": GREEDY, "stop": ("</search>", "</answer>")}),
            ([5], {"max_tokens": 2, "sampling": GREEDY}),
            ([5], {"max_tokens": 50, "sampling": GREEDY}),
        ],
    )
    assert stopped.finish_reason is FinishReason.STOP and tokenizer.decode(stopped.ids) == "<search> a </search>"
    assert cut.finish_reason is FinishReason.LENGTH and list(cut.ids) == script[:2]
    assert ended.finish_reason is FinishReason.EOS and list(ended.ids) == [*script, tokenizer.eos_token_id]


def test_a_conversation_longer_than_the_model_has_positions_is_refused(probed_model, tokenizer):
    """A model with rotary positions would go on, and write nonsense."""
    policy = TransformersPolicy(probed_model, tokenizer)
    room = probed_model.config.max_position_embeddings
    (completion,) = generate(policy, [([7] * (room - 2), {"max_tokens": 2, "sampling": GREEDY})])
    assert completion.ids
    with pytest.raises(UserError, match=rf"need {room + 1} positions, but .* has {room}: lower max_completion_length"):
        generate(policy, [([7] * (room - 2), {"max_tokens": 3, "sampling": GREEDY})])


def test_a_cancelled_request_frees_its_slot(random_model, tokenizer):
    policy = TransformersPolicy(random_model, tokenizer, max_sequences=1)
    policy.eos_token_ids = set()

    async def go():
        await policy.open()
        endless = asyncio.create_task(policy.generate([5, 6], max_tokens=100_000, sampling=GREEDY))
        await asyncio.sleep(0.1)
        endless.cancel()
        completion = await asyncio.wait_for(policy.generate([7], max_tokens=2, sampling=GREEDY), timeout=200)
        await policy.close()
        return completion

    assert len(asyncio.run(go()).ids) == 2


def test_a_broken_engine_fails_every_waiting_coroutine(probed_model, tokenizer):
    policy = TransformersPolicy(probed_model, tokenizer, max_sequences=2)
    calls = []

    def explode(new):
        calls.append(len(new))
        raise RuntimeError("device lost")

    policy._forward = explode

    async def go():
        await policy.open()
        tasks = [asyncio.create_task(policy.generate([i + 5], max_tokens=3, sampling=GREEDY)) for i in range(6)]
        outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), timeout=200)
        late = await asyncio.gather(policy.generate([5], max_tokens=3, sampling=GREEDY), return_exceptions=True)
        await policy.close()
        return [*outcomes, *late]

    assert all("device lost" in str(outcome) for outcome in asyncio.run(go()))


def test_the_model_is_not_changed(random_model, tokenizer):
    random_model.train()
    random_model.set_attn_implementation("eager")
    generate(TransformersPolicy(random_model, tokenizer), [([5], {"max_tokens": 2, "sampling": GREEDY})])
    assert random_model.training and random_model.config._attn_implementation == "eager"


def test_a_turn_ends_at_the_stop_ids_of_the_protocol(random_model, tokenizer):
    """A base model with a chat template: the EOS of its checkpoint differs from the template's end of turn."""
    policy = TransformersPolicy(random_model, tokenizer)
    policy.eos_token_ids = set()
    (prompt,) = prompts(1)
    (endless,) = generate(policy, [(prompt, {"max_tokens": 30, "sampling": Sampling(seed=0)})])
    end = endless.ids[5]
    (ended,) = generate(policy, [(prompt, {"max_tokens": 30, "sampling": Sampling(seed=0), "stop_token_ids": (end,)})])
    assert ended.finish_reason is FinishReason.EOS and ended.ids == endless.ids[: endless.ids.index(end) + 1]


def test_samples_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    uniforms = (torch.arange(20_000) + 0.5) / 20_000
    ids, logprobs = sample(logits.expand(20_000, -1), Sampling(temperature=2.0), uniforms)
    expected = torch.softmax(logits[0] / 2, -1)
    counted = torch.bincount(ids, minlength=4) / 20_000
    torch.testing.assert_close(counted, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[ids])
    kept, _ = sample(logits.expand(20_000, -1), Sampling(top_k=2), uniforms)
    assert set(kept.tolist()) == {1, 2}


@pytest.mark.parametrize("how", [Sampling(), Sampling(top_p=0.5)])
def test_tokens_without_probability_are_never_sampled(how):
    logits = torch.tensor([[9.0, 8.0] + [-200.0] * 998])
    nearly_one = torch.tensor([1 - 2**-26])  # 1 in float32
    ids, _ = sample(logits, how, nearly_one)
    assert ids.tolist() == [0 if how.top_p < 1 else 1]


def test_the_engines_thread_uses_the_gpu_of_the_model(probed_model, tokenizer, monkeypatch):
    """Triton starts kernels on the thread's current device, and a new thread starts on device 0."""
    used = []
    monkeypatch.setattr(
        torch.accelerator, "set_device_index", lambda index: used.append((threading.current_thread().name, index))
    )
    monkeypatch.setattr(type(probed_model), "device", torch.device("cuda", 3))
    generate(TransformersPolicy(probed_model, tokenizer), [])
    assert used == [("TransformersPolicy", 3)]
