"""run.json and metrics.jsonl of real trainings: their content, what a resume does, and what they never contain."""

from __future__ import annotations

import json
import logging
import subprocess

import numpy
import torch
from trl import GRPOConfig, GRPOTrainer

from tests.conftest import make_random_model
from tests.support.scripted_trainer import DATA, later_is_better, scripted_trainer
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.records.folder import read_run, read_trajectories
from trl_search.records.run_log import RunLog, cut_back

SAVING = {"save_strategy": "steps", "save_steps": 1, "save_only_model": False}


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_recorded_by_default(tmp_path, random_model, tokenizer, monkeypatch):
    secret = "hf_abcdefghijklmnopqrstuvwxyz"
    monkeypatch.setattr("sys.argv", ["/bin/trl-search", "train", "r.yaml", "--hub_token", secret])
    monkeypatch.setenv("HF_TOKEN", secret)
    trainer = scripted_trainer(tmp_path, random_model, tokenizer, rewards=["em", "format"], hub_token=secret)
    trainer.run_log.task = {"questions": "world", "retriever_options": json.dumps({"api_key": secret, "k1": 0.9})}
    trainer.train()
    run = read_run(tmp_path)
    assert run.problems == []
    info = run.info
    assert list(info) == [
        "format", "started_at", "command", "versions", "git", "hardware", "method", "config", "task",
        "environment", "model", "protocol", "prompt", "resumed_from_step",
    ]  # fmt: skip
    assert info["command"] == "/bin/trl-search train r.yaml --hub_token '<redacted>'"
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert info["git"]["commit"] == head if head else info["git"] is None
    assert info["prompt"].endswith("<|im_start|>assistant\n") and "<tools>" in info["prompt"]
    assert info["protocol"] == "qwen_tools" and info["resumed_from_step"] == []
    assert info["hardware"]["processes"] == 1 and info["versions"]["trl"]
    assert info["task"] == {"questions": "world", "retriever_options": '{"api_key": "<redacted>", "k1": 0.9}'}
    names = {name for name, field in SearchGRPOConfig.__dataclass_fields__.items() if field.init}
    assert set(info["config"]) == names
    assert info["config"]["max_observation_length"] == 200 and info["config"]["hub_token"] == "<redacted>"
    assert info["config"]["push_to_hub_token" if "push_to_hub_token" in names else "hub_model_id"] is None
    for path in tmp_path.rglob("*.json*"):
        assert secret not in path.read_text()
    # Every log, including the final summary, with the same numbers as the trainer's own log.
    assert [row["step"] for row in run.history] == [1, 2, 2]
    for row, logged in zip(run.history, trainer.state.log_history, strict=True):
        assert {name: row[name] for name in logged} == logged


