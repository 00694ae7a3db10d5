"""Batches that close without their slow trajectories: whole groups, importance weights per token, resumed runs."""

from __future__ import annotations

import asyncio
import copy
import json

import pytest
import torch
from pyarrow import parquet
from trl import GRPOTrainer

from tests.support.scripted_trainer import DATA, config, later_is_better, real_trainer, steps
from tests.support.slow_searches import BOOKS, gates_of, library_trainer, recorded, release_after, trained_books
from tests.support.two_ranks import output, start_ranks, wait_for_ranks
from trl_search.common.errors import UserError
from trl_search.config.carry_over import check_carry_over
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.trainer.groups.carry_over import FILE

BATCH = 4


@pytest.fixture
def folder(random_model, tmp_path):
    random_model.save_pretrained(tmp_path / "model")
    return tmp_path


def test_a_slow_group_is_trained_on_in_a_later_batch(folder, tokenizer):
    gates = gates_of([0])
    trainer = library_trainer(
        folder / "run", str(folder / "model"), tokenizer, gates, rewards=later_is_better, max_steps=4
    )
    batches = recorded(trainer)
    release_after(trainer, gates["book 0"], rollouts=2)
    trainer.train()
    assert len(batches) == 4
    asked = [trained_books(batch) for batch, _ in batches]
    assert all(row[0] == row[1] and row[2] == row[3] for row in asked), "groups must be whole and adjacent"
    assert 0 not in asked[0] + asked[1] and any(0 in batch for batch in asked[2:])
    for batch, scored in batches:
        for book, trajectory in zip(trained_books(batch), batch.trajectories, strict=True):
            assert f"author {book}" in trajectory.spoken[-1] and f"book {book}?" in tokenizer.decode(
                trajectory.prompt_ids
            )
        # Rewards 0 1 2 3: each group has one better and one worse trajectory.
        assert scored["advantages"].sign().tolist() == [-1, 1, -1, 1]
    late = next(batch for batch, _ in batches if 0 in trained_books(batch))
    assert set(late.trajectories[trained_books(late).index(0)].versions) in ({-1, 0, 2}, {-1, 0, 3})
    logged = steps(trainer)
    assert logged[0]["carry_over/parked"] == 2 and logged[0]["carry_over/tokens_age_0"] == 1
    assert any(entry["carry_over/batches_waited"] > 0 and entry["carry_over/tokens_age_0"] < 1 for entry in logged)
    assert all(0 < entry["sampling/effective_sample_size"] <= 1 for entry in logged)
    environment = trainer.environment
    assert environment.log == ["open", "close"] and environment.searched.count("book 0") == 2


def test_each_token_is_weighted_by_the_policy_that_sampled_it(folder, tokenizer):
    """Without vLLM: the loss is -Σ advantage × min(p / p_sampling, 2) / tokens, with one optimizer step per batch."""
    trainer = library_trainer(
        folder / "run", str(folder / "model"), tokenizer, {}, rewards=later_is_better, max_completion_length=600
    )
    batch = trainer.score([trainer.train_dataset[number] for number in (0, 0, 1, 1)])
    batch["sampling_per_token_logps"] = batch["sampling_per_token_logps"] - 7.9  # about 0.7 lower than the model's
    loss, logged = trainer.loss(batch)
    mask = batch["completion_mask"] * batch["tool_mask"]
    weights = (trainer.logps.detach() - batch["sampling_per_token_logps"]).exp().clamp(max=2.0)
    expected = -(batch["advantages"][:, None] * weights * mask).sum() / mask.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    used = weights[mask.bool()]
    assert 0 < (used < 2).float().mean() < 1, "some ratios must be clipped and others not"
    size = used.sum() ** 2 / (len(used) * (used**2).sum())
    assert logged["sampling/effective_sample_size"] == pytest.approx(size.item(), rel=1e-4)
    trainer.end_pool()


class Stalling(TransformersPolicy):
    """The engine of the first rollout gives the prompts in `slow` only three tokens; later engines give all."""

    slow: list[list[int]]
    rollouts = 0

    async def open(self):
        await super().open()
        Stalling.rollouts += 1

    def _decode(self, running):
        def stalls(turn):
            return Stalling.rollouts == 1 and len(turn.ids) >= 3 and turn.prompt_ids in self.slow

        super()._decode([slot for slot in running if not stalls(slot.turn)])


