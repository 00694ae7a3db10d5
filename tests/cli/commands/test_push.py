"""`trl-search push`: which files are uploaded and which never, what the hub refuses, and push followed by chat."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from tests.records.publish.test_model_card import INFO
from tests.support.model_hub import TOKEN, ModelHub, model_hub
from trl_search.cli.main import main
from trl_search.data.world import generate_world
from trl_search.evaluation.settings import describe_model
from trl_search.policies.tiny import tiny_policy_path
from trl_search.records.publish.upload import plan_upload

MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
GOES = {*MODEL, "chat_template.jinja", "README.md", "trl_search.json", "curves.png"}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder with everything that a training writes."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_policy_path(), folder)
    config = {**INFO["config"], "max_searches": 3, "max_turn_length": 96, "max_completion_length": 512}
    (folder / "run.json").write_text(json.dumps({**INFO, "config": {**config, "max_observation_length": 192}}))
    rows = {"search, after GRPO": {"questions": 40, "em": 0.85, "em_ci95": 0.1, "f1": 0.9, "searches": 1.6}}
    (folder / "results.json").write_text(json.dumps({"rows": rows, "history": []}))
    for name in ("curves.png", "training_args.bin", "metrics.jsonl", "wandb/run.log", "checkpoint-4/optimizer.pt",
                 "checkpoint-4/model.safetensors", "trajectories/step_000001.parquet", ".env"):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"secret of the machine")
    return folder


@pytest.fixture
def hub(monkeypatch) -> ModelHub:
    """A hub in this process. The constants are patched because huggingface_hub reads the environment on import."""
    with model_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.HfApi", lambda token: HfApi(endpoint=hub.url, token=token))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def push(*arguments: str | Path) -> int:
    return main(["push", *map(str, arguments)])


def test_which_files_are_uploaded(run, hub, capsys):
    assert push(run, "me/agent", "--license", "mit") == 0
    out = capsys.readouterr().out
    assert set(hub.models["me/agent"]) == GOES and hub.private["me/agent"] is True
    assert hub.models["me/agent"]["model.safetensors"] == (run / "model.safetensors").read_bytes()
    card = hub.models["me/agent"]["README.md"].decode()
    assert "license: mit" in card and "| search, after GRPO | world | 40 | 0.850 |" in card
    assert json.loads(hub.models["me/agent"]["trl_search.json"])["max_searches"] == 3
    assert out.splitlines()[-1].startswith(f"{hub.url}/me/agent/commit/") and all(name in out for name in GOES)
    assert TOKEN not in out and "To me/agent, private:" in out
    assert not any(
        b"secret of the machine" in content for n, content in hub.models["me/agent"].items() if n != "curves.png"
    )
    assert not (run / "README.md").exists(), "a push writes nothing into the run"
    assert push(run, "me/open", "--license", "mit", "--public", "--with_trajectories") == 0
    assert hub.private["me/open"] is False and "trajectories/step_000001.parquet" in hub.models["me/open"]


def test_a_dry_run_needs_no_network_and_overwrites_nothing(run, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert push(run, "me/agent", "--dry_run") == 0
    out = capsys.readouterr().out
    listed = {line.split()[0] for line in out.splitlines() if line.startswith("  ")}
    assert listed == GOES and "The card names no licence" in out and "Would upload to me/agent, private:" in out
    card = (run / "README.md").read_text()
    assert push(run, "me/agent", "--dry_run") == 0 and not (run / "README.new.md").exists()
    (run / "README.md").write_text("my own words")
    assert push(run, "me/agent", "--dry_run") == 0
    assert (run / "README.md").read_text() == "my own words" and (run / "README.new.md").read_text() == card


def test_the_card_of_an_agent_without_searches_shows_no_tool(run):
    info = json.loads((run / "run.json").read_text())
    for max_searches in (3, 0):
        (run / "run.json").write_text(json.dumps({**info, "config": {**info["config"], "max_searches": max_searches}}))
        assert push(run, "me/agent", "--dry_run") == 0
        assert ("<tools>" in (run / "README.md").read_text()) is (max_searches > 0)
        (run / "README.md").unlink()


def test_a_card_of_the_user_is_uploaded_unchanged(run, hub, tmp_path, capsys):
    mine = tmp_path / "mine.md"
    mine.write_text("---\nlicense: mit\n---\n\nMy own words.\n")
    assert push(run, "me/agent", "--card", mine) == 0
    assert hub.models["me/agent"]["README.md"] == mine.read_bytes()
    mine.write_text("no metadata")
    assert push(run, "me/agent", "--card", mine) == 2 and "has no metadata" in capsys.readouterr().err
    mine.write_bytes("---\nlicense: mit\n---\n\nMes épreuves.\n".encode("latin-1"))
    assert push(run, "me/agent", "--card", mine) == 2 and "is not UTF-8" in capsys.readouterr().err


def test_the_card_of_a_checkpoint_describes_its_run_and_evaluation(run, hub, tmp_path):
    best = run / "best"
    shutil.copytree(tiny_policy_path(), best)
    one = {"questions": 3610, "em": 0.41, "em_ci95": 0.02, "f1": 0.5, "searches": 2.0}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/results.json").write_text(json.dumps({"results": {"search": {"nq": one, "macro": one}}}))
    assert push(best, "me/best", "--eval", tmp_path / "eval") == 0
    card = hub.models["me/best"]["README.md"].decode()
    assert "| search, evaluated | nq | 3,610 | 0.410 | 0.020 |" in card and "learning_rate: 0.0001" in card
    assert json.loads(hub.models["me/best"]["trl_search.json"])["instruction"] == ""


def test_an_evaluation_of_another_model_is_refused(run, hub, tmp_path, capsys):
    """Its scores went into the card of this one, and into the metadata that the hub compares."""
    one = {"questions": 3610, "em": 0.41, "em_ci95": 0.02, "f1": 0.5, "searches": 2.0}
    (tmp_path / "eval").mkdir()

    def push_with_evaluation_of(model: dict[str, str]) -> int:
        report = {"results": {"search": {"nq": one}}, "settings": {"model": model, "model_name": "runs/other"}}
        (tmp_path / "eval/results.json").write_text(json.dumps(report))
        return push(run, "me/agent", "--eval", tmp_path / "eval")

    for other in ({"sha256": "0" * 64}, {"name": "Qwen/Qwen2.5-3B", "revision": "main"}):
        assert push_with_evaluation_of(other) == 2 and not hub.models
        assert "evaluated other weights (runs/other)" in capsys.readouterr().err
    for same in (describe_model(str(run)), {"name": "me/agent", "revision": "main"}):
        assert push_with_evaluation_of(same) == 0


def test_the_card_names_the_licence_of_the_base_model(run, hub):
    hub.models["Qwen/Base"], hub.cards["Qwen/Base"] = {}, {"license": "other"}
    assert push(run, "me/agent", "--base_model", "Qwen/Base") == 0
    card = hub.models["me/agent"]["README.md"].decode()
    assert "license: other" in card and "base_model: Qwen/Base" in card


def test_a_repository_that_is_already_public_needs_the_option_public(run, hub, capsys):
    hub.models["me/agent"], hub.private["me/agent"] = {}, False
    assert push(run, "me/agent") == 2
    assert "me/agent is public" in capsys.readouterr().err and hub.models["me/agent"] == {}
    assert push(run, "me/agent", "--public") == 0 and set(hub.models["me/agent"]) == GOES


@pytest.mark.parametrize(("status", "remedy"), [(401, "hf auth login"), (403, "role 'write'")])
def test_refusals_of_the_hub_name_the_remedy(run, hub, capsys, status, remedy):
    hub.refuse = status
    assert push(run, "me/agent") == 2
    error = capsys.readouterr().err
    assert f"the hub answered {status} for me/agent" in error and remedy in error and TOKEN not in error
    assert error.count("\n") == 1


def test_no_token_and_no_network(run, hub, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert push(run, "me/agent") == 2 and "no token: log in" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token: HfApi(endpoint="http://127.0.0.1:9", token=token))
    assert push(run, "me/agent") == 2 and "the hub cannot be reached" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert push(run, "me/agent") == 2 and "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def damage(run: Path, name: str) -> None:
    if name == "cut":
        weights = (run / "model.safetensors").read_bytes()
        (run / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    elif name == "shards":
        (run / "model.safetensors").rename(run / "model-00001-of-00002.safetensors")
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        (run / "model.safetensors.index.json").write_text(json.dumps(index))
    elif name == "run.json":
        (run / "run.json").write_text('{"config": {')
    elif name == "tokenizer":
        (run / "tokenizer.json").unlink()
        (run / "tokenizer_config.json").unlink()
    else:
        (run / name).unlink()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "holds no weights .*checkpoint-4"),
        ("config.json", "has weights but no config.json"),
        ("tokenizer", "has no tokenizer"),
        ("cut", "is damaged or incomplete"),
        ("shards", "model-00002-of-00002.safetensors, listed in"),
        ("run.json", "run.json is not JSON .*: move it away"),
    ],
)
def test_an_incomplete_model_is_not_uploaded(run, hub, capsys, name, message):
    import re

    damage(run, name)
    assert push(run, "me/agent") == 2
    assert re.search(message, capsys.readouterr().err) and "me/agent" not in hub.models


@pytest.mark.parametrize("repo_id", ["agent", "me/my/agent", "/agent", "me/", "./agent", "me/my agent"])
def test_a_repository_name_is_owner_and_name(run, capsys, repo_id):
    assert push(run, repo_id) == 2 and "write it as owner/name" in capsys.readouterr().err


@pytest.fixture
def lora(tmp_path) -> Path:
    """An adapter of a model on this machine."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_policy_path()), LoraConfig(r=2))
    adapted.save_pretrained(tmp_path / "lora")
    AutoTokenizer.from_pretrained(tiny_policy_path()).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def name_base(lora: Path, base: str) -> bytes:
    """Changes the base model in the adapter's configuration, and returns the file."""
    file = lora / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))
    return file.read_bytes()


