"""The logs of a run: metrics of every step, completion tables, and the trackers that get both."""

from __future__ import annotations

import math
import time

import pandas
import pytest

from tests.support.fakes import FixedRetriever
from tests.support.scripted_trainer import GOLD, PASSAGES, answer, scripted_trainer, search, steps
from tests.support.servers import Said, serving
from trl_search.retrieval import load_retriever
from trl_search.retrieval.base import merge_metrics
from trl_search.types import StopReason

pytestmark = pytest.mark.slow

ITEM_9 = {
    "search/searches", "search/turns", "search/malformed_calls", "search/empty_retrievals", "search/failed_rollouts",
    "tokens/model", "tokens/observation", "tokens/nonfinite_logprobs", "time/generation_s", "time/search_s",
    "time/weights_s", "time/rollout_s", "time/logprobs_s", "time/rewards_s",
    "rollout/bubble", "reflection/ratio", "reflection/phrases_per_1k_tokens",
    "frac_reward_zero_std", "reward", "entropy",
    "rewards/em/mean", "rewards/reflection/mean", "clip_ratio/region_mean",
    "retrieval/queries", "retrieval/failed_queries", "retrieval/batches", "retrieval/search_s",
    *(f"stop/{reason.value}" for reason in StopReason),
}  # fmt: skip


def test_every_step_logs_every_metric(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(tmp_path, random_model, tokenizer, rewards=["em", "reflection"], max_steps=3)
    trainer.train()
    assert len(steps(trainer)) == 3
    for entry in steps(trainer):
        assert set(entry) >= ITEM_9 and all(math.isfinite(entry[name]) for name in ITEM_9)
        # Four trajectories: 1 + 2 + 0 + 0 searches, 2 + 3 + 1 + 2 turns, one malformed call.
        assert entry["search/searches"] == 0.75 and entry["search/turns"] == 2
        assert entry["search/malformed_calls"] == 0.25
        assert entry["stop/answer"] == 1 and sum(entry[f"stop/{reason.value}"] for reason in StopReason) == 1


def test_the_parts_of_a_step_take_no_longer_than_the_step(tmp_path, random_model, tokenizer):
    def slow_reward(completions, **columns):
        time.sleep(0.2)
        return [0.5] * len(completions)

    trainer = scripted_trainer(tmp_path, random_model, tokenizer, rewards=[slow_reward], max_steps=2)
    trainer.train()
    for entry in steps(trainer):
        parts = [entry[f"time/{part}_s"] for part in ("weights", "rollout", "logprobs", "rewards")]
        assert all(seconds > 0 for seconds in parts) and sum(parts) <= entry["step_time"]
        assert entry["time/rewards_s"] >= 0.2


def test_empty_retrievals_are_counted(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(tmp_path, random_model, tokenizer, retriever=FixedRetriever([]))
    trainer.score()
    assert trainer.logged["search/empty_retrievals"] == 0.75


def test_metrics_of_the_retriever_are_logged_with_failures_per_endpoint(tmp_path, random_model, tokenizer):
    with serving(lambda asked: Said({"error": "no"}, 400)) as server:
        retriever = load_retriever("http", url=server.url)
        trainer = scripted_trainer(tmp_path, random_model, tokenizer, retriever=retriever, max_failed_share=1.0)
        trainer.score()
        retriever.close()
    logged = trainer.logged
    assert logged["retrieval/failed_queries"] >= 1
    assert logged["retrieval/failures"] == logged[f"retrieval/failures/127.0.0.1:{server.port}"] == len(server.asked)
    assert logged["search/failed_rollouts"] > 0


def test_metrics_of_ranks_are_merged_by_their_meaning():
    one = {"retrieval/requests": 2.0, "retrieval/latency_max_s": 0.5, "retrieval/latency_p50_s": 0.1}
    other = {"retrieval/requests": 3.0, "retrieval/latency_max_s": 0.2, "retrieval/latency_p50_s": 0.3, "x/new": 1.0}
    assert merge_metrics([one, other, {}]) == {
        "retrieval/requests": 5.0, "retrieval/latency_max_s": 0.5, "retrieval/latency_p50_s": 0.2, "x/new": 1.0,
    }  # fmt: skip


def test_completion_tables_have_our_columns_and_one_row_per_trajectory(tmp_path, random_model, tokenizer):
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
    wandb.teardown()  # it would reuse the folders of this run
    assert summary["train/search/searches"] == 0.75 and summary["train/rewards/em/mean"] == 0.5
    assert "completions" in summary
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_trackio_gets_the_curves(tmp_path, random_model, tokenizer, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    storage = trackio.sqlite_storage
    for module in (trackio, trackio.utils, storage):  # already imported, so TRACKIO_DIR has no effect
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
