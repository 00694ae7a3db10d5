"""The parquet files of trajectories: every token with its loss mask, as `datasets` and pandas read them."""

from __future__ import annotations

import asyncio

import datasets
import pandas
import pytest
import torch
from pyarrow import parquet

from tests.support.fakes import FixedRetriever
from tests.support.scripted_trainer import (
    DATA,
    GOLD,
    PASSAGES,
    Actor,
    answer,
    later_is_better,
    scripted_trainer,
    search,
)
from trl_search.records.folder import TRAJECTORY_SCHEMA, read_run, read_trajectories
from trl_search.types import Completion, FinishReason


def written(folder, **options):
    return read_trajectories(read_run(folder), **options).to_pylist()


def test_a_row_contains_the_whole_trajectory(tmp_path, random_model, tokenizer):
    data = DATA.add_column("id", [f"book-{i}" for i in range(8)]).add_column("data_source", ["world"] * 8)
    trainer = scripted_trainer(
        tmp_path, random_model, tokenizer, rewards=["em", "format"], data=data, reward_weights=[1.0, 0.5],
    )  # fmt: skip
    batch = trainer.score([trainer.train_dataset[3]] * 4)
    table = read_trajectories(read_run(tmp_path))
    assert {field.name: field.type for field in TRAJECTORY_SCHEMA} == {
        field.name: field.type for field in table.schema if not field.name.startswith("rewards/")
    }
    rows = table.to_pylist()
    assert [row["index"] for row in rows] == [0, 1, 2, 3] and {row["group"] for row in rows} == {0}
    for row, trajectory, advantage in zip(
        rows, trainer.last_rollout.trajectories, batch["advantages"].tolist(), strict=True
    ):
        assert row["step"] == 1 and row["id"] == "book-3" and row["data_source"] == "world"
        assert row["question"] == "Who wrote book 3?" and row["golden_answers"] == [GOLD]
        assert row["prompt"] == tokenizer.decode(trajectory.prompt_ids) and "Who wrote book 3?" in row["prompt"]
        assert "".join(row["tokens"]) == tokenizer.decode(trajectory.ids)
        assert row["mask"] == trajectory.mask and sum(row["mask"]) > 0
        assert row["logprobs"] == trajectory.logprobs and len(row["tokens"]) == len(trajectory.ids)
        assert [(turn["role"], turn["start"], turn["end"]) for turn in row["turns"]] == [
            (turn.role, turn.start, turn.end) for turn in trajectory.turns
        ]
        assert row["advantage"] == pytest.approx(advantage)
        assert row["reward"] == pytest.approx(row["rewards/em"] + 0.5 * row["rewards/format"])
        assert row["model_tokens"] == trajectory.model_tokens and row["searches"] == trajectory.searches
        assert row["calls"] == trajectory.calls
        assert row["stop_reason"] == "answer" and row["error"] == "" and row["search_s"] >= 0
    # Four cases: correct after a search, wrong after two, wrong at once, correct after a malformed call.
    assert [row["rewards/em"] for row in rows] == [1, 0, 0, 1]
    assert [row["answer"] for row in rows] == [GOLD, "Nobody", "Nobody", GOLD]
    assert [row["malformed"] for row in rows] == [0, 0, 0, 1] and [row["searches"] for row in rows] == [1, 2, 0, 0]


@pytest.mark.parametrize("mask_observations", [True, False])
def test_the_mask_equals_where_the_loss_has_gradients(tmp_path, random_model, tokenizer, mask_observations):
    trainer = scripted_trainer(
        tmp_path, random_model, tokenizer, rewards=later_is_better, mask_observations=mask_observations
    )
    loss, _ = trainer.loss(trainer.score())
    loss.backward()
    for row, gradient in zip(written(tmp_path), trainer.logps.grad, strict=True):
        assert row["advantage"] != 0
        trained = (gradient != 0).int().tolist()
        assert row["mask"] == trained[: len(row["mask"])] and not any(trained[len(row["mask"]) :])
        assert (sum(row["mask"]) == row["model_tokens"]) == (mask_observations or not row["observation_tokens"])


class CutOff(Actor):
    """Truncates the first trajectory of a rollout at its budget."""

    async def generate(self, prompt_ids, **options):
        said = await super().generate(prompt_ids, **options)
        if self.numbers[asyncio.current_task()] > 0:
            return said
        return Completion(said.ids[:-1], said.logprobs[:-1], FinishReason.LENGTH)