@pytest.mark.parametrize("base", [tiny_policy_path(), "/scratch/alice/warm", "./warm", "runs/warm", "warm", "a/b/c"])
def test_an_adapter_of_a_local_model_names_the_base_model_on_the_hub(lora, hub, capsys, base):
    mine = name_base(lora, base)
    assert push(lora, "me/lora") == 2 and push(lora, "me/lora", "--dry_run", "--base_model", "/scratch/alice/x") == 2
    error = capsys.readouterr().err
    assert error.count(f"the base model of the adapter is {base}, which is only on this machine") == 2
    assert error.count("--base_model owner/name") == 2
    assert "me/lora" not in hub.models
    assert push(lora, "me/lora", "--license", "mit", "--base_model", "Qwen/Base") == 0
    published = json.loads(hub.models["me/lora"]["adapter_config.json"])
    assert published == {**json.loads(mine), "base_model_name_or_path": "Qwen/Base"}
    assert "base_model: Qwen/Base" in hub.models["me/lora"]["README.md"].decode()
    assert (lora / "adapter_config.json").read_bytes() == mine, "a push writes nothing into the run"


def test_an_adapter_of_a_model_on_the_hub_is_uploaded_unchanged(lora, hub):
    mine = name_base(lora, "Qwen/Base")
    assert push(lora, "me/lora", "--license", "mit") == 0
    assert hub.models["me/lora"]["adapter_config.json"] == mine


