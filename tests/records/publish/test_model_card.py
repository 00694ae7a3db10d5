"""The model card: metadata that the hub reads, the numbers of the run, and a snippet that runs."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from trl_search.chat.session import load_chat
from trl_search.common.errors import UserError
from trl_search.config.agent import TINY, AgentSettings
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.policies.tiny import tiny_policy_path
from trl_search.protocols import PROTOCOLS, load_protocol
from trl_search.records.publish.card_facts import CardFacts
from trl_search.records.publish.model_card import (
    CONFIG_KEYS,
    OPTION_KEYS,
    example_conversation,
    question_for,
    snippet,
    write_card,
)
from trl_search.records.publish.results import Result, evaluation_results, training_results
from trl_search.types import Answer, Search

pytestmark = pytest.mark.slow

INFO = {
    "format": 1,
    "command": "trl-search train /home/me/secret/recipe.yaml",
    "versions": {"trl-search": "0.1.0", "trl": "1.16.0", "torch": "2.13.0"},
    "hardware": {"platform": "Linux", "cpus": 2, "gpus": [], "processes": 1},
    "config": {
        "protocol": "qwen_tools", "instruction": "", "learning_rate": 1e-4, "output_dir": "/home/me/secret/run",
        "hub_token": "hf_secretsecretsecret", "num_generations": 8, "beta": 0.0, "vllm_server_host": "10.0.0.7",
    },
    "task": {
        "questions": "world", "world_passages": 300, "world_seed": 4, "retriever": "bm25", "reward_funcs": ["em"],
        "retriever_options": '{"url": "http://10.0.0.7:8000"}', "held_out_questions": {"world": 40},
    },
    "model": "tiny",
}  # fmt: skip


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A seed for the cases without one."""
    random.seed(0)


@pytest.fixture(scope="module")
def protocol():
    return load_protocol("qwen_tools", AutoTokenizer.from_pretrained(tiny_policy_path()), instruction="")


@pytest.fixture
def facts(protocol) -> CardFacts:
    results = [
        Result("guess | 1", "world", 40, 0.1),
        Result("search, after GRPO", "world", 40, 0.85, 0.11, final=True),
    ]
    return CardFacts("me/agent", TINY, protocol, base_model="tiny", info=INFO, results=results, license="apache-2.0")