def test_a_turn_parked_in_the_middle_has_the_log_probs_of_two_policies(folder, tokenizer, monkeypatch):
    """The log-prob of every sampled token comes from the weights of its version."""
    trainer = real_trainer(
        folder / "run", str(folder / "model"), tokenizer, carry_over=1.5, num_generations=2, max_steps=4,
        shuffle_dataset=False, max_turn_length=24,
    )  # fmt: skip
    protocol = trainer.protocol
    Stalling.slow = [list(protocol.prompt_ids(protocol.messages(DATA[0]["question"])))]
    monkeypatch.setattr("trl_search.trainer.rollouts.TransformersPolicy", Stalling)
    batches, weights = recorded(trainer), {}
    rollout = trainer.carry_over_rollout

    def remembering(batch, sampling):
        weights[trainer.state.global_step] = copy.deepcopy(trainer.model.state_dict())
        rollout(batch, sampling)

    trainer.carry_over_rollout = remembering
    trainer.train()
    trajectories = [trajectory for batch, _ in batches for trajectory in batch.trajectories]
    mixed = 0
    for trajectory in trajectories:
        start = len(trajectory.prompt_ids)
        versions = torch.tensor(trajectory.versions)
        mixed += len(set(trajectory.versions) - {-1}) > 1
        for version in set(trajectory.versions) - {-1}:
            trainer.model.load_state_dict(weights[version])
            with torch.no_grad():
                logits = trainer.model(torch.tensor([[*trajectory.prompt_ids, *trajectory.ids]])).logits[0]
            own = logits[start - 1 : -1].log_softmax(-1).gather(1, torch.tensor(trajectory.ids)[:, None])[:, 0]
            here = versions == version
            torch.testing.assert_close(torch.tensor(trajectory.logprobs)[here], own[here], atol=1e-3, rtol=1e-3)
    assert mixed == 2, "the group that stalled in the first rollout"
    assert any(0 < entry["carry_over/tokens_age_1"] < 1 for entry in steps(trainer))


def test_a_resumed_run_samples_the_unfinished_questions_again(folder, tokenizer):
    def make(gates, **options):
        return library_trainer(
            folder / "run", str(folder / "model"), tokenizer, gates, rewards=later_is_better, save_strategy="steps",
            save_steps=1, **options,
        )  # fmt: skip

    first = make(gates_of([0]), max_steps=1)
    first.train()
    checkpoint = folder / "run" / "checkpoint-1"
    (left,) = parquet.read_table(checkpoint / FILE).to_pylist()
    assert left == first.train_dataset[0]

    resumed = make({}, max_steps=2)
    batches = recorded(resumed)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert len(batches) == 1 and trained_books(batches[0][0])[:2] == [0, 0]
    assert set(batches[0][0].trajectories[0].versions) == {-1, 1}, (
        "sampled again from the start with the current weights"
    )


