"""`trl-search train`, from the recipe that ships to the files that it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from trl_search.cli import main
from trl_search.config import SearchGRPOConfig
from trl_search.report.figures import draw_curves
from trl_search.training import TaskArguments, load_task

SMALL = [
    "--world_passages", "1000", "--max_eval_questions", "24", "--warm_start_steps", "2", "--max_steps", "2",
    "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--evaluate_every", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    saving = ["--output_dir", str(folder), "--save_strategy", "steps", "--save_steps", "1"]
    assert main(["train", "quickstart", *saving, *SMALL]) == 0
    return folder


def test_the_quickstart_leaves_a_model_results_and_curves(run):
    results = json.loads((run / "results.json").read_text())
    assert list(results["rows"]) == [
        "direct answer, no search",
        "one-shot RAG",
        "search, warm-started",
        "search, after GRPO",
    ]
    assert all(row["questions"] == 24 for row in results["rows"].values())
    assert [row["step"] for row in results["history"] if "eval/em" in row] == [1, 2]
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (run / "model.safetensors").exists() and (run / "warm_start" / "model.safetensors").exists()


def test_an_interrupted_run_goes_on(run, capsys):
    warm = (run / "warm_start" / "model.safetensors").stat().st_mtime_ns
    options = ["--output_dir", str(run), "--resume_from_checkpoint", "last", "--max_steps", "3"]
    assert main(["train", "quickstart", *SMALL, *options]) == 0
    results = json.loads((run / "results.json").read_text())
    assert [row["step"] for row in results["history"] if "loss" in row] == [1, 2, 3]
    # The warm start and what was measured before training are not paid for twice.
    assert list(results["rows"]) == ["search, after GRPO"]
    assert (run / "warm_start" / "model.safetensors").stat().st_mtime_ns == warm


def test_two_processes_warm_up_and_train_as_one(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "trl_search.cli"]
    command = [*launch, "train", "quickstart", *SMALL, "--use_cpu", "true", "--output_dir", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("s in all.") == 1 and run.stdout.count("step 2/2  reward") == 1
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert all(row["questions"] == 24 for row in rows.values())  # twelve of each rank


def test_lora_saves_an_adapter(tmp_path):
    options = ["--output_dir", str(tmp_path), "--use_peft", "true", "--lora_r", "4", "--evaluate", "false"]
    options += ["--warm_start_steps", "0", "--max_steps", "1", "--evaluate_every", "0"]
    assert main(["train", "quickstart", *SMALL, *options]) == 0
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--questions", "nq_hotpot"], "nq_hotpotqa"),
        (["--model_name_or_path", "/nowhere/model"], "no model at /nowhere/model"),
        (["--retriever_options", "{index}"], "retriever_options is not JSON"),
        (["--retriever", "bm52"], "bm25"),
        (["--reward_funcs", "fromat"], "format"),
        (["--world_passages", "10"], "at least"),
        (["--resume_from_checkpoint", "last"], "holds no checkpoint"),
        (["--learnin_rate", "1"], "--learning_rate"),
    ],
)
def test_bad_input_gets_one_clear_line(tmp_path, capsys, options, message):
    options = ["--output_dir", str(tmp_path), "--evaluate", "false", "--warm_start_steps", "0", *options]
    assert main(["train", "quickstart", *SMALL[:2], *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_an_unknown_protocol_names_those_that_exist(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "quickstart", "--protocol", "react"])
    assert stopped.value.code == 2 and "'qwen_tools', 'qwen_inline', 'search_r1'" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_task():
    first, again = (load_task(TaskArguments(world_passages=1000, world_seed=4), seed=1) for _ in range(2))
    assert first.held_out["question"] == again.held_out["question"]
    assert not set(first.train["question"]) & set(first.held_out["question"])


def test_a_hub_set_is_evaluated_on_the_split_that_published_numbers_use(monkeypatch, world, tmp_path):
    asked = []
    monkeypatch.setattr("trl_search.training.load_questions", lambda name, **options: asked.append((name, options)))
    monkeypatch.setattr("trl_search.training.load_retriever", lambda kind, **options: None)
    for name in ("hotpotqa", str(tmp_path)):
        load_task(TaskArguments(questions="nq_hotpotqa", eval_questions=name), seed=0)
    assert [options["split"] for name, options in asked if "split" in options] == [None, "test"]


def test_curves_survive_missing_and_empty_histories(tmp_path):
    assert draw_curves([], tmp_path / "a.png", {}).exists()
    assert draw_curves([{"step": 1, "reward": None}, {"step": 2, "reward": 0.5}], tmp_path / "b.png", {}).exists()


def test_config_checks_what_trl_does_not(tmp_path):
    with pytest.raises(ValueError, match="max_failed_share"):
        SearchGRPOConfig(output_dir=str(tmp_path), max_failed_share=2.0, bf16=False)
