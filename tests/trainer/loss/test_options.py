"""Options of the estimator: clip-higher, the constant length normaliser, the overlong punishment, the search floor."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.fakes import FixedRetriever
from tests.support.scripted_trainer import GOLD, PASSAGES, answer, scripted_trainer, search
from trl_search.common.errors import UserError
from trl_search.config.grpo import SearchGRPOConfig

MANY_STEPS = {"num_iterations": 2}


def seen(batch):
    return (batch["completion_mask"] * batch["tool_mask"]).bool()  # (B, C)


def gradient_at_ratio(trainer, batch, ratio):
    """The gradient of the log-probs (B, C) if every token is `ratio` times as likely as when it was sampled."""
    trainer.loss(batch)
    trainer.loss({**batch, "old_per_token_logps": trainer.logps.detach() - math.log(ratio)})[0].backward()
    return trainer.logps.grad


def test_clip_higher_raises_only_the_upper_bound_of_rewarded_tokens(tmp_path, random_model, tokenizer):
    """DAPO's epsilon_high (arXiv:2503.14476): only the upper bound changes, and only for positive advantages."""
    for epsilon_high, rises in [(None, False), (0.28, True)]:
        options = {"epsilon": 0.2, "epsilon_high": epsilon_high, **MANY_STEPS}
        trainer = scripted_trainer(tmp_path, random_model, tokenizer, **options)
        batch = trainer.score()
        good = (batch["advantages"] > 0).unsqueeze(1) & seen(batch)
        bad = (batch["advantages"] < 0).unsqueeze(1) & seen(batch)
        assert good.any() and bad.any()
        at_125, at_079, at_13 = (gradient_at_ratio(trainer, batch, ratio) for ratio in (1.25, 0.79, 1.3))
        assert bool((at_125[good] != 0).all()) is rises and bool((at_125[good] == 0).all()) is not rises
        assert (at_13[good] == 0).all() and (at_079[bad] == 0).all()  # outside both bounds; the lower one is the same
        assert (at_079[good] != 0).all() and (at_125[bad] != 0).all() and not at_125[~seen(batch)].any()


def test_the_constant_length_normaliser_weights_all_tokens_equally(tmp_path, random_model, tokenizer):
    """`dr_grpo` (arXiv:2503.20783): the sum over the policy's tokens, over trajectories x max_completion_length."""
    trainer = scripted_trainer(tmp_path, random_model, tokenizer, loss_type="dr_grpo", scale_rewards="none")
    batch = trainer.score()
    mask, advantages = seen(batch), batch["advantages"].unsqueeze(1)
    assert len(set(mask.sum(dim=1).tolist())) > 1 and (mask.sum(dim=1) < batch["completion_mask"].sum(dim=1)).any()
    loss, _ = trainer.loss(batch)
    loss.backward()
    per_token = -advantages / (4 * 600)
    torch.testing.assert_close(loss.detach(), (per_token * mask).sum())
    torch.testing.assert_close(trainer.logps.grad, per_token * mask)

    trainer.loss_type = "grpo"  # here a token of a short trajectory has more weight
    trainer.loss(batch)[0].backward()
    torch.testing.assert_close(trainer.logps.grad, -advantages * mask / (4 * mask.sum(dim=1, keepdim=True)))


def test_overlong_trajectories_are_punished_by_their_whole_length(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(
        tmp_path, random_model, tokenizer, rewards=["em", "soft_overlong_punishment"],
        max_completion_length=200, reward_weights=[1.0, 0.5],
    )  # fmt: skip
    trainer.score()
    assert trainer.reward_func_names == ["em", "soft_overlong_punishment"]
    lengths = torch.tensor([float(len(t.ids)) for t in trainer.last_rollout.trajectories])
    expected = -((lengths - 160) / 40).clamp(0, 1)
    assert (expected < 0).any() and (expected == 0).any(), lengths
    torch.testing.assert_close(trainer.last_rollout.rewards_RF[:, 1], expected)


def guess_or_search(number, prompt):
    return [[answer(GOLD)], [search("the book"), answer(GOLD)], [answer("Nobody")], [search("poison"), answer(GOLD)]][
        number % 4
    ]


def test_the_search_floor_gives_no_reward_without_a_search_in_the_first_steps(tmp_path, random_model, tokenizer):
    retriever = FixedRetriever(PASSAGES, poison="poison")
    trainer = scripted_trainer(
        tmp_path, random_model, tokenizer, guess_or_search, rewards=["em", "soft_overlong_punishment"],
        retriever=retriever, search_floor_steps=2,
    )  # fmt: skip
    trainer.score()
    earned = trainer.last_rollout.rewards_RF[:, 0]
    assert earned.tolist()[:3] == [0.0, 1.0, 0.0] and earned[3].isnan()
    trainer.state.global_step = 2
    trainer.score()
    assert trainer.last_rollout.rewards_RF[:3, 0].tolist() == [1.0, 1.0, 0.0]


def test_the_search_floor_does_not_apply_to_penalties_and_evaluations(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(
        tmp_path, random_model, tokenizer, rewards=lambda completions, **columns: [-1.0, 1.0, -1.0, 1.0],
        search_floor_steps=9,
    )  # fmt: skip
    trainer.score()
    assert [t.searches for t in trainer.last_rollout.trajectories] == [1, 2, 0, 0]
    assert trainer.last_rollout.rewards_RF.flatten().tolist() == [-1.0, 1.0, -1.0, 0.0]
    trainer.model.eval()
    trainer._generate_and_score_completions([dict(trainer.train_dataset[0])] * 4)
    assert trainer.last_rollout.rewards_RF.flatten().tolist() == [-1.0, 1.0, -1.0, 1.0]


def test_a_search_floor_without_a_search_tool_is_refused(tmp_path):
    with pytest.raises(UserError, match="search_floor_steps=5 gives no reward without a search, but max_searches=0"):
        SearchGRPOConfig(str(tmp_path), bf16=False, search_floor_steps=5, max_searches=0)
    with pytest.raises(UserError, match="search_floor_steps=-1 must be at least 0"):
        SearchGRPOConfig(str(tmp_path), bf16=False, search_floor_steps=-1)