def block(card: ModelCard, language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)\n^```$", card.content, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


def test_the_snippet_runs_and_answers(facts, capsys):
    """The snippet of the card, with a folder in place of the repository."""
    here = dataclasses.replace(facts, repo_id=tiny_policy_path())
    code = block(write_card(here), "python")
    assert code == snippet(here)
    space: dict[str, object] = {}
    exec(code, space)
    reply = space["reply"]
    assert reply.question == question_for(facts) and reply.searches >= 1
    *_, last = capsys.readouterr().out.strip().splitlines()  # DeepSpeed may print a warning when it is imported
    assert last == f"{reply.answer} {reply.queries}"


def test_the_snippet_of_an_agent_of_the_web_runs(facts, monkeypatch, tmp_path, capsys):
    """The web is replaced by a function; everything else is as on the card."""
    from trl_search.retrieval.web import providers as web_providers
    from trl_search.retrieval.web import retriever as web

    asked: list[str] = []

    def text(query: str, count: int) -> list[dict[str, str]]:
        asked.append(query)
        return [{"title": "Bram Stoker", "href": "https://stoker.example/", "body": "He was born in Dublin."}]

    monkeypatch.setattr(web_providers, "ddgs_text", text)
    monkeypatch.setattr(web.load, "__kwdefaults__", {**web.load.__kwdefaults__, "cache": tmp_path / "web.sqlite3"})
    real = dataclasses.replace(facts, repo_id=tiny_policy_path(), info={})
    monkeypatch.setattr("trl_search.chat.session.trained_settings", lambda model: TINY)
    space: dict[str, object] = {}
    for seed in range(10):  # it samples, and Dracula is not in its world: sometimes it answers without a search
        random.seed(seed)
        exec(snippet(real), space)
        if space["reply"].queries:
            break
    assert space["reply"].question == "Where was the author of Dracula born?" and space["reply"].queries
    assert asked and {passage.url for passage in space["reply"].passages} == {"https://stoker.example/"}


def test_the_hub_reads_its_metadata(facts):
    card = ModelCard(str(write_card(facts)))
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert "trl-search" in data.tags and data.base_model is None  # the tiny policy is not on the hub
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results] == [
        ("world", "exact_match", 0.85)
    ]
    config = {"questions": "nq_hotpotqa", "retriever": "dense"}
    hub = dataclasses.replace(
        facts,
        base_model="Qwen/Qwen2.5-3B-Instruct",
        info={**INFO, "task": config},
        results=[Result("search, evaluated", "nq", 3610, 0.4, final=True)],
    )
    data = ModelCard(str(write_card(hub))).data
    assert data.base_model == "Qwen/Qwen2.5-3B-Instruct" and data.base_model_relation == "finetune"
    assert data.datasets == ["PeterJinGo/nq_hotpotqa_train"]
    (result,) = data.eval_results
    assert (result.dataset_type, result.dataset_config) == ("RUC-NLPIR/FlashRAG_datasets", "nq")
    assert 'load_retriever("web")' in write_card(hub).text
    bare = ModelCard(str(write_card(dataclasses.replace(facts, results=[], license=None))))
    assert bare.data.eval_results is None and bare.data.license is None


def test_the_card_contains_the_record_of_the_run_but_nothing_about_the_machine(facts):
    text = write_card(facts).content
    assert "| search, after GRPO | world | 40 | 0.850 | 0.110 |" in text and "| guess \\| 1 | world |" in text
    assert "trl 1.16.0" in text and "Trained on 2 CPU cores, 1 process." in text
    recipe = yaml.safe_load(block(write_card(facts), "yaml"))
    assert recipe["learning_rate"] == 1e-4 and recipe["questions"] == "world" and recipe["reward_funcs"] == ["em"]
    assert recipe["world_passages"] == 300 and recipe["instruction"] == ""
    assert "trl-search chat me/agent " in text and "--world_passages 300 --world_seed 4" in text
    spaced = write_card(dataclasses.replace(facts, repo_id="/tmp/my run")).content
    assert "trl-search chat '/tmp/my run' " in spaced
    for private in ("secret", "10.0.0.7", "/home/me", "hf_"):
        assert private not in text
    local = dataclasses.replace(
        facts,
        base_model="/home/me/warm",
        info={
            **INFO,
            "task": {
                "questions": "/home/me/q.jsonl",
                "retriever": "http://10.0.0.7:8000",
                "teacher": "http://10.0.0.7",
            },
        },
    )
    text = write_card(local).content
    assert "/home/me" not in text and "10.0.0.7" not in text
    assert "the questions of `q.jsonl`" in text and "`warm` (a local model)" in text


def test_the_recipe_of_the_card_has_the_options_that_were_changed(facts):
    defaults = {key.name: key.default for key in dataclasses.fields(SearchGRPOConfig)}
    assert defaults.keys() >= set(CONFIG_KEYS)
    config = {**defaults, "turn_credit": "retrieval", "refill_groups": 2}
    recipe = yaml.safe_load(block(write_card(dataclasses.replace(facts, info={**INFO, "config": config})), "yaml"))
    assert set(OPTION_KEYS) & recipe.keys() == {"turn_credit", "refill_groups"}


def test_the_card_names_rollbacks(facts):
    assert "went back" not in write_card(facts).text
    told = write_card(dataclasses.replace(facts, rollbacks=[{"step": 44, "to": 24}])).text
    assert "went back to its best checkpoint once: from step 44 to step 24. Each time, the learning rate" in told


def test_the_card_of_an_adapter_says_so(facts):
    config = {"base_model_name_or_path": "Qwen/Qwen2.5-3B-Instruct", "r": 32, "lora_alpha": 64}
    card = write_card(dataclasses.replace(facts, adapter=config, base_model=config["base_model_name_or_path"]))
    assert card.data.library_name == "peft" and card.data.base_model_relation == "adapter"
    assert "A LoRA adapter that makes [Qwen/Qwen2.5-3B-Instruct](https://" in card.text
    assert "This repository holds only the adapter" in card.text
    recipe = yaml.safe_load(block(card, "yaml"))
    assert recipe["use_peft"] is True and recipe["lora_r"] == 32 and recipe["lora_alpha"] == 64


def test_what_was_not_recorded_is_left_out(facts):
    text = write_card(dataclasses.replace(facts, settings=None, info={}, results=[], base_model=None)).content
    assert "its training is not recorded" in text and "agent settings of the training are not recorded" in text
    assert "No results are recorded" in text and "trl_search.json" not in text and "## Versions" not in text


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_protocol_parses_the_conversation_on_the_card(name, facts):
    """Its turns, split at the marks of the chat template, parse to the actions of the script."""
    tokenizer = facts.protocol.tokenizer
    protocol = load_protocol(name, tokenizer, instruction="")
    text = example_conversation(protocol, AgentSettings(protocol=name))
    assert text.startswith(
        protocol.decode(protocol.prompt_ids(protocol.messages("Where was the author of Dracula born?")))
    )
    turns = [re.split(r"<.im_end.>|<tool_response>|<information>", part)[0] for part in text.split("<think>")[1:]]
    author, birthplace = Search(("author of Dracula",)), Search(("where was Bram Stoker born?",))
    assert [protocol.parse(turn) for turn in turns] == [author, birthplace, Answer("Dublin")]
    assert "Dracula is a novel by Bram Stoker" in text and "born in Dublin in 1847" in text
    assert "`" * 3 not in text


