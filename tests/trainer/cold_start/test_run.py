"""`trl-search sft`: from questions to a model trained on correct attempts, with every kind of teacher."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from tests.support.scripted_trainer import config
from tests.support.servers import Asked, Said, Server
from tests.trainer.cold_start.test_collect import said
from trl_search.cli.main import main
from trl_search.common.errors import UserError
from trl_search.config.agent import read_settings
from trl_search.config.searched import resolve_searched
from trl_search.config.task import TaskArguments
from trl_search.policies.tiny import tiny_policy_path
from trl_search.protocols import load_protocol
from trl_search.records.folder import read_run
from trl_search.records.report.summary import Fact, facts_of, headline
from trl_search.retrieval.index.folder import build_index
from trl_search.trainer.cold_start.arguments import ColdStartArguments
from trl_search.trainer.cold_start.collect import ATTEMPTS, read_attempts
from trl_search.trainer.cold_start.select import KEPT
from trl_search.trainer.pipeline import load
from trl_search.trainer.tag_rows import tag_ids, untrained_tags
from trl_search.types import Answer, ToolCall

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
GOLD = "Mira Talvane"
CALCULATOR = "tests.support.calculator:Calculator"
SMALL = {
    "model_name_or_path": "tiny",
    "dtype": "float32",
    "instruction": "",
    "max_completion_length": 400,
    "max_turn_length": 120,
    "max_observation_length": 100,
    "samples_per_question": 2,
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "use_cpu": "true",
    "bf16": "false",
    "gradient_checkpointing": "false",
    "dataloader_pin_memory": "false",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": "true",
}


def sft(folder: Path, *recipe: str, **options: Any) -> None:
    from trl_search.cli.commands import sft as command

    keys = {**SMALL, "output_dir": folder, **options}
    command.main([*recipe, *(word for key, value in keys.items() for word in (f"--{key}", str(value)))])


def weights(folder: str | Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def changed(folder: Path) -> set[str]:
    """The names of the weights that differ from the tiny policy's."""
    before, after = (dict(weights(name).named_parameters()) for name in (tiny_policy_path(), folder))
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Files of a user: questions and a corpus."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"id": f"q{i}", "question": f"Who wrote book {i}?", "golden_answers": [GOLD]} for i in range(6)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    passages = [{"id": str(i), "contents": f'"Book {i}"\nThe author of book {i} is {GOLD}.'} for i in range(20)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, passages)))
    options = json.dumps({"corpus": str(folder / "corpus.jsonl")})
    return {"questions": str(folder / "train.jsonl"), "retriever": "bm25", "retriever_options": options}


@pytest.fixture
def served(tokenizer: PreTrainedTokenizerBase) -> Iterator[Server]:
    """A fake `vllm serve` with a teacher that searches once and is mostly correct."""

    def answer(asked: Asked) -> Said:
        if asked.method == "GET":
            return Said({"data": [{"id": "teacher", "max_model_len": 2048}], "version": "0.31.0"})
        if asked.target == "/collective_rpc":  # as without VLLM_SERVER_DEV_MODE=1
            return Said(status=404)
        if asked.target == "/tokenize":
            return Said({"tokens": tokenizer.encode(asked.json["prompt"], add_special_tokens=False)})
        ids = tokenizer.encode(said(tokenizer.decode(asked.json["prompt"]), asked.json["seed"]))
        ids.append(tokenizer.eos_token_id)
        logprobs = {"token_logprobs": [-0.5] * len(ids)}
        return Said({"choices": [{"token_ids": ids, "logprobs": logprobs, "finish_reason": "stop"}]})

    server = Server(answer)
    yield server
    server.kill()


def test_a_model_that_is_not_finite_is_refused_before_anything_is_collected(
    tmp_path: Path, files: dict[str, Any]
) -> None:
    model = weights(tiny_policy_path())
    model.model.norm.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_policy_path()).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"not finite \(model.norm.weight\)"):
        sft(tmp_path / "sft", model_name_or_path=tmp_path / "model", teacher="scripts", **files)
    assert not (tmp_path / "sft" / "collection").exists()