def test_an_evaluation_between_two_rollouts_does_not_affect_parked_trajectories(folder, tokenizer):
    gates = gates_of([0])
    trainer = library_trainer(
        folder / "run", str(folder / "model"), tokenizer, gates, rewards=later_is_better, max_steps=3,
        eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4,
        trainer_options={"eval_dataset": BOOKS.select([20, 21])},
    )  # fmt: skip
    evaluate = trainer.evaluate

    def evaluating(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        if not gates["book 0"].done():
            gates["book 0"].set_result(None)
        return metrics

    trainer.evaluate = evaluating
    batches = recorded(trainer)
    trainer.train()
    trained = [book for batch, _ in batches if len(batch.rows) == BATCH for book in trained_books(batch)]
    assert trained.count(0) == 2 and trainer.environment.searched.count("book 0") == 2


def test_num_iterations_reuses_a_batch_with_its_old_log_probs(folder, tokenizer):
    trainer = library_trainer(
        folder / "run", str(folder / "model"), tokenizer, {}, rewards=later_is_better, max_steps=4, num_iterations=2
    )
    batches = recorded(trainer)
    trainer.train()
    assert len(batches) == 2 and all("old_per_token_logps" in output for _, output in batches)
    assert {version for batch, _ in batches for t in batch.trajectories for version in t.versions} <= {-1, 0, 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"carry_over": 0.5}, "carry_over=0.5 counts batches"),
        ({"carry_over": 1.2}, "starts only the 2 groups of a batch: set it to 1.5"),
        ({"carry_over": 2, "vllm_importance_sampling_correction": False}, "leaves uncorrected"),
        ({"carry_over": 2, "refill_groups": 1}, "carry_over=2 and refill_groups=1 both choose"),
        ({"max_staleness": -1}, "max_staleness=-1 counts batches"),
        ({"max_staleness": 1}, "vllm_mode: server, or use carry_over"),
        ({"max_staleness": 1, "use_vllm": True, "vllm_mode": "colocate"}, "vllm_mode: server, or use carry_over"),
        (
            {"max_staleness": 1, "use_vllm": True, "vllm_mode": "server", "carry_over": 3.0},
            "set carry_over to at most 2",
        ),
        (
            {"carry_over": 2, "loss_type": "vespo", "vllm_importance_sampling_mode": "sequence_mask"},
            "token_truncate or token_mask",
        ),
    ],
)
def test_incompatible_options_are_refused_by_name(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        config(tmp_path, **{"num_generations": 2, "generation_batch_size": None, **options})


def test_groups_split_over_processes_are_refused(tmp_path):
    args = config(tmp_path, num_generations=2, carry_over=2)
    args.per_device_train_batch_size = 3  # per process, with two processes; TRL alone would accept this
    with pytest.raises(UserError, match="num_generations=2 does not divide the 3 trajectories per process"):
        check_carry_over(args)


def test_a_streamed_dataset_is_refused(folder, tokenizer):
    with pytest.raises(UserError, match="train_dataset is a stream"):
        real_trainer(
            folder / "run", str(folder / "model"), tokenizer, data=DATA.to_iterable_dataset(), carry_over=2,
            num_generations=2,
        )  # fmt: skip


def test_without_carry_over_nothing_changes(folder, tokenizer):
    trainer = real_trainer(folder / "run", str(folder / "model"), tokenizer, max_steps=1)
    trainer.train()
    (entry,) = steps(trainer)
    assert not trainer.carries_over and not any(name.startswith(("carry_over", "sampling")) for name in entry)
    assert not trainer.corrects_sampling


@pytest.mark.slow
def test_two_ranks_close_their_batches_independently(folder, tokenizer):
    tokenizer.save_pretrained(folder / "model")
    ranks = start_ranks("tests.support.carry_over_run", [str(folder)], folder)
    codes = wait_for_ranks(ranks, folder, timeout_s=240)
    assert codes == [0, 0], output(folder)
    one, other = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2))
    for run in ("whole", "resumed"):
        assert one[run]["weights"] == other[run]["weights"]
        assert len(one[run]["books"]) == len(other[run]["books"]) == (3 if run == "whole" else 2)
        for rank in (one, other):
            for books, advantages in zip(rank[run]["books"], rank[run]["advantages"], strict=True):
                assert books[0] == books[1] and books[2] == books[3], "groups must be whole and on one rank"
                assert [advantage > 0 for advantage in advantages] == [False, True, False, True]
    assert 0 not in one["whole"]["books"][0] + one["whole"]["books"][1] and 0 in one["whole"]["books"][2]
    assert one["resumed"]["books"][0][0] == 0 and 0 not in other["resumed"]["books"][0]


def test_a_server_generates_while_the_trainer_computes_and_stops_before_a_sync(folder, tokenizer, monkeypatch):
    """The calls to a server in order; the trainer computes between `open` and `close`."""
    gates = gates_of([0])
    trainer = library_trainer(
        folder / "run", str(folder / "model"), tokenizer, gates, rewards=later_is_better, carry_over=1.0, max_steps=4
    )
    trainer.args.max_staleness = 1  # the configuration refuses it without a server
    log, under_way = [], []
    monkeypatch.setattr(trainer.actor, "open", noting(log, "open"))
    monkeypatch.setattr(trainer.actor, "close", noting(log, "close"))
    enter, compute_loss = trainer.generation_policy, trainer.compute_loss

    def entering(prompts):
        log.append(f"weights {trainer.state.global_step}")
        return enter(prompts)

    def computing(*args, **kwargs):
        log.append("loss")
        if log.count("loss") == 1:
            (group,) = [group for group in trainer.pool.groups if "book 0" in group.row["question"]]
            gates["book 0"].set_result(None)
            trainer.pool._loop.run(asyncio.wait(group.members))  # it generates its answer during this
            under_way.extend(group.trajectories)
        return compute_loss(*args, **kwargs)

    monkeypatch.setattr(trainer, "generation_policy", entering)
    monkeypatch.setattr(trainer, "compute_loss", computing)
    generate = GRPOTrainer._generate

    def generating(self, prompts):
        log.append("sync")  # TRL's first step
        return generate(self, prompts)

    monkeypatch.setattr(GRPOTrainer, "_generate", generating)
    batches = recorded(trainer)
    trainer.train()
    step = [["close", "sync", f"weights {number}", "open", "loss"] for number in range(4)]
    assert log == [*step[0][1:], *step[1], *step[2], *step[3], "close"]
    assert [set(trajectory.versions) for trajectory in under_way] == [{-1, 0}] * 2
    assert 0 in trained_books(batches[1][0]), "due in the second batch"
    ages = [batch.metrics["carry_over/batches_waited"] for batch, _ in batches]
    assert ages[0] == 0 and max(ages) <= 1


def noting(log, event):
    async def note():
        log.append(event)

    return note
