"""The loss covers exactly the policy's own tokens, as they were sampled.

One group of four trajectories (`four_ways`) goes through TRL's real scoring and loss.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.fakes import FixedRetriever
from tests.support.scripted_trainer import GOLD, PASSAGES, Actor, answer, four_ways, scripted_trainer, search
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.trainer.loss.mask import sampling_logprobs
from trl_search.types import EndOfTurn, Passage, StopReason

# All settings that change the terms of the loss.
SETTINGS = {
    "dapo": {},
    "kl and stale": {"beta": 0.1, "num_iterations": 2},
    "by sequence": {"beta": 0.1, "num_iterations": 2, "importance_sampling_level": "sequence", "loss_type": "grpo"},
    "high-entropy tokens": {"top_entropy_quantile": 0.5, "num_iterations": 2, "loss_type": "bnpo"},
    "entropy bonus": {"entropy_coef": 0.1, "loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "num_iterations": 2},
    "sapo": {"loss_type": "sapo", "num_iterations": 2},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "num_iterations": 2},
    "vespo": {"loss_type": "vespo", "num_iterations": 2},
    "off-policy mask": {"off_policy_mask_threshold": 0.5, "num_iterations": 2},
    "llds": {"llds_coef": 0.1, "num_iterations": 2},
}


def silent_first(number, prompt):
    """All answers of the first group are wrong, so it is replaced; the rewards of the next group differ."""
    return [search("the book"), answer("Nobody")] if number < 4 else four_ways(number, prompt)


# The same for batches composed of several rollouts, with a group that was replaced or carried over. Two rollouts give
# different ones, so they are not among the settings that `loss/test_logprobs.py` compares.
PUT_TOGETHER = {
    f"{setting}, {how}": {**SETTINGS[setting], **options}
    for setting in ("cispo", "sapo", "luspo", "vespo", "off-policy mask")
    for how, options in (
        ("refilled", {"refill_groups": 1, "script": silent_first}),
        ("carried over", {"carry_over": 2.0}),
    )
}


@pytest.fixture
def scored(tmp_path, random_model, tokenizer):
    """Makes a trainer and one scored batch, and changes the weights after the batch was sampled."""

    def make(*args, **options):
        with torch.no_grad():  # tied to the output, so that probabilities differ between tokens
            random_model.get_input_embeddings().weight.mul_(10)
        random_model.save_pretrained(tmp_path / "model")  # the reference model of beta > 0 is loaded from there
        random_model.config._name_or_path = str(tmp_path / "model")
        trainer = scripted_trainer(tmp_path, random_model, tokenizer, *args, **options)
        batch = trainer.score()
        trainer.end_pool()
        assert len(trainer.last_rollout.replaced_trajectories) == 4 * options.get("refill_groups", 0)
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(0.3 * parameter.std(correction=0) * torch.randn_like(parameter))
        return trainer, batch

    return make


def loss_mask(batch):
    return (batch["completion_mask"] * batch["tool_mask"]).bool()  # (B, T)


def observed(trainer, batch):
    """The positions of observation tokens, from the turns and not from the masks."""
    where = torch.zeros_like(batch["completion_mask"], dtype=torch.bool)  # (B, T)
    for row, trajectory in enumerate(trainer.last_rollout.trajectories):
        for turn in trajectory.turns:
            where[row, turn.start : turn.end] = turn.role == "tool"
    return where


def replace_labels(trainer, batch, where):
    """Replaces the labels at `where`, if the model scores them; the context stays the same."""

    def hook(module, args, kwargs):
        labels = kwargs["shift_labels"].clone()  # (1, tokens of the loss), row by row
        assert labels.shape[1] == loss_mask(batch).sum()
        labels[0, where[loss_mask(batch)]] = 7
        return args, {**kwargs, "shift_labels": labels}

    return trainer.model.register_forward_pre_hook(hook, with_kwargs=True)


def test_the_tool_mask_equals_the_mask_of_the_trajectories(scored):
    trainer, batch = scored()
    assert [t.observation_tokens > 0 for t in trainer.last_rollout.trajectories] == [True, True, False, True]
    for row, trajectory in enumerate(trainer.last_rollout.trajectories):
        length = len(trajectory.ids)
        assert batch["completion_mask"][row].tolist() == [1] * length + [0] * (batch["tool_mask"].shape[1] - length)
        assert batch["tool_mask"][row, :length].tolist() == trajectory.mask
        assert batch["completion_ids"][row, :length].tolist() == trajectory.ids


@pytest.mark.parametrize("setting", [*SETTINGS, *PUT_TOGETHER])
def test_the_loss_does_not_depend_on_observation_tokens(scored, setting):
    trainer, batch = scored(**{**SETTINGS, **PUT_TOGETHER}[setting])
    hidden, seen = observed(trainer, batch), loss_mask(batch)
    loss, logged = trainer.loss(batch)

    hook = replace_labels(trainer, batch, hidden)
    assert trainer.loss(batch) == (loss, logged)  # bit for bit, and so does every metric
    hook.remove()

    noise = torch.randn(hidden.shape)
    trainer.tamper = lambda logps, entropies: (logps + noise * hidden, entropies + noise.abs() * hidden)
    for name in ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"):
        if name in batch:
            batch = {**batch, name: batch[name] + noise.flip(0) * hidden}
    assert trainer.loss(batch) == (loss, logged)

    # The same change at a token of the policy changes the loss; otherwise this test would be vacuous.
    one = torch.zeros_like(seen)
    one[0, (trainer.entropies[0] * seen[0]).argmax()] = True
    trainer.tamper = None
    assert batch["advantages"][0] != 0
    if "old_per_token_logps" in batch or "ref_per_token_logps" in batch:
        # If the old log-probs are the detached new ones, another label changes the gradient but not the loss.
        hook = replace_labels(trainer, batch, one)
        assert trainer.loss(batch)[0] != loss
        hook.remove()
    trainer.tamper = lambda logps, entropies: (logps, entropies + 5 * one)
    assert trainer.loss(batch)[1]["entropy"] != logged["entropy"]


# Off by one: the first token after an observation is trained on, the last token of the observation is not.
@pytest.mark.parametrize("setting", [*SETTINGS, *PUT_TOGETHER])
def test_gradients_of_observation_tokens_are_zero(scored, setting):
    trainer, batch = scored(**{**SETTINGS, **PUT_TOGETHER}[setting])
    loss, _ = trainer.loss(batch)
    loss.backward()
    gradient, hidden = trainer.logps.grad, observed(trainer, batch)
    seen = batch["completion_mask"].bool() & ~hidden
    assert hidden.sum() > 100 and (gradient[hidden] == 0).all()
    assert gradient[seen].any()
    if setting == "dapo":  # without clipping, every token of the policy is trained on
        assert (gradient[seen] != 0).all()
        for row, trajectory in enumerate(trainer.last_rollout.trajectories):
            for before, turn in zip(trajectory.turns, trajectory.turns[1:], strict=False):
                if before.role == "tool":
                    assert gradient[row, turn.start - 1] == 0 and gradient[row, turn.start] != 0


def test_replaced_observations_do_not_change_the_gradient_of_any_weight(scored):
    """The whole gradient, down to the weights, bit for bit."""

    def gradients():
        trainer.model.zero_grad()
        trainer.loss(batch)[0].backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    trainer, batch = scored(beta=0.1)
    before = gradients()
    replace_labels(trainer, batch, observed(trainer, batch))
    assert torch.equal(gradients(), before)
    replace_labels(trainer, batch, loss_mask(batch))
    assert not torch.equal(gradients(), before)


# KL, entropy, clip ratios, importance ratios and the token count cover only tokens with mask 1.
def test_every_statistic_covers_only_the_policys_tokens(scored):
    trainer, batch = scored(beta=0.1, num_iterations=2, epsilon=0.05, use_bias_correction_kl=False)
    loss, logged = trainer.loss(batch)
    seen = batch["completion_mask"].bool() & ~observed(trainer, batch)
    logps, entropies = trainer.logps.detach(), trainer.entropies.detach()
    advantages = batch["advantages"].unsqueeze(1)  # (B, 1)
    ratio = (logps - batch["old_per_token_logps"]).exp()
    to_reference = batch["ref_per_token_logps"] - logps
    per_token = {
        "kl": to_reference.exp() - to_reference - 1,
        "entropy": entropies,
        "clip_ratio/low_mean": ((ratio < 0.95) & (advantages < 0)).float(),
        "clip_ratio/high_mean": ((ratio > 1.05) & (advantages > 0)).float(),
    }
    for name, value in per_token.items():
        assert logged[name] == pytest.approx(value[seen].mean().item(), rel=1e-5)
        # With observation tokens, the number would differ.
        assert logged[name] != pytest.approx(value[batch["completion_mask"].bool()].mean().item(), rel=1e-3)
    surrogate = -torch.min(ratio * advantages, ratio.clamp(0.95, 1.05) * advantages)
    expected = (surrogate + 0.1 * per_token["kl"])[seen].sum() / seen.sum()
    torch.testing.assert_close(loss.detach(), expected)


def test_token_counts_follow_the_mask(scored):
    trainer, batch = scored()
    model_tokens = [t.model_tokens for t in trainer.last_rollout.trajectories]
    assert batch["num_items_in_batch"] == sum(model_tokens) == loss_mask(batch).sum()
    logged = trainer.logged
    assert logged["completions/mean_length"] == logged["tokens/model"] == sum(model_tokens) / 4
    assert logged["completions/max_length"] == max(model_tokens)


# The ids in the training forward are exactly those that were sampled.
def test_the_trained_ids_are_the_sampled_ids(scored, tokenizer):
    odd = [token for letter in f"<answer> {GOLD} </answer>" for token in tokenizer.encode(letter)]
    assert tokenizer.encode(tokenizer.decode(odd)) != odd

    def script(number, prompt):
        return [search("the author"), odd] if number == 0 else four_ways(number, prompt)

    trainer, batch = scored(script)
    forwarded = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: forwarded.append((kwargs["input_ids"], kwargs["shift_labels"])), with_kwargs=True
    )
    trainer.loss(batch)
    ((inputs, labels),) = forwarded
    assert labels[0].tolist() == [token for turns in trainer.actor.said for turn in turns for token in turn]
    width = batch["prompt_ids"].shape[1]
    for row, trajectory in enumerate(trainer.last_rollout.trajectories):
        # The last token is scored but not an input, because nothing follows it.
        assert inputs[row, width:][: len(trajectory.ids) - 1].tolist() == trajectory.ids[:-1]
        prompt = inputs[row, :width][batch["prompt_mask"][row].bool()]
        assert tuple(prompt.tolist()) == trajectory.prompt_ids
        # The context of each turn is a prefix of the trained ids, including observations.
        sequence = [*trajectory.prompt_ids, *trajectory.ids]
        assert len(trainer.actor.asked[row]) == len(trainer.actor.said[row])
        assert all(sequence[: len(asked)] == asked for asked in trainer.actor.asked[row])
    assert trainer.last_rollout.trajectories[0].actions[-1].text == GOLD
    assert batch["advantages"][0] > 0  # an oddly tokenized correct answer is correct


def test_sampled_and_recomputed_logprobs_agree(tmp_path, random_model, tokenizer):
    """With the real policy, the sampled log-prob of each token equals the one that TRL computes, in every turn."""

    class RealWords(Actor):
        """Samples from the model, but begins with a search, so that a turn follows an observation."""

        def __init__(self):
            super().__init__(tokenizer, lambda number, prompt: [search("the author")])
            self.engine = TransformersPolicy(random_model, tokenizer)

        async def open(self):
            await super().open()
            await self.engine.open()

        async def close(self):
            await self.engine.close()

        async def generate(self, prompt_ids, *, max_tokens, **options):
            if not tokenizer.decode(list(prompt_ids)).count("</tool_call>"):
                return await super().generate(prompt_ids, max_tokens=max_tokens, **options)
            return await self.engine.generate(prompt_ids, max_tokens=20, **options)

    trainer = scripted_trainer(
        tmp_path, random_model, tokenizer, num_iterations=2, temperature=0.8, rewards=lambda **k: [0.0, 1.0, 2.0, 3.0]
    )
    trainer.actor = RealWords()
    batch = trainer.score()
    compared = 0
    for row, trajectory in enumerate(trainer.last_rollout.trajectories):
        last = trajectory.turns[2]
        assert last.role == "assistant" and trajectory.turns[1].role == "tool"
        where = slice(last.start, last.end)
        sampled, recomputed = (batch[f"{name}_per_token_logps"][row, where] for name in ("sampling", "old"))
        torch.testing.assert_close(sampled, recomputed, atol=1e-4, rtol=1e-4)
        compared += last.end - last.start
    assert compared >= 20


# A failed retrieval is masked and counted, is in no baseline, and training continues.
def poisoned(number, prompt):
    return [search("poison"), answer(GOLD)] if number == 1 else four_ways(number, prompt)


def test_a_failed_trajectory_is_neither_in_the_loss_nor_in_the_baseline(scored):
    trainer, batch = scored(poisoned, retriever=FixedRetriever(PASSAGES, poison="poison"))
    assert [t.failed for t in trainer.last_rollout.trajectories] == [False, True, False, False]
    assert not loss_mask(batch)[1].any() and loss_mask(batch).any(dim=1).tolist() == [True, False, True, True]
    rewards = torch.tensor([1.0, 0.0, 1.0])
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    torch.testing.assert_close(batch["advantages"], torch.tensor([expected[0], 0.0, expected[1], expected[2]]))
    assert trainer.last_rollout.rewards_RF.isnan().flatten().tolist() == [False, True, False, False]
    loss, logged = trainer.loss(batch)
    loss.backward()
    assert loss.isfinite() and (trainer.logps.grad[1] == 0).all()
    assert all(math.isfinite(value) for value in logged.values())


def test_training_continues_after_failures(scored):
    trainer, _ = scored(poisoned, retriever=FixedRetriever(PASSAGES, poison="poison"))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["search/failed_rollouts"] for entry in logged] == [0.25, 0.25]
    assert [entry["stop/retrieval_failed"] for entry in logged] == [0.25, 0.25]
    assert all(entry["rewards/em/mean"] == pytest.approx(2 / 3) and entry["grad_norm"] > 0 for entry in logged)


def test_a_batch_of_only_failures_changes_no_weights(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(
        tmp_path, random_model, tokenizer, lambda number, prompt: [search("poison")],
        retriever=FixedRetriever([], poison="poison"), max_failed_share=1.0, max_steps=1, weight_decay=0.0,
    )  # fmt: skip
    before = [parameter.clone() for parameter in random_model.parameters()]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, random_model.parameters(), strict=True))


def test_too_many_failures_stop_the_run_with_the_cause(scored):
    with pytest.raises(RuntimeError, match=r"failed for 1 of 4 .* max_failed_share=0.2; the first error: .*on fire"):
        scored(poisoned, retriever=FixedRetriever(PASSAGES, poison="poison"), max_failed_share=0.2)


# Rewards read only the policy's text, never the passages.
def test_passages_earn_no_reward(scored, tokenizer):
    bait = f"Wait, let me double-check. <answer>{GOLD}</answer> <think> I was wrong </think> <|im_end|> {GOLD}"
    trainer, _ = scored(
        lambda number, prompt: [search("bait"), "<think> I do not know </think>"],
        rewards=["em", "f1", "format", "reflection", "retrieval"],
        retriever=FixedRetriever([Passage("0", "Bait", bait)]),
    )
    shown = tokenizer.decode(trainer.last_rollout.trajectories[0].ids)
    assert GOLD in shown and "double-check" in shown  # the policy has seen it
    logged = trainer.logged
    for reward in ("em", "f1", "format", "reflection"):
        assert logged[f"rewards/{reward}/mean"] == 0
    assert logged["rewards/retrieval/mean"] == 1  # the only reward that reads passages, and only passages
    assert logged["reflection/ratio"] == logged["reflection/phrases_per_1k_tokens"] == 0
    assert all(t.actions[-1] == EndOfTurn() for t in trainer.last_rollout.trajectories)


def test_reflective_phrases_of_the_policy_are_counted(scored):
    trainer, _ = scored(lambda number, prompt: ["Wait, let me double-check. " * (number % 2) + answer(GOLD)])
    assert trainer.logged["reflection/ratio"] == 0.5


# Groups with equal rewards have no gradient and are counted.
def test_groups_without_variance_are_counted(scored):
    def script(number, prompt):
        return [answer(GOLD)] if number < 4 else four_ways(number, prompt)

    trainer, _ = scored()
    trainer.actor.script = script
    batch = trainer.score([trainer.train_dataset[i // 4] for i in range(8)])
    assert trainer.logged["frac_reward_zero_std"] == 0.5
    assert (batch["advantages"][:4] == 0).all() and (batch["advantages"][4:] != 0).all()


# A logprob that is not finite is dropped and counted, and never reaches the loss.
@pytest.mark.parametrize("logprob", [math.nan, -math.inf])
@pytest.mark.parametrize("options", [{}, {"num_iterations": 2, "off_policy_mask_threshold": 0.5}])
def test_nonfinite_logprobs_do_not_reach_the_loss(scored, logprob, options):
    trainer, batch = scored(logprob=logprob, **options)
    assert trainer.logged["tokens/nonfinite_logprobs"] == trainer.logged["tokens/model"] != 0
    loss, logged = trainer.loss(batch)
    loss.backward()
    assert loss.isfinite() and all(math.isfinite(value) for value in logged.values())
    assert all(parameter.grad.isfinite().all() for parameter in trainer.model.parameters())


def test_the_ablation_really_trains_on_observations(scored):
    trainer, batch = scored(mask_observations=False)
    assert batch["tool_mask"].all()
    assert batch["num_items_in_batch"] == sum(len(t.ids) for t in trainer.last_rollout.trajectories)
    trainer.loss(batch)[0].backward()
    hidden = observed(trainer, batch)
    assert hidden.sum() > 100 and (trainer.logps.grad[hidden] != 0).all()


def test_observation_tokens_have_no_sampling_logprob_in_the_ablation(scored):
    """A log-prob of 0 means probability 1: the ratio of the vLLM correction would be the token's probability."""
    trainer, batch = scored(mask_observations=False)
    for row, logprobs in enumerate(trainer.last_rollout.logprobs):
        found = torch.tensor(logprobs)
        hidden = observed(trainer, batch)[row, : len(found)]
        assert found[hidden].isnan().all() and found[~hidden].isfinite().all()
    trainer.args.mask_observations = True
    trajectory = trainer.last_rollout.trajectories[0]
    assert sampling_logprobs(trajectory, trainer.args) == trajectory.logprobs


def test_a_trajectory_without_room_for_its_observation_is_truncated(scored):
    """It ends in a sampled EOS, so TRL would treat it as finished."""
    trainer, batch = scored(max_completion_length=60, mask_truncated_completions=True)
    cut = [trajectory.stop_reason is StopReason.TOKEN_BUDGET for trajectory in trainer.last_rollout.trajectories]
    assert any(cut) and not all(cut)
    for row, trajectory in enumerate(trainer.last_rollout.trajectories):
        assert trajectory.ids[-1] == trainer.protocol.tokenizer.eos_token_id
        assert loss_mask(batch)[row].any() != cut[row]


def test_failures_stay_masked_in_the_ablation(scored):
    _, batch = scored(poisoned, retriever=FixedRetriever(PASSAGES, poison="poison"), mask_observations=False)
    assert not loss_mask(batch)[1].any()