def test_a_code_fence_is_longer_than_any_fence_inside(facts):
    info = {**INFO, "config": {"system_prompt": "Use ```code``` and ````more````."}}
    text = write_card(dataclasses.replace(facts, info=info)).content
    assert "`````yaml\n" in text


# The sources of the numbers


def results(folder: Path, value: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(value))
    return folder


def test_table_rows_of_a_training(tmp_path):
    row = {"questions": 40, "em": 0.5, "em_ci95": 0.1, "f1": 0.6, "searches": 1.5}
    rows = {
        "direct": row,
        "search, after GRPO": {**row, "em": 0.8},
        "search, best checkpoint (step 4)": {**row, "em": 0.9},
    }
    run = results(tmp_path, {"rows": {**rows, "broken": {**row, "em": float("nan")}, "empty": {"em": None}}})
    lines = training_results(run, INFO["task"], run)
    assert [(line.policy, line.final) for line in lines] == [
        ("direct", False), ("search, after GRPO", True), ("search, best checkpoint (step 4)", False),
    ]  # fmt: skip
    assert lines[1] == Result("search, after GRPO", "world", 40, 0.8, 0.1, 0.6, 1.5, final=True)
    (tmp_path / "best").mkdir()
    assert [line.em for line in training_results(run, {}, run / "best") if line.final] == [0.9]
    assert not [line for line in training_results(run, {}, run / "checkpoint-2") if line.final]
    assert training_results(tmp_path / "best", {}, tmp_path / "best") == []


def test_table_rows_of_an_evaluation(tmp_path):
    one = {"questions": 100, "em": 0.4, "em_ci95": 0.1, "f1": 0.5, "searches": 2.0}
    sets = {"nq": one, "popqa": {**one, "em": 0.6}, "macro": {**one, "em": 0.5}}
    folder = results(
        tmp_path / "eval", {"format": 1, "results": {"search": sets, "direct": {"nq": one, "macro": one}}}
    )
    lines = evaluation_results(folder)
    assert [(line.policy, line.dataset, line.em, line.final) for line in lines] == [
        ("search, evaluated", "nq", 0.4, True),
        ("search, evaluated", "popqa", 0.6, True),
        ("search, evaluated", "average of 2 sets", 0.5, False),
        ("direct, evaluated", "nq", 0.4, False),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no results.json"),
        ('{"rows": {}}', "is not the result of an evaluation"),
        ('{"results": {"search": 5}}', "is not the result of an evaluation"),
        ('{"resu', "results.json is not JSON .*: run the evaluation again"),
    ],
)
def test_a_folder_that_is_not_an_evaluation(tmp_path, content, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=message):
        evaluation_results(tmp_path)


def test_the_settings_of_a_published_model_are_read_back(tmp_path, world, retriever):
    """As the card says, `chat` uses the settings in trl_search.json."""
    for file in Path(tiny_policy_path()).iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "trl_search.json").write_text(json.dumps(dataclasses.replace(TINY, max_searches=2).as_json()))
    with load_chat(str(tmp_path), retriever, device="cpu") as chat:
        searched, protocol = chat.environment.inner, chat.protocol
        assert searched.max_searches == 2 and protocol.instruction == "" and chat.limits == TINY.limits