def test_an_adapter_is_uploaded_without_its_base_model(lora, hub):
    assert push(lora, "me/lora", "--license", "mit", "--base_model", "Qwen/Base") == 0
    assert {"adapter_config.json", "adapter_model.safetensors"} < set(hub.models["me/lora"])
    assert "model.safetensors" not in hub.models["me/lora"] and "config.json" not in hub.models["me/lora"]
    card = hub.models["me/lora"]["README.md"].decode()
    assert "A LoRA adapter" in card and "library_name: peft" in card and str(Path.cwd()) not in card


def test_the_plan_names_every_shard_and_template(tmp_path):
    import numpy
    from safetensors.numpy import save_file

    for shard in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        save_file({"a": numpy.zeros(2)}, tmp_path / shard)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    template = "additional_chat_templates/tool_use.jinja"
    (tmp_path / template).parent.mkdir()
    for name in ("config.json", "tokenizer.json", template, "rng_state.pth", "scheduler.pt", "optimizer.pt"):
        (tmp_path / name).write_text("{}")
    assert set(plan_upload(tmp_path, {"README.md": ""}).files) == {
        "config.json", "tokenizer.json", template, "model.safetensors.index.json", *index["weight_map"].values(),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pushed_model_answers_from_the_hub(run, tmp_path):
    """In a separate process, configured only by the environment: push, then chat by the repository's name."""
    question = generate_world(300, 4).questions("test", 1)[0]
    program = f"""
import sys
from trl_search.cli.main import main
assert main(["push", {str(run)!r}, "me/agent"]) == 0
print("--", flush=True)
sys.exit(main(["chat", "me/agent", {question.question!r}, "--world", "--world_passages", "300", "--world_seed", "4",
               "--temperature", "0", "--json", "--device", "cpu"]))
"""
    with model_hub() as hub:
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=560
        )
    assert done.returncode == 0, done.stderr
    pushed, said = done.stdout.split("--\n")
    assert "/me/agent/commit/" in pushed
    reply = json.loads(said)
    assert reply["question"] == question.question and reply["searches"] >= 1 and reply["answer"]
    (weights,) = (tmp_path / "hf").rglob("model.safetensors")
    assert weights.read_bytes() == (run / "model.safetensors").read_bytes()
    assert TOKEN not in done.stdout + done.stderr
