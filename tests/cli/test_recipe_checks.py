"""Every problem that would stop a run is reported before it starts, all at once, each with its remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import ModelConfig

from trl_search.cli import recipe_checks
from trl_search.cli.commands import doctor
from trl_search.cli.main import main
from trl_search.cli.preflight import Device, Status
from trl_search.cli.recipe_checks import (
    check_configuration,
    check_disk,
    check_environment,
    check_memory,
    check_model_is_there,
    check_output,
    check_packages,
    check_precision,
    check_questions,
    check_retriever,
    check_rewards,
    count_parameters,
)
from trl_search.cli.recipe_command import recipe_classes
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.config.recipe import recipe_values
from trl_search.config.task import TaskArguments
from trl_search.retrieval.index.folder import build_index
from trl_search.types import Passage

CLASSES = (TaskArguments, SearchGRPOConfig, ModelConfig)
GPU = Device("NVIDIA L4", 24 << 30, 24 << 30)
QWEN_3B = 3_090_000_000


def test_on_a_laptop_everything_that_qwen3b_lacks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(recipe_checks, "gpus", lambda: [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(recipe_checks, "on_hub", lambda what, name, ask: recipe_checks.Check(what, Status.OK, name))
    monkeypatch.setattr(recipe_checks, "count_parameters", lambda name: QWEN_3B)
    assert main(["train", "qwen3b", "--reward_weights", "1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("trl-search: error: this cannot run here:\n")
    for problem in (
        "rewards: 1 reward_weights (1.0) for 4 reward_funcs (em format retrieval reflection): give --reward_weights, ",
        "precision: bf16: true needs a GPU",
        "packages: use_vllm: true needs vllm: pip install 'trl-search[vllm]'",
        "retriever: there is no index folder indexes/wiki18-bm25",
    ):
        assert f"\n  {problem}" in said
    assert "Traceback" not in said and not list(tmp_path.iterdir())


def test_the_quickstart_runs_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where nobody has run it yet
    checks = recipe_checks.recipe_checks(recipe_values(["quickstart"], CLASSES, command="train"), CLASSES)
    assert {check.status for check in checks} <= {Status.OK, Status.NOTE}


def test_the_doctor_takes_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "quickstart", "--num_generations", "7", "--json"]) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert checks["configuration"]["status"] == "problem" and "num_generations" in checks["configuration"]["said"]


def test_the_keys_of_a_recipe_say_which_command_it_is_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cold = tmp_path / "cold.yaml"
    cold.write_text("model_name_or_path: tiny\ncollect_only: true\noutput_dir: out\nuse_cpu: true\nbf16: false\n")
    assert main(["doctor", str(cold)]) == 0
    assert main(["train", str(cold)]) == 2
    assert f"run trl-search sft {cold}" in capsys.readouterr().err
    cold.write_text("model_name_or_path: tiny\nreward_func: em\n")  # a typo is a typo
    assert main(["train", str(cold)]) == 2
    assert "did you mean 'reward_funcs'" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["quikstart", "quickstart"])
def test_the_doctor_reads_the_recipe_before_it_looks_at_the_machine(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "environment_checks", lambda: pytest.fail("it looked at the machine"))
    assert main(["doctor", recipe, "--lerning_rate", "1"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_the_doctor_knows_that_collect_only_needs_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe_checks, "gpus", lambda: [])
    for options, status in (([], "problem"), (["--collect_only", "true"], "ok")):
        main(
            [
                "doctor",
                "sft_world",
                "--bf16",
                "true",
                "--teacher",
                "scripts",
                "--questions",
                "q.jsonl",
                *options,
                "--json",
            ]
        )
        checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
        assert checks["precision"]["status"] == status


def test_a_cold_start_may_sample_from_a_truncated_distribution() -> None:
    for command, recipe, checked in (("train", "quickstart", 1), ("sft", "sft_world", 0)):
        classes = recipe_classes(command)
        values = {**recipe_values([recipe], classes, command=command), "top_p": 0.9}
        checks = recipe_checks.recipe_checks(values, classes)
        assert sum(check.status is Status.WARNING and "top_p=0.9" in check.said for check in checks) == checked


def test_batches_that_do_not_divide() -> None:
    values = recipe_values(["quickstart"], CLASSES, command="train")
    assert check_configuration(values, CLASSES).status is Status.OK
    assert check_configuration({**values, "num_generations": 7}, CLASSES).status is Status.PROBLEM


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"optim": "paged_lion_8bit"}, "optim: paged_lion_8bit: You need to install `bitsandbytes`"),
        ({"optim": "galore_adamw"}, "optim: galore_adamw: You need to install `galore_torch`"),
        (
            {"optim": "galore_adamw", "optim_args": "rank=64"},
            "optim: galore_adamw: You need to install `galore_torch`",
        ),
        ({"optim": "grokadamw"}, "optim: grokadamw: Please install grokadamw"),
        ({"optim_args": "betas"}, "optim: adamw_torch_fused does not take optim_args: betas (not enough"),
    ],
)
def test_an_optimizer_that_cannot_be_made_is_named(keys: dict[str, str], said: str) -> None:
    check = check_configuration({**recipe_values(["quickstart"], CLASSES, command="train"), **keys}, CLASSES)
    assert check.status is Status.PROBLEM and check.said.startswith(said)


def test_under_a_launcher_the_checks_do_not_connect_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first rank checks. Built for any machine, its arguments would connect it over gloo, not NCCL."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    values = recipe_values(["quickstart"], CLASSES, command="train")
    assert check_configuration({**values, "num_generations": 7}, CLASSES).status is Status.OK
    assert not torch.distributed.is_initialized()


def test_a_warm_start_on_own_questions_is_refused_before_the_baselines() -> None:
    values = recipe_values(["quickstart", "--questions", "mine.jsonl"], CLASSES, command="train")
    check = check_configuration(values, CLASSES)
    assert check.status is Status.PROBLEM and "trl-search sft" in check.said
    assert check_configuration({**values, "warm_start_steps": 0}, CLASSES).status is Status.OK


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("train", {"repetition_penalty": 1.1}, "repetition_penalty and generation_kwargs have no effect"),
        ("train", {"vllm_structured_outputs_regex": "a+"}, "vllm_structured_outputs_regex has no effect"),
        ("train", {"max_tool_calling_iterations": 3}, "use max_searches"),
        ("train", {"torch_compile": True}, "torch_compile wraps the model"),
        ("train", {"on_collapse": "rollback"}, "needs a best checkpoint: set evaluate_every"),
        ("train", {"evaluate_every": 5, "questions": "q.jsonl", "warm_start_steps": 0}, "needs eval_questions"),
        ("train", {"environment": "my_agent:Library"}, "warm_start_steps shows searches"),
        ("train", {"evaluate_every": 5, "metric_for_best_model": "reward"}, "both choose the best checkpoint"),
        ("train", {"reward_weights": [0.0, 0.0, 0.0]}, "the weights of all rewards (em, format, reflection) are 0"),
        ("train", {"reward_funcs": ["reflection"], "reward_weights": None}, "of all rewards (reflection) are 0"),
        ("train", {"push_to_hub": True}, "trl-search push"),
        ("sft", {"push_to_hub": True}, "trl-search push"),
        ("sft", {"load_in_4bit": True}, "does not load quantized models"),
    ],
)
def test_a_key_that_the_run_would_refuse_is_a_problem(command: str, options: dict[str, Any], said: str) -> None:
    """The doctor called these recipes ready, and `train` refused them after it had loaded the data or the model."""
    classes = recipe_classes(command)
    recipe = {"train": "quickstart", "sft": "sft_world"}[command]
    values = {**recipe_values([recipe], classes, command=command), **options}
    check = check_configuration(values, classes)
    assert check.status is Status.PROBLEM and said in check.said


@pytest.mark.parametrize(
    ("values", "devices", "status"),
    [
        ({"bf16": True}, [], "problem"),
        ({"bf16": True, "use_cpu": True}, [], "ok"),
        ({"bf16": False, "fp16": None}, [], "ok"),
        ({"fp16": True}, [GPU], "ok"),
    ],
)
def test_precision(values: dict[str, Any], devices: list[Device], status: str) -> None:
    assert check_precision(values, devices).status == status


def test_packages_behind_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    values = {"use_vllm": True, "retriever": "dense", "report_to": ["wandb", "none"], "attn_implementation": "sdpa"}
    said = [f"{check.said}: {check.remedy}" for check in check_packages(values)]
    assert said == [
        "use_vllm: true needs vllm: pip install 'trl-search[vllm]'",
        "report_to: wandb needs wandb: pip install 'trl-search[wandb]'",
    ]
    assert list(check_packages({"report_to": "none", "retriever": "bm25"})) == []
    said = [check.said for check in check_packages({"report_to": "wandbb", "use_liger_kernel": True})]
    assert said[0].startswith("unknown report_to 'wandbb': did you mean 'wandb'") and len(said) == 2
    assert said[1] == "use_liger_kernel: true needs liger-kernel"
    (check,) = check_packages({"report_to": ["mlflow"]})
    assert check.said.startswith("report_to: mlflow needs mlflow: pip install mlflow")


@pytest.mark.parametrize(
    ("values", "devices", "status"),
    [
        ({"dtype": "float32", "beta": 0.001}, [GPU], "problem"),  # 5 x 12.4 GB
        ({"dtype": "bfloat16", "use_peft": True}, [GPU], "ok"),
        ({"dtype": "bfloat16", "use_peft": True, "deepspeed": "zero3.json"}, [GPU], "note"),
        ({"dtype": "float32"}, [], "note"),
        (
            {
                "dtype": "bfloat16",
                "use_peft": True,
                "use_vllm": True,
                "vllm_mode": "colocate",
                "vllm_gpu_memory_utilization": 0.9,
            },
            [GPU],
            "problem",
        ),
    ],
)
def test_memory_is_computed_from_the_model(values: dict[str, Any], devices: list[Device], status: str) -> None:
    assert check_memory(values, QWEN_3B, devices).status == status


def test_the_memory_of_a_small_model_on_a_cpu_is_not_that_of_a_gpu() -> None:
    check = check_memory({"dtype": "float32"}, 3_500_000, [])
    assert check.name == "memory" and "for 3.5 M parameters" in check.said


def test_parameters_are_counted_without_weights() -> None:
    assert 3_000_000 < (count_parameters("tiny") or 0) < 4_000_000
    assert count_parameters("runs/nowhere") is None


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 50 << 30})())
    values = {"output_dir": str(tmp_path / "deep" / "run"), "dtype": "float32", "save_strategy": "steps"}
    assert check_disk({**values, "save_total_limit": 1}, QWEN_3B).status is Status.OK
    assert check_disk({**values, "save_total_limit": 3}, QWEN_3B).status is Status.PROBLEM
    unsaved = check_disk({**values, "save_strategy": "no", "save_total_limit": 3}, QWEN_3B)
    assert (unsaved.status, unsaved.said) == (Status.OK, "no checkpoints are saved")


def test_models_and_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_model_is_there("tiny").status is Status.OK
    assert check_model_is_there(None).status is Status.PROBLEM
    assert "holds no model" in check_model_is_there(str(tmp_path)).said
    (tmp_path / "q.jsonl").touch()
    asked = {"questions": str(tmp_path / "q.jsonl"), "eval_questions": ["missing.jsonl", "world"]}
    assert [check.status for check in check_questions(asked)] == ["ok", "problem", "ok"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, *args, **kwargs: 1 / 0)
    (check,) = check_questions({"questions": "musique"})
    assert check.status is Status.PROBLEM and "RUC-NLPIR/FlashRAG_datasets" in check.said


def test_a_misspelt_world_suggests_it() -> None:
    (check,) = check_questions({"questions": "wrld"})
    assert "did you mean 'world'?" in check.said


def test_retrievers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_index([Passage("1", "Orlune", "A harbour town.")], tmp_path / "index")

    def status(word: str, options: Any, questions: str = "nq", **more: str) -> list[str]:
        values = {"retriever": word, "retriever_options": options, "questions": questions, **more}
        return [f"{check.name} {check.status}" for check in check_retriever(values)]

    assert status(str(tmp_path / "index"), "{}") == status("bm25", "{}", "world") == ["retriever ok"]
    assert status("bm25", {"index": str(tmp_path / "index")}) == ["retriever ok"]
    assert status("bm25", {"index": str(tmp_path / "other")}) == ["retriever problem"]
    assert status("bm52", "{}") == status("http://127.0.0.1:9", "{}") == ["retriever problem"]
    assert status("bm52", "{}", environment="tests.support.nowhere:World") == ["retriever problem"]
    part = {"kind": "bm25", "index": str(tmp_path / "other")}
    assert status("rerank", {"retriever": part, "model": "m"}) == ["retriever problem"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert status("dense", {"corpus": "c.jsonl"}) == ["packages problem", "retriever ok"]


def test_rewards_and_weights() -> None:
    assert check_rewards({"reward_funcs": ["em", "f1"], "reward_weights": [1.0]}).status is Status.PROBLEM
    assert check_rewards({"reward_funcs": ["em", "f1"], "reward_weights": None}).status is Status.OK


def test_an_environment_that_cannot_be_imported_is_listed_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "quickstart", "--environment", "tests.support.calculator:Nothing"]) == 2
    assert capsys.readouterr().err.count("has no attribute 'Nothing'") == 1


def test_the_users_environment_and_script() -> None:
    def said(**values: str) -> list[tuple[str, Status]]:
        return [(check.name, check.status) for check in check_environment(values)]

    calculator = "tests.support.calculator:Calculator"
    assert said() == said(environment="search") == []
    assert said(environment=calculator) == [("environment", Status.OK)]
    assert said(environment="tests.support.calculator:Nothing") == [("environment", Status.PROBLEM)]
    assert said(script="tests.support.calculator:nothing") == [("script", Status.PROBLEM)]


def test_a_finished_run_is_not_written_over(tmp_path: Path) -> None:
    values = {"output_dir": str(tmp_path), "overwrite": False, "resume_from_checkpoint": None}
    assert check_output(values).status is Status.OK
    (tmp_path / "results.json").write_text('{"rows": {}, "history": []}')  # measured, and killed before its first step
    assert check_output(values).status is Status.OK
    (tmp_path / "results.json").write_text('{"rows": {}, "history": [{"step": 1}]}')
    check = check_output(values)
    assert check.status is Status.PROBLEM and "--overwrite true" in check.remedy
    assert (
        "resume" not in check.remedy
    )  # with save_strategy: no, as in the quickstart, there is nothing to resume from
    (tmp_path / "checkpoint-1").mkdir()
    assert "--resume_from_checkpoint last" in check_output(values).remedy
    assert check_output({**values, "overwrite": True}).status is Status.OK
    assert check_output({**values, "resume_from_checkpoint": "last"}).status is Status.OK


def test_the_checkpoints_of_an_interrupted_run_are_not_deleted(tmp_path: Path) -> None:
    """The same command without --resume_from_checkpoint began anew, and save_total_limit deleted them."""
    values = {"output_dir": str(tmp_path), "overwrite": False, "resume_from_checkpoint": None}
    (tmp_path / "checkpoint-900").mkdir()
    assert check_output(values).status is Status.OK, "it is incomplete, so that nothing can be resumed from it"
    (tmp_path / "checkpoint-900/trainer_state.json").write_text("{}")
    check = check_output(values)
    assert check.status is Status.PROBLEM and "interrupted run, up to checkpoint-900" in check.said
    assert check.remedy.startswith("--resume_from_checkpoint last to continue it") and "--overwrite" in check.remedy
    assert check_output({**values, "overwrite": True}).status is Status.OK
    assert check_output({**values, "resume_from_checkpoint": "last"}).status is Status.OK
