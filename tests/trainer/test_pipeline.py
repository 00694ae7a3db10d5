"""`trl-search train`, from the shipped recipe to its output files."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainingArguments

from tests.support.two_ranks import run_ranks
from trl_search.cli.main import main
from trl_search.common.errors import UserError
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.config.task import Task, TaskArguments, load_held_out, load_task, set_names
from trl_search.policies.loading import load_model
from trl_search.records.folder import read_run
from trl_search.trainer.callbacks.best_checkpoint import read_best
from trl_search.trainer.grpo import SearchGRPOTrainer
from trl_search.trainer.pipeline import warm_up
from trl_search.trainer.resume import is_whole
from trl_search.types import StopReason

SMALL = [
    "--world_passages", "1000", "--max_eval_questions", "8", "--warm_start_steps", "2", "--max_steps", "2",
    "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--evaluate_every", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    saving = ["--output_dir", str(folder), "--save_strategy", "steps", "--save_steps", "1"]
    assert main(["train", "quickstart", *saving, *SMALL]) == 0
    return folder


@pytest.mark.slow
def test_the_quickstart_writes_a_model_results_and_curves(run):
    results = json.loads((run / "results.json").read_text())
    rows, best = list(results["rows"]), read_best(run)
    assert rows[:4] == ["direct answer, no search", "one-shot RAG", "search, warm-started", "search, after GRPO"]
    assert rows[4:] == ([] if best.step == 2 else ["search, best checkpoint (step 1)"])
    assert all(row["questions"] == 8 for row in results["rows"].values())
    assert [row["step"] for row in results["history"] if "eval/em" in row] == [1, 2]
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "trl-search report" in (run / "report.html").read_text()[:500]
    for card in (run / "README.md", run / "checkpoint-1" / "README.md"):
        assert "the small policy that ships with trl-search" in card.read_text() and "None" not in card.read_text()
    assert "search, after GRPO" in (run / "README.md").read_text()
    assert best.average.em == max(row["eval/em"] for row in results["history"] if "eval/em" in row)
    assert (run / "best").is_symlink() and (run / "best" / "model.safetensors").exists()
    task = json.loads((run / "run.json").read_text())["task"]
    assert task["evaluate_every"] == 1 and sum(task["held_out_questions"].values()) == 8
    assert (run / "model.safetensors").exists() and (run / "warm_start" / "model.safetensors").exists()


@pytest.mark.slow
def test_an_interrupted_run_is_resumed(run, capsys):
    before = json.loads((run / "results.json").read_text())["rows"]
    warm = (run / "warm_start" / "model.safetensors").stat().st_mtime_ns
    (run / "checkpoint-9").mkdir()  # the next checkpoint, of which only the model was written
    (run / "checkpoint-9" / "model.safetensors").write_bytes(b"")
    assert not is_whole(run / "checkpoint-9") and is_whole(run / "checkpoint-2")
    for name in ("checkpoint-2-old", "checkpoint-7"):  # files of the user and of an earlier run
        shutil.copytree(run / "checkpoint-2", run / name)
    os.utime(run / "checkpoint-7" / "trainer_state.json", (1e9, 1e9))
    options = ["--output_dir", str(run), "--resume_from_checkpoint", "last", "--max_steps", "3"]
    assert main(["train", "quickstart", *SMALL, *options]) == 0
    results = json.loads((run / "results.json").read_text())
    assert [row["step"] for row in results["history"] if "loss" in row] == [1, 2, 3]
    # The warm start and the evaluation before training are not repeated.
    best, kept = read_best(run).step, list(before)[:3]
    assert {row: results["rows"][row] for row in kept} == {row: before[row] for row in kept}
    after = ["search, after GRPO", *[f"search, best checkpoint (step {best})"] * (best != 3)]
    assert list(results["rows"]) == [*kept, *after]
    said = capsys.readouterr().out
    assert "checkpoint-7 is skipped, because it is older" in said
    assert (
        "checkpoint-9 is skipped, because it is incomplete" in said and f"The best checkpoint, of step {best}" in said
    )
    assert (run / "warm_start" / "model.safetensors").stat().st_mtime_ns == warm


@pytest.mark.slow
def test_a_killed_run_keeps_its_evaluation_before_training(tmp_path, monkeypatch):
    def killed(trainer, inputs):
        raise UserError("killed in the first step")

    monkeypatch.setattr("trl_search.trainer.pipeline.SearchGRPOTrainer._generate_and_score_completions", killed)
    assert main(["train", "quickstart", *SMALL, "--output_dir", str(tmp_path)]) == 2
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert list(rows) == ["direct answer, no search", "one-shot RAG", "search, warm-started"]
    assert any("no metrics.jsonl" in problem for problem in read_run(tmp_path).problems)


@pytest.mark.parametrize("max_searches", [0, 2])
def test_a_policy_is_warmed_up_in_the_world_of_its_training(
    tmp_path, random_model, tokenizer, monkeypatch, max_searches
):
    played = []
    monkeypatch.setattr("trl_search.trainer.sft.sft_dataset", played.extend)
    monkeypatch.setattr("trl_search.trainer.sft.train", lambda *_: None)
    config = SearchGRPOConfig(str(tmp_path), bf16=False, instruction="", max_searches=max_searches)
    warm_up(random_model, tokenizer, TaskArguments(world_passages=1000, warm_start_steps=2), config, tmp_path)
    assert {"<tools>" in tokenizer.decode(one.prompt_ids) for one in played} == {max_searches > 0}
    assert any(one.searches for one in played) is (max_searches > 0)
    assert {one.stop_reason for one in played} == {StopReason.ANSWER}


@pytest.mark.slow
def test_two_processes_warm_up_and_train_as_one(tmp_path):
    """In the environment that `accelerate launch --num_processes 2` sets for `-m trl_search train quickstart`."""
    run = tmp_path / "run"
    smaller = ["--per_device_train_batch_size", "4", "--evaluate_every", "0"]
    smaller += ["--gradient_accumulation_steps", "1"]
    words = ["train", "quickstart", *SMALL, *smaller, "--use_cpu", "true", "--output_dir", str(run)]
    launched = {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
    said = "".join(run_ranks("trl_search", words, tmp_path, environment=launched))
    assert said.count("s in all.") == 1 and said.count("step 2/2  reward") == 1
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert all(row["questions"] == 8 for row in rows.values())  # four from each rank


@pytest.mark.slow
def test_lora_on_a_warm_start_is_loaded_and_resumed_with_that_base_model(tmp_path, monkeypatch, capsys):
    trained = []

    class Recorded(SearchGRPOTrainer):
        def save_model(self, *args, **kwargs):
            super().save_model(*args, **kwargs)
            trained.append(self.model)

    monkeypatch.setattr("trl_search.trainer.pipeline.SearchGRPOTrainer", Recorded)
    monkeypatch.chdir(tmp_path)
    options = ["train", "quickstart", *SMALL, "--output_dir", "run", "--use_peft", "true", "--lora_r", "4"]
    options += ["--evaluate", "false", "--evaluate_every", "0", "--save_strategy", "steps", "--save_steps", "1"]
    options += ["--gradient_accumulation_steps", "1", "--max_completion_length", "128"]
    assert main([*options, "--max_steps", "1"]) == 0
    assert main([*options, "--max_steps", "2", "--resume_from_checkpoint", "last"]) == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    monkeypatch.chdir("/")  # the adapter names its base model, wherever it is loaded
    warm = load_file(tmp_path / "run" / "warm_start" / "model.safetensors")
    ids = torch.arange(40)[None]
    for folder, model in (("run/checkpoint-1", trained[0]), ("run", trained[-1])):
        base = {name.replace(".base_layer", ""): value for name, value in model.get_base_model().state_dict().items()}
        assert all(torch.equal(base[name].cpu(), value) for name, value in warm.items())
        with torch.no_grad():
            reloaded = load_model(str(tmp_path / folder), device="cpu")(ids).logits
            torch.testing.assert_close(reloaded, model.cpu().eval()(ids).logits)
    shutil.rmtree(tmp_path / "run" / "warm_start")
    monkeypatch.chdir(tmp_path)
    assert main([*options, "--max_steps", "3", "--resume_from_checkpoint", "last"]) == 2
    assert f"{tmp_path / 'run' / 'warm_start'} has no model: copy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--questions", "nq_hotpot"], "nq_hotpotqa"),
        (["--model_name_or_path", "/nowhere/model"], "no model at /nowhere/model"),
        (["--retriever_options", "{index}"], "retriever_options is not JSON"),
        (["--retriever_options", "[]"], "retriever_options must be a JSON object"),
        (["--retriever", "bm52"], "bm25"),
        (["--reward_funcs", "fromat"], "format"),
        (["--world_passages", "10"], "at least"),
        (["--resume_from_checkpoint", "last"], "save_strategy and save_steps say when a run writes checkpoints"),
        (["--resume_from_checkpoint", "true"], "true is not a complete checkpoint"),
        (
            ["--load_in_4bit", "true", "--use_peft", "true"],
            "the command line does not load quantized models; leave it out",
        ),
        (["--load_in_8bit", "true"], "load_in_8bit: the command line"),
        (["--learnin_rate", "1"], "--learning_rate"),
        (["--push_to_hub", "true"], "push_to_hub uploads the whole folder of the run"),
        (["--torch_compile", "true", "--warm_start_steps", "1"], "torch_compile wraps the model"),
        (["--max_completion_length", "5000", "--warm_start_steps", "1"], "so max_completion_length=5000 leaves 0"),
    ],
)
def test_bad_input_gets_one_clear_line(tmp_path, capsys, options, message):
    options = ["--output_dir", str(tmp_path), "--evaluate", "false", "--warm_start_steps", "0", *options]
    assert main(["train", "quickstart", *SMALL[:2], *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())  # nothing was warmed up


@pytest.mark.parametrize("command", [["train", "quickstart"], ["sft", "sft_world"]])
def test_one_process_for_several_gpus_is_refused_at_once(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda args: 2))
    assert main([*command, "--output_dir", str(tmp_path)]) == 2
    assert "accelerate launch --num_processes 2 -m trl_search" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_protocol_lists_the_known_ones(capsys):
    assert main(["train", "quickstart", "--protocol", "react"]) == 2
    assert "'qwen_tools', 'qwen_inline', 'search_r1'" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_task():
    first, again = (load_task(TaskArguments(world_passages=1000, world_seed=4), seed=1) for _ in range(2))
    assert first.held_out["question"] == again.held_out["question"]
    assert not set(first.train["question"]) & set(first.held_out["question"])
    assert set(first.held_out["data_source"]) == {"world"}  # one set, so the average is over questions


def test_a_hub_set_is_evaluated_on_the_split_of_the_published_scores(monkeypatch, world, tmp_path):
    asked = []

    def load_questions(name, **options):
        asked.append((name, options))
        return Dataset.from_dict({"question": ["Who?"], "data_source": [str(name)]})

    for module in ("config.task", "data.questions"):
        monkeypatch.setattr(f"trl_search.{module}.load_questions", load_questions)
    monkeypatch.setattr("trl_search.config.searched.Searched.load", lambda self: None)
    for name in ("hotpotqa", str(tmp_path)):
        load_task(TaskArguments(questions="nq_hotpotqa", eval_questions=[name]), seed=0)
    assert [options["split"] for name, options in asked if "split" in options] == ["dev", "test"]
    # Evaluation questions are left out of the training.
    assert [options["exclude"] for name, options in asked if name == "nq_hotpotqa"] == [["hotpotqa"], [str(tmp_path)]]


def test_several_sets_are_each_sampled_and_distinguished(tmp_path):
    for name in ("first", "second"):
        rows = [{"id": f"{name}{i}", "question": f"{name} {i}?", "golden_answers": ["yes"]} for i in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = set_names(f"{tmp_path / 'first.jsonl'}, {tmp_path / 'second.jsonl'}")
    drawn, again, other = (load_held_out(names, limit=4, seed=seed) for seed in (1, 1, 2))
    assert drawn["data_source"] == ["first"] * 4 + ["second"] * 4
    assert list(drawn["id"]) == list(again["id"]) != list(other["id"])
    assert set_names(["nq,hotpotqa", "nq"]) == ["nq", "hotpotqa"] and set_names(None) == []
    sets = Task(train=drawn, held_out=drawn, retriever=None).held_out_sets
    assert {name: set(questions["data_source"]) for name, questions in sets.items()} == {
        "first": {"first"}, "second": {"second"}
    }  # fmt: skip
    alone = load_held_out(names[:1], limit=4, seed=1)
    assert Task(train=drawn, held_out=alone, retriever=None).held_out_sets is alone


def test_two_sets_of_one_name_are_refused(tmp_path):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        row = {"id": "1", "question": f"{folder}?", "golden_answers": ["yes"]}
        (tmp_path / folder / "mine.jsonl").write_text(json.dumps(row) + "\n")
    names = [str(tmp_path / folder / "mine.jsonl") for folder in ("first", "second")]
    with pytest.raises(UserError, match=r"first/mine.jsonl and .*second/mine.jsonl are both called 'mine'"):
        load_held_out(names, limit=None, seed=0)


def test_several_sets_may_be_given_in_a_recipe_or_on_the_command_line(tmp_path):
    from trl_search.config.recipe import recipe_values

    (tmp_path / "r.yaml").write_text("questions: nq_hotpotqa\neval_questions: [nq, hotpotqa]\n")
    (tmp_path / "s.yaml").write_text("eval_questions: hotpotqa\n")
    for words, names in (
        (["r.yaml"], ["nq", "hotpotqa"]),
        (["s.yaml"], ["hotpotqa"]),
        (["r.yaml", "--eval_questions", "popqa,nq"], ["popqa", "nq"]),
        (["r.yaml", "--eval_questions", "popqa", "nq"], ["popqa", "nq"]),
    ):
        values = recipe_values([str(tmp_path / words[0]), *words[1:]], [TaskArguments], command="train")
        assert set_names(TaskArguments(**values).eval_questions) == names


def test_evaluate_every_needs_evaluation_questions(tmp_path):
    from trl import ModelConfig

    from trl_search.trainer.pipeline import run_training

    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "1", "question": "a?", "golden_answers": ["b"]}) + "\n")
    (tmp_path / "c.jsonl").write_text(json.dumps({"id": "1", "contents": '"a"\nb'}) + "\n")
    arguments = TaskArguments(
        questions=str(tmp_path / "q.jsonl"),
        retriever_options=json.dumps({"corpus": str(tmp_path / "c.jsonl")}),
        evaluate_every=5,
    )
    rollback = SearchGRPOConfig(str(tmp_path), bf16=False, on_collapse="rollback")
    with pytest.raises(UserError, match="on_collapse=rollback needs a best checkpoint: set evaluate_every"):
        run_training(TaskArguments(), rollback, ModelConfig(model_name_or_path="tiny"))
    with pytest.raises(UserError, match="evaluate_every=5 needs eval_questions"):
        run_training(arguments, SearchGRPOConfig(str(tmp_path), bf16=False), ModelConfig(model_name_or_path="tiny"))


def test_a_configuration_is_checked_beyond_trl(tmp_path):
    with pytest.raises(ValueError, match="max_failed_share"):
        SearchGRPOConfig(output_dir=str(tmp_path), max_failed_share=2.0, bf16=False)