def test_a_teacher_behind_a_server_teaches_an_adapter(
    tmp_path: Path, files: dict[str, Any], served: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**files, "teacher": served.url, "use_peft": "true", "lora_r": 4, "lora_dropout": 0.0}
    sft(tmp_path, **options, collect_only="true")
    attempts = read_attempts(tmp_path / "collection")
    assert len(attempts) == 12 and not (tmp_path / "config.json").exists()
    right = sum(int(attempt.em) for attempt in attempts)
    printed = capsys.readouterr().out
    assert re.search(rf"kept +{right} ", printed) and re.search(rf"wrong answer +{12 - right} ", printed)
    # The next call finds the attempts, samples nothing, and trains; the saved model contains the merged adapter.
    asked = len(served.asked)
    sft(tmp_path, **options)
    assert len(served.asked) == asked and "0 new, 12 from before" in capsys.readouterr().out
    assert {name.split(".")[-2] for name in changed(tmp_path)} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    settings = read_settings(str(tmp_path))
    assert settings is not None and (settings.instruction, settings.max_turn_length) == ("", 120)
    asked_for = resolve_searched(files["retriever"], json.loads(files["retriever_options"]))
    assert resolve_searched(str(tmp_path)) == asked_for  # so that `chat` and `eval` need no options


def test_scripts_collect_without_a_gpu_even_if_the_training_needs_one(tmp_path: Path, files: dict[str, Any]) -> None:
    recipe = {**files, "teacher": "scripts", "use_cpu": "false", "bf16": "true"}
    sft(tmp_path, **recipe, collect_only="true")
    assert read_attempts(tmp_path / "collection")


def test_a_collection_can_be_used_on_a_machine_with_other_paths(
    tmp_path: Path, files: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def machine(name: str) -> dict[str, Any]:
        home = tmp_path / name / f"kit of {name}"
        home.mkdir(parents=True)
        shutil.copy(files["questions"], home / "train.jsonl")
        build_index(Path(files["questions"]).parent / "corpus.jsonl", home / "index")
        parts = [{"kind": "bm25", "index": str(home / "index")}] * 2
        options = json.dumps({"retrievers": parts, "depth": 5})
        questions = {"questions": home / "train.jsonl", "teacher": "scripts", "collect_only": "true"}
        return {**questions, "retriever": "hybrid", "retriever_options": options, "output_dir": tmp_path / name}

    sft(tmp_path, **machine("cpu"))
    gpu = machine("gpu")
    shutil.copytree(tmp_path / "cpu/collection", tmp_path / "gpu/collection")
    sft(tmp_path, **gpu)
    assert "0 new, 12 from before" in capsys.readouterr().out


def test_an_adapter_can_be_saved_without_merging(tmp_path: Path, files: dict[str, Any], served: Server) -> None:
    sft(tmp_path, **files, teacher=served.url, use_peft="true", lora_r=4, merge_adapter="false")
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()
    # A second adapter would begin the first one anew.
    with pytest.raises(UserError, match=r"is an adapter of .*, not a whole model: .*merge_adapter: true"):
        sft(tmp_path / "again", **files, model_name_or_path=tmp_path, use_peft="true")
    with pytest.raises(UserError, match="is an adapter of"):
        load(TaskArguments(), config(tmp_path), ModelConfig(str(tmp_path), use_peft=True))


def test_the_policy_teaches_itself_in_the_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"world_passages": 1000, "max_train_questions": 8, "max_searches": 3, "min_searches": 0}
    sft(tmp_path, **options, min_f1=0.01, well_formed="false")
    attempts = read_attempts(tmp_path / "collection")
    assert len(attempts) == 16 and any(attempt.searches for attempt in attempts)
    assert changed(tmp_path) and (tmp_path / "collection" / KEPT).exists()
    # Other rules sample nothing again; other settings are refused.
    sft(tmp_path, **options, min_f1=0.02, well_formed="false", collect_only="true")
    assert "0 new, 16 from before" in capsys.readouterr().out
    before = (tmp_path / "collection" / ATTEMPTS).read_bytes()
    with pytest.raises(UserError, match=r"other settings \(max_searches was 3, and is 2\)"):
        # Without collect_only, the finished training would be refused first.
        sft(tmp_path, **{**options, "max_searches": 2}, collect_only="true")
    assert (tmp_path / "collection" / ATTEMPTS).read_bytes() == before