def test_a_resumed_run_continues_in_the_same_files(tmp_path, tokenizer):
    scripted_trainer(tmp_path, make_random_model(tokenizer), tokenizer, max_steps=3, **SAVING).train()
    first = rows(tmp_path)
    started_at = read_run(tmp_path).info["started_at"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.')  # killed while writing
    resumed = scripted_trainer(tmp_path, make_random_model(tokenizer), tokenizer, max_steps=4, **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    run = read_run(tmp_path)
    assert run.problems == []
    assert [row["step"] for row in run.history] == [1, 2, 3, 4, 4]
    assert run.history[0] == first[0]
    assert run.info["resumed_from_step"] == [1] and run.info["started_at"] == started_at
    assert run.info["config"]["max_steps"] == 4
    assert sorted(set(read_trajectories(run)["step"].to_pylist())) == [1, 2, 3, 4]
    again = scripted_trainer(tmp_path, make_random_model(tokenizer), tokenizer, max_steps=3, **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    run = read_run(tmp_path)
    assert [row["step"] for row in run.history] == [1, 2, 3, 3] and run.info["resumed_from_step"] == [1, 2]
    assert [path.name for path in run.trajectory_files] == [f"step_{i:06d}.parquet" for i in (1, 2, 3)]


def test_a_run_resumed_elsewhere_takes_its_rows_from_the_checkpoint(tmp_path, tokenizer):
    scripted_trainer(tmp_path / "a", make_random_model(tokenizer), tokenizer, **SAVING).train()
    there = scripted_trainer(tmp_path / "b", make_random_model(tokenizer), tokenizer, **SAVING)
    there.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    ours, theirs = rows(tmp_path / "b"), rows(tmp_path / "a")
    assert [row["step"] for row in ours] == [1, 2, 2] and ours[0]["reward"] == theirs[0]["reward"]


def test_a_second_run_in_the_folder_keeps_the_files_of_the_first(tmp_path, tokenizer, caplog):
    scripted_trainer(tmp_path, make_random_model(tokenizer), tokenizer).train()
    (tmp_path / "results.json").write_text("{}")
    kept = {name: (tmp_path / name).read_bytes() for name in ("run.json", "metrics.jsonl", "results.json")}
    with caplog.at_level(logging.WARNING):
        scripted_trainer(tmp_path, make_random_model(tokenizer), tokenizer, max_steps=1).train()
    assert "earlier/1" in caplog.text
    assert [row["step"] for row in rows(tmp_path)] == [1, 1]
    assert {name: (tmp_path / "earlier" / "1" / name).read_bytes() for name in kept} == kept
    earlier = read_run(tmp_path / "earlier" / "1")
    assert len(earlier.trajectory_files) == 2 and len(read_run(tmp_path).trajectory_files) == 1
    scripted_trainer(tmp_path, make_random_model(tokenizer), tokenizer, max_steps=1).train()
    assert (tmp_path / "earlier" / "2" / "run.json").is_file()


def test_an_evaluation_alone_does_not_change_the_folder(tmp_path, tokenizer, random_model):
    trainer = scripted_trainer(
        tmp_path, random_model, tokenizer, trainer={"eval_dataset": DATA.select(range(1))},
        per_device_eval_batch_size=4, num_generations_eval=1,
    )  # fmt: skip
    trainer.evaluate()
    assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "trajectories").exists()
    trainer.train()
    trainer.evaluate()
    assert "eval_reward" in rows(tmp_path)[-1]
    assert len(read_run(tmp_path).trajectory_files) == 2


def test_a_plain_grpo_trainer_writes_no_records(tmp_path, tokenizer, random_model):
    from trl_search.trainer.grpo import SearchGRPOTrainer

    options = {"per_device_train_batch_size": 2, "num_generations": 2, "max_steps": 1, "max_completion_length": 4,
               "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}  # fmt: skip
    data = DATA.rename_column("question", "prompt")
    for cls, args in ((GRPOTrainer, GRPOConfig), (SearchGRPOTrainer, SearchGRPOConfig)):
        folder = tmp_path / cls.__name__
        model = make_random_model(tokenizer)
        cls(model, later_is_better, args(str(folder), **options), data, processing_class=tokenizer).train()
        assert not [name for name in ("run.json", "metrics.jsonl", "trajectories") if (folder / name).exists()]


def test_numbers_are_written_as_valid_json(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(tmp_path, random_model, tokenizer, max_steps=1)
    trainer.train()
    logs = {"nan": float("nan"), "inf": numpy.float32("inf"), "tensor": torch.tensor(0.5), "n": numpy.int64(3),
            "text": "é", "none": None, "yes": True, "list": [1]}  # fmt: skip
    trainer.run_log.on_log(trainer.args, trainer.state, trainer.control, logs=logs)
    assert rows(tmp_path)[-1] == {"step": 1, "nan": None, "inf": None, "tensor": 0.5, "n": 3, "text": "é",
                                  "none": None, "yes": True, "list": "[1]"}  # fmt: skip


def test_other_ranks_write_nothing(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(tmp_path, random_model, tokenizer)
    trainer.state.is_world_process_zero = False
    log = RunLog(model="m", protocol=None)
    log.on_train_begin(trainer.args, trainer.state, trainer.control)
    log.on_log(trainer.args, trainer.state, trainer.control, logs={"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_removing_later_steps_keeps_other_files(tmp_path):
    (tmp_path / "trajectories").mkdir()
    for name in ("step_000009.parquet", "step_best.parquet", "notes.txt"):
        (tmp_path / "trajectories" / name).write_text("x")
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n\n{"loss": 1}\nrubbish\n{"step": 3}\n')
    cut_back(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2}\n'
    assert sorted(path.name for path in (tmp_path / "trajectories").iterdir()) == ["notes.txt", "step_best.parquet"]
