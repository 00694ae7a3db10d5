"""The folder of a run and each of its checkpoints contain our model card, with and without an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerState

from tests.support.scripted_trainer import config, scripted_trainer
from trl_search.config.agent import AgentSettings
from trl_search.policies.tiny import tiny_policy_path
from trl_search.protocols import Protocol, load_protocol
from trl_search.records.publish.checkpoint_card import CheckpointCards
from trl_search.records.run_log import RunLog


@pytest.fixture(scope="module")
def protocol():
    return load_protocol("qwen_tools", AutoTokenizer.from_pretrained(tiny_policy_path()), instruction="")


@pytest.mark.parametrize("lora", [False, True])
def test_a_checkpoint_has_our_model_card(tmp_path, random_model, tokenizer, lora):
    adapter = {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if lora else {}
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "save_only_model": True}
    trainer = scripted_trainer(tmp_path, random_model, tokenizer, trainer=adapter, **saving)
    trainer.run_log.task = {"base_model": "Qwen/Qwen2.5-3B-Instruct", "retriever": "bm25", "reward_funcs": ["em"]}
    trainer.train()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        card = ModelCard.load(folder / "README.md")
        assert "None" not in card.content and "More Information Needed" not in card.content
        assert card.data.base_model == "Qwen/Qwen2.5-3B-Instruct" and "trl-search" in card.data.tags
        assert card.data.library_name == ("peft" if lora else "transformers")
        for part in ("search agent", "max_searches: 4", "learning_rate: 0.01", "<tool_call>"):
            assert part in card.text, (folder, part)
        assert ("lora_r: 2" in card.text) == lora


def card(folder: Path, protocol: Protocol, *, tools: Sequence[dict] = (), **values: Any) -> str:
    log = RunLog(model="m", protocol="qwen_tools")
    log.info = values.get("info", {})
    state = TrainerState(log_history=values.get("history", []))
    CheckpointCards(AgentSettings(), protocol, tools, log).write(folder, config(folder), state, model=None)
    return (folder / "README.md").read_text()


def test_the_card_of_a_checkpoint_shows_its_evaluation(tmp_path: Path, protocol):
    info = {"task": {"held_out_questions": {"nq": 30, "hotpotqa": 20}}}
    history = [{"step": 4, "eval/em": 0.5, "eval/f1": 0.6, "eval/searches": 1.5}, {"step": 5, "loss": 0.1}]
    line = "| search, step 4 | nq, hotpotqa | 50 | 0.500 |  | 0.600 | 1.50 |"
    assert line in card(tmp_path, protocol, info=info, history=history[:1])
    assert "No results are recorded" in card(tmp_path, protocol, info=info, history=history)


def test_an_agent_with_other_tools_is_not_described_as_a_search_agent(tmp_path: Path, protocol):
    text = card(tmp_path, protocol, tools=[{"type": "function", "function": {"name": "calculator"}}])
    assert "calls tools (calculator)" in text and "search tool" not in text and "load_retriever" not in text