def test_scripted_players_teach_real_questions(
    tmp_path: Path, files: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    sft(tmp_path, **files, teacher="scripts", protocol="search_r1", logging_steps=1)
    attempts = read_attempts(tmp_path / "collection")
    assert len(attempts) == 12 and all(one.em == one.format == 1.0 and one.searches for one in attempts)
    printed = capsys.readouterr().out
    assert re.search(r"data\d+ +6 of 6 questions kept", printed)
    assert "── Collecting: 12 attempts at 6 questions, teacher: scripts\n" in printed
    assert changed(tmp_path)
    # Its folder is the folder of a run.
    run = read_run(tmp_path)
    assert (run.method, run.problems) == ("SFT", []) and [row["step"] for row in run.history] == [1, 2, 2]
    assert (
        run.task["teacher"] == "scripts" and run.task["base_model"] == "tiny" and run.task["train_trajectories"] == 12
    )
    assert run.info["environment"]["tools"] and "environment" not in run.task
    assert run.info["config"]["protocol"] == "search_r1"
    (tmp_path / "checkpoint-1").mkdir()
    assert read_settings(str(tmp_path / "checkpoint-1")) == read_settings(str(tmp_path))
    assert headline(run).startswith("A cold start: supervised training, without rewards. Its loss")
    assert Fact("Recipe", "recipe", "started 2026-11-26 10:00") in facts_of(
        dataclasses.replace(run, info={"command": "trl-search sft recipe.yaml", "started_at": "2026-11-26T10:00:01"})
    )
    assert main(["report", str(tmp_path)]) == 0 and (tmp_path / "report.html").is_file()
    assert main(["push", str(tmp_path), "me/agent", "--license", "mit", "--dry_run"]) == 0
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "Trained with supervised fine-tuning, a cold start for GRPO, by `trl-search`" in card
    assert "- sft\n" in card and "- grpo\n" not in card and "`trl-search sft recipe.yaml`" in card
    assert "teacher: scripts" in card and str(tmp_path) not in card


def test_demonstrations_are_shown_to_the_teacher_but_not_trained_on(
    tmp_path: Path, files: dict[str, Any], served: Server, tokenizer: PreTrainedTokenizerBase
) -> None:
    sft(tmp_path, **files, teacher=served.url, demonstrations=2, collect_only="true")
    texts = [tokenizer.decode(one.json["prompt"]) for one in served.asked if one.target == "/v1/completions"]
    for attempt in read_attempts(tmp_path / "collection"):
        assert tokenizer.decode(attempt.prompt_ids).count("user\nWho wrote") == 1
        shown = [text for text in texts if text.endswith(tokenizer.decode(attempt.prompt_ids))]
        assert shown and all(text.count("user\nWho wrote") == 3 for text in shown)
        assert all(text.count(f"user\n{attempt.question}") == 1 for text in shown)
        assert all(f"<answer> {GOLD} </answer>" in text for text in shown)
    with pytest.raises(UserError, match="demonstrations was 2, and is None"):
        sft(tmp_path, **files, teacher=served.url, collect_only="true")


def test_impossible_demonstrations_are_named(tmp_path: Path, files: dict[str, Any], served: Server) -> None:
    (tmp_path / "odd.jsonl").write_text(json.dumps({"question": "Who?", "golden_answers": ["nobody there"]}))
    odd = {**files, "questions": str(tmp_path / "odd.jsonl")}
    with pytest.raises(UserError, match="answered none of 1 questions, so there are no demonstrations"):
        sft(tmp_path / "run", **odd, teacher=served.url, demonstrations=2, collect_only="true")


def test_a_teacher_of_another_family_is_refused(tmp_path: Path, files: dict[str, Any], served: Server) -> None:
    theirs = Server(lambda asked: Said({"tokens": [1, 2, 3]}))
    with pytest.raises(UserError, match="differs from that of the model that is trained"):
        sft(tmp_path, **files, teacher=theirs.url)
    theirs.kill()
    with pytest.raises(UserError, match=rf"no vLLM server answers at {theirs.url}/tokenize"):
        sft(tmp_path, **files, teacher=theirs.url)
    assert not served.asked


def test_options_of_the_chat_template_reach_the_prompts(tmp_path: Path, files: dict[str, Any], served: Server) -> None:
    """As in GRPO: otherwise a model that thinks by default would train on prompts that it never gets again."""
    model = tmp_path / "model"
    shutil.copytree(tiny_policy_path(), model)
    template = (model / "chat_template.jinja").read_text("utf-8")
    (model / "chat_template.jinja").write_text("{% if marker is defined %}{{ marker }}{% endif %}" + template, "utf-8")
    options = {"model_name_or_path": model, "chat_template_kwargs": '{"marker": "THINK "}', "collect_only": "true"}
    sft(tmp_path / "run", **files, teacher=served.url, **options)
    tokenizer = AutoTokenizer.from_pretrained(model)
    attempts = read_attempts(tmp_path / "run/collection")
    assert attempts and all(tokenizer.decode(one.prompt_ids).startswith("THINK ") for one in attempts)


def test_a_users_script_teaches_a_users_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Correct and wrong attempts are counted; correct ones are kept in the usual file of a cold start."""
    rows = [{"id": f"q{i}", "question": f"{i} + 2", "golden_answers": [str(i + 2)]} for i in range(6)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {
        "questions": tmp_path / "sums.jsonl",
        "environment": CALCULATOR,
        "teacher": "scripts",
        "samples_per_question": 1,
        "output_dir": tmp_path / "run",
    }
    sft(tmp_path, **options, script=f"{__name__}:adds")
    printed = capsys.readouterr().out
    assert "1.00 calls" in printed and "searches" not in printed
    assert re.search(r"kept +5 ", printed) and re.search(r"wrong answer +1 ", printed) and changed(tmp_path / "run")
    kept = datasets.Dataset.from_parquet(str(tmp_path / "run/collection" / KEPT))
    assert set(kept["searches"]) == {1} and kept[0]["messages"][1]["content"] == "2"
    assert len(kept[0]["input_ids"]) == len(kept[0]["assistant_masks"])
    with pytest.raises(UserError, match=r"script was '.*:adds', and is '.*:guesses'; script_hash was"):
        sft(tmp_path, **options, script=f"{__name__}:guesses", collect_only="true")


def test_a_users_script_plays_the_demonstrations(
    tmp_path: Path, served: Server, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"id": f"q{i}", "question": f"{i} + 2", "golden_answers": [str(i + 2)]} for i in range(6)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"questions": tmp_path / "sums.jsonl", "environment": CALCULATOR}
    with pytest.raises(UserError, match="none of 12 attempts is kept"):  # this teacher knows only authors
        sft(tmp_path, **options, script=f"{__name__}:adds", teacher=served.url, demonstrations=1, collect_only="true")
    asked = [tokenizer.decode(one.json["prompt"]) for one in served.asked if one.target == "/v1/completions"]
    assert asked and all('{"name": "add"' in text for text in asked)


def adds(row: Any) -> Iterator[Any]:
    """Correct except for the last question."""
    a, _, b = row["question"].split()
    total = yield "I add.", ToolCall("add", {"a": int(a), "b": int(b)})
    yield f"It is {total}.", Answer(total if a != "5" else "8")


def guesses(row: Any) -> Iterator[Any]:
    yield "I guess.", Answer("3")


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_a_quantized_base_model_is_refused_before_anything_is_sampled(
    tmp_path: Path, files: dict[str, Any], served: Server, key: str
) -> None:
    with pytest.raises(UserError, match=f"{key}: the command line does not load quantized models"):
        sft(tmp_path, **files, teacher=served.url, use_peft="true", **{key: "true"})
    assert not served.asked and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat_template_kwargs": "think"}, "chat_template_kwargs is not JSON"),
        ({"teacher": "scripts", "questions": "q.jsonl", "max_searches": 0}, "set max_searches to at least 1"),
        ({"teacher": "scripts", "max_steps": -1}, "set max_steps"),
        (
            {"teacher": "scripts", "quality": "good"},
            "quality='good' is not a list of shares: write it as guess=0.5,good=0.5",
        ),
        (
            {"teacher": "scripts", "demonstrations": 2},
            "demonstrations=2 must be at least 0, and 0 with teacher: scripts",
        ),
        (
            {"teacher": "scripts", "environment": CALCULATOR},
            "only search, but the environment is .*: give your own script",
        ),
        ({"script": f"{__name__}:adds"}, "script: .*:adds needs teacher: scripts or demonstrations"),
        ({"teacher": "scripts", "script": "my_script"}, "script 'my_script' cannot be imported"),
        ({"teacher": "scripts", "script": f"{__name__}:GOLD"}, "script .*:GOLD must be a function"),
        (
            {"teacher": "scripts", "collect_only": "true"},
            "scripts of the embedded world are not collected: leave collect_only out",
        ),
        ({"min_f1": 1.5}, "min_f1=1.5 must be more than 0 and at most 1"),
        ({"samples_per_question": 0}, "samples_per_question=0 must be at least 1"),
        ({"max_train_questions": 0}, "max_train_questions=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 must be a finite number, at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be more than 0"),
        ({"max_failed_share": float("nan")}, "max_failed_share=nan must be a number from 0 to 1"),
        ({"keep_per": 3}, "unknown option '--keep_per': did you mean '--keep_per_question'"),
        ({"teacher": "scripts", "push_to_hub": "true"}, "push_to_hub uploads the whole folder of the run"),
        ({"output": "runs/x"}, "unknown option '--output': did you mean '--output_dir'"),
    ],
)
def test_mistakes_are_reported(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sft(tmp_path, **{"world_passages": 1000, **options})
    assert not list(tmp_path.iterdir())


def test_a_training_resumes_from_its_last_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"world_passages": 1000, "quality": "good=1.0", "save_strategy": "steps", "save_steps": 1}
    sft(tmp_path, "sft_world", **options)
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["resumed_from_step"] == [] and (tmp_path / "checkpoint-2").is_dir()
    shutil.rmtree(tmp_path / "checkpoint-2")
    sft(tmp_path, "sft_world", **options, resume_from_checkpoint="last", learning_rate=0.5)
    assert "learning_rate: 0.5 has no effect" in caplog.text
    assert json.loads((tmp_path / "run.json").read_text())["resumed_from_step"] == [1]
    assert (tmp_path / "checkpoint-2").is_dir()


def test_scripts_warm_up_a_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft(tmp_path, "sft_world", world_passages=1000, quality="good=1.0")
    printed = capsys.readouterr().out
    assert changed(tmp_path) and "── SFT: on 4 trajectories\n" in printed and "trained on 4 trajectories" in printed
    assert not (tmp_path / "collection").exists()


def test_every_key_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--help"]) == 0
    shown = capsys.readouterr().out.splitlines()
    for key in dataclasses.fields(ColdStartArguments):
        assert f"  --{key.name}" in shown and key.metadata["help"], key.name


def test_tags_that_were_never_trained_are_initialised_before_the_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = weights(tiny_policy_path())
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    protocol = load_protocol("qwen_tools", tokenizer)
    call = [tag_ids(protocol)[tag] for tag in ("<tool_call>", "</tool_call>")]
    with torch.no_grad():
        model.get_input_embeddings().weight[call] = model.get_input_embeddings().weight[50].clone()
    model.save_pretrained(tmp_path / "coder")
    tokenizer.save_pretrained(tmp_path / "coder")
    options = {"model_name_or_path": tmp_path / "coder", "questions": "world", "teacher": "scripts", "max_steps": 1}
    with caplog.at_level("WARNING"):
        sft(tmp_path / "plain", **options)
    assert "were never trained: <tool_call>" in caplog.text
    assert untrained_tags(weights(tmp_path / "plain"), protocol).keys() == {"<tool_call>", "</tool_call>"}
    sft(tmp_path / "initialised", **options, initialise_tags="true")
    assert untrained_tags(weights(tmp_path / "initialised"), protocol) == {}