def test_truncated_trajectories_are_masked_if_trl_masks_them(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(tmp_path, random_model, tokenizer, mask_truncated_completions=True)
    trainer.actor = CutOff(tokenizer, lambda number, prompt: ["on and on" if number == 0 else answer(GOLD)])
    trainer.score()
    cut, *others = written(tmp_path)
    assert cut["stop_reason"] == "token_budget" and cut["model_tokens"] > 0 and not any(cut["mask"])
    assert all(sum(row["mask"]) == row["model_tokens"] for row in others)


def test_a_failed_retrieval_has_no_reward_and_no_trained_tokens(tmp_path, random_model, tokenizer):
    def script(number, prompt):
        return [[search("poison"), answer("x")], [answer(GOLD)], [answer("x")], [answer(GOLD)]][number]

    trainer = scripted_trainer(
        tmp_path, random_model, tokenizer, script, retriever=FixedRetriever(PASSAGES, poison="poison"),
        rewards=["em", "format"],
    )  # fmt: skip
    trainer.score()
    failed, *others = written(tmp_path)
    assert failed["stop_reason"] == "retrieval_failed" and failed["error"] and not any(failed["mask"])
    assert failed["reward"] is None and failed["rewards/em"] is None and failed["advantage"] == 0
    assert failed["model_tokens"] > 0 and failed["answer"] is None
    assert [row["rewards/em"] for row in others] == [1, 0, 1]


def test_datasets_and_pandas_open_it(tmp_path, random_model, tokenizer):
    scripted_trainer(tmp_path, random_model, tokenizer).train()
    files = str(tmp_path / "trajectories" / "*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 8 and sorted(set(loaded["step"])) == [1, 2]
    assert loaded[0]["tokens"][:2] == ["<think>", " h"] and loaded[0]["turns"][1]["role"] == "tool"
    frame = pandas.read_parquet(tmp_path / "trajectories")
    assert list(frame["reward"]) == [1, 0, 0, 1] * 2
    file = parquet.ParquetFile(tmp_path / "trajectories" / "step_000001.parquet")
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert not list((tmp_path / "trajectories").glob(".*"))


@pytest.mark.parametrize(("limit", "kept"), [(0, 0), (1, 2), (3, 2), (4, 4), (64, 8)])
def test_whole_groups_are_kept_up_to_the_limit(tmp_path, random_model, tokenizer, limit, kept):
    trainer = scripted_trainer(
        tmp_path, random_model, tokenizer, log_trajectories=limit, per_device_train_batch_size=8, num_generations=2,
    )  # fmt: skip
    trainer.score([trainer.train_dataset[i // 2] for i in range(8)])
    if not kept:
        assert not (tmp_path / "trajectories").exists()
        return
    rows = written(tmp_path)
    assert [row["index"] for row in rows] == list(range(kept))
    assert [row["group"] for row in rows] == [i // 2 for i in range(kept)]
    assert [row["question"] for row in rows] == [f"Who wrote book {i // 2}?" for i in range(kept)]


def test_a_step_with_several_rollouts_records_all_of_them(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(
        tmp_path, random_model, tokenizer, gradient_accumulation_steps=2, steps_per_generation=1, log_trajectories=6,
    )  # fmt: skip
    trainer.train()
    rows = written(tmp_path, steps=[2])
    assert [row["index"] for row in rows] == [0, 1, 2, 3]  # the limit is one group of four, from the first rollout
    trainer.trajectory_log.kept = 8
    trainer.state.global_step = 5
    trainer.score([trainer.train_dataset[1]] * 4)
    trainer.score([trainer.train_dataset[2]] * 4)
    rows = written(tmp_path, steps=[6])
    assert [row["index"] for row in rows] == list(range(8)) and [row["group"] for row in rows] == [0] * 4 + [1] * 4
    assert [row["question"] for row in rows] == ["Who wrote book 1?"] * 4 + ["Who wrote book 2?"] * 4


def test_a_logprob_that_is_not_a_number_is_null(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(tmp_path, random_model, tokenizer, logprob=float("nan"))
    trainer.score()
    row = written(tmp_path)[0]
    assert [value is None for value in row["logprobs"]] == [bool(trained) for trained in row["mask"]]


def test_conversations_and_other_shapes_of_answers(tmp_path, random_model, tokenizer):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "asked"}]
    data = datasets.Dataset.from_list([{"prompt": messages, "golden_answers": GOLD}] * 4)
    trainer = scripted_trainer(tmp_path, random_model, tokenizer, rewards=later_is_better, data=data)
    trainer.score()
    assert [(row["question"], row["golden_answers"]) for row in written(tmp_path)] == [("asked", [GOLD])] * 4


def test_rewards_that_return_none_are_null(tmp_path, random_model, tokenizer):
    def sometimes(completions, **kwargs):
        return [None, 1.0, None, 3.0]

    trainer = scripted_trainer(tmp_path, random_model, tokenizer, rewards=[sometimes, "em"])
    trainer.score()
    rows = written(tmp_path)
    assert [row["rewards/sometimes"] for row in rows] == [None, 1, None, 3]
    assert [row["reward"] for row in rows] == [1, 1, 0, 4]
    assert torch.isfinite(torch.tensor([row["advantage"] for row in rows])).all()


@pytest.mark.parametrize(
    ("golden", "expected"),
    [
        (1998, ["1998"]),
        ("Lyon", ["Lyon"]),
        ({"value": "Lyon", "aliases": ["Lugdunum"]}, ["Lyon", "Lugdunum"]),
        ([["Lyon"], ["Paris"]], ["[['Lyon'], ['Paris']]"]),
    ],
    ids=str,
)
def test_golden_answers_are_written_as_the_rewards_read_them(tmp_path, random_model, tokenizer, golden, expected):
    """A format that only the user's own rewards read is written as it is."""
    data = datasets.Dataset.from_list([{"question": "Who?", "golden_answers": golden}] * 4)
    scripted_trainer(tmp_path, random_model, tokenizer, rewards=later_is_better, data=data).score()
    assert {tuple(row["golden_answers"]) for row in written(tmp_path)} == {tuple(expected)}
