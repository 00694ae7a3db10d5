"""What a run logs: the metrics of every step, the completion tables, and the trackers that get both."""

from __future__ import annotations

import math

import pandas
import pytest

from tests.fakes import FixedRetriever
from tests.scripted_trainer import GOLD, PASSAGES, answer, scripted_trainer, search, steps
from trl_search.types import StopReason

ITEM_9 = {
    "search/searches", "search/turns", "search/malformed_calls", "search/empty_retrievals", "search/failed_rollouts",
    "tokens/model", "tokens/observation", "tokens/nonfinite_logprobs", "time/generation_s", "time/search_s",
    "reflection/ratio", "reflection/phrases_per_1k_tokens", "frac_reward_zero_std", "reward", "entropy",
    "rewards/em/mean", "rewards/reflection/mean", "clip_ratio/region_mean",
    *(f"stop/{reason.value}" for reason in StopReason),
}  # fmt: skip


def test_every_metric_is_there_at_every_step(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(tmp_path, random_model, tokenizer, rewards=["em", "reflection"], max_steps=3)
    trainer.train()
    assert len(steps(trainer)) == 3
    for entry in steps(trainer):
        assert set(entry) >= ITEM_9 and all(math.isfinite(entry[name]) for name in ITEM_9)
        # Four ways: 1 + 2 + 0 + 0 searches, 2 + 3 + 1 + 2 turns, one malformed call.
        assert entry["search/searches"] == 0.75 and entry["search/turns"] == 2
        assert entry["search/malformed_calls"] == 0.25
        assert entry["stop/answer"] == 1 and sum(entry[f"stop/{reason.value}"] for reason in StopReason) == 1


def test_empty_retrievals_are_counted(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(tmp_path, random_model, tokenizer, retriever=FixedRetriever([]))
    trainer.score()
    assert trainer._metrics["train"]["search/empty_retrievals"] == [0.75]


def test_completion_tables_have_our_columns_and_one_row_a_trajectory(tmp_path, random_model, tokenizer):
    def script(number, prompt):
        return [search("poison"), answer(GOLD)] if number == 0 else ["", search("x"), answer(GOLD)][number - 1 :]

    trainer = scripted_trainer(
        tmp_path, random_model, tokenizer, script, retriever=FixedRetriever(PASSAGES, poison="poison"),
        log_completions=True, rewards=["em", "format"],
    )  # fmt: skip
    trainer.train()
    for step in (1, 2):
        table = pandas.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        assert set(table) == {"step", "prompt", "completion", "em", "format", "stop_reason", "searches", "advantage"}
        assert len(table) == 4
        assert list(table["stop_reason"]) == ["retrieval_failed", "end_of_turn", "answer", "answer"]
        assert list(table["searches"]) == [1, 0, 1, 0]
        assert [[message["role"] for message in completion] for completion in table["completion"]] == [
            ["assistant"], [], ["assistant", "tool", "assistant"], ["assistant"],
        ]  # fmt: skip


def test_tensorboard_gets_the_curves(tmp_path, random_model, tokenizer, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    scripted_trainer(tmp_path, random_model, tokenizer, report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    for tag in ("train/search/searches", "train/rewards/em/mean", "train/stop/answer", "train/reflection/ratio"):
        assert [event.step for event in events.Scalars(tag)] == [1, 2]


def test_wandb_gets_the_curves_and_the_tables(tmp_path, random_model, tokenizer, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    scripted_trainer(tmp_path, random_model, tokenizer, report_to="wandb", log_completions=True).train()
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["train/search/searches"] == 0.75 and summary["train/rewards/em/mean"] == 0.5
    assert "completions" in summary
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_trackio_gets_the_curves(tmp_path, random_model, tokenizer, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    storage = trackio.sqlite_storage
    for module in (trackio, trackio.utils, storage):  # TRL has imported it: TRACKIO_DIR is no longer read
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    scripted_trainer(
        tmp_path, random_model, tokenizer, report_to="trackio", project="ours", trackio_static_space_id=False,
        log_completions=True, num_completions_to_print=0,
    ).train()  # fmt: skip
    (run,) = storage.SQLiteStorage.get_runs("ours")
    logged = storage.SQLiteStorage.get_logs("ours", run)
    assert [row["train/search/searches"] for row in logged if "train/search/searches" in row] == [0.75, 0.75]
    assert [row["train/rewards/em/mean"] for row in logged if "train/rewards/em/mean" in row] == [0.5, 0.5]
    assert any("completions" in row for row in logged)
