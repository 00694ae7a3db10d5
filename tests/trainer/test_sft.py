"""Scripted trajectories are rollouts of the requested quality; the warm start trains only on the policy's tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

from tests.support.miniatures import miniature
from trl_search.common.errors import UserError
from trl_search.data.scripted_players import scripted_trajectories
from trl_search.data.world import World
from trl_search.environment import SearchEnvironment
from trl_search.protocols import PROTOCOLS, load_protocol
from trl_search.retrieval import Retriever
from trl_search.rewards.answers import exact_match
from trl_search.trainer.sft import SearchSFTConfig, sft_dataset, sft_rows, train, warm_start
from trl_search.types import Answer, StopReason, Trajectory


def em(world: World, trajectories: list[Trajectory]) -> float:
    questions = world.questions("train", limit=len(trajectories))
    answers = [trajectory.actions[-1] for trajectory in trajectories]
    assert all(isinstance(answer, Answer) for answer in answers)
    return sum(
        exact_match(answer.text, question.golden_answers)
        for answer, question in zip(answers, questions, strict=True)
        if isinstance(answer, Answer)
    ) / len(answers)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_good_scripts_find_the_answer_in_every_protocol(
    name: str, world: World, retriever: Retriever, tokenizer: PreTrainedTokenizerBase
) -> None:
    protocol = load_protocol(name, tokenizer, instruction="")
    trajectories = scripted_trajectories(world, retriever, protocol, n=40, quality={"good": 1.0})
    assert em(world, trajectories) > 0.95
    for trajectory in trajectories:
        assert trajectory.stop_reason is StopReason.ANSWER and trajectory.ids[-1] == tokenizer.eos_token_id
        assert trajectory.malformed == 0 and trajectory.searches >= 1
        for turn in trajectory.turns:
            assert set(trajectory.mask[turn.start : turn.end]) == {int(turn.role == "assistant")}


def test_quality_determines_searches_and_em(
    world: World, retriever: Retriever, tokenizer: PreTrainedTokenizerBase
) -> None:
    protocol = load_protocol("qwen_tools", tokenizer, instruction="")
    guesses = scripted_trajectories(world, retriever, protocol, n=100, quality={"guess": 1.0})
    assert {trajectory.searches for trajectory in guesses} == {0} and em(world, guesses) < 0.25
    hasty = scripted_trajectories(world, retriever, protocol, n=100, quality={"one_hop": 1.0})
    assert {trajectory.searches for trajectory in hasty} == {1} and 0.2 < em(world, hasty) < 0.7
    weak = scripted_trajectories(world, retriever, protocol, n=200)
    assert 0.6 < sum(trajectory.searches == 0 for trajectory in weak) / 200 < 0.8


def test_the_same_seed_gives_the_same_trajectories(
    world: World, retriever: Retriever, tokenizer: PreTrainedTokenizerBase
) -> None:
    protocol = load_protocol("qwen_tools", tokenizer, instruction="")
    first, again, other = (
        [t.ids for t in scripted_trajectories(world, retriever, protocol, n=20, seed=seed)] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_good_script_that_runs_out_of_searches_answers(
    world: World, retriever: Retriever, tokenizer: PreTrainedTokenizerBase
) -> None:
    protocol = load_protocol("qwen_tools", tokenizer, instruction="")
    one_search = SearchEnvironment(retriever, max_searches=1)
    trajectories = scripted_trajectories(
        world, retriever, protocol, n=30, quality={"good": 1.0}, environment=one_search
    )
    assert {trajectory.searches for trajectory in trajectories} == {1}
    assert {trajectory.stop_reason for trajectory in trajectories} == {StopReason.ANSWER}


def test_unknown_players_and_empty_mixtures_are_refused(
    world: World, retriever: Retriever, tokenizer: PreTrainedTokenizerBase
) -> None:
    protocol = load_protocol("qwen_tools", tokenizer, instruction="")
    with pytest.raises(UserError, match="unknown player 'god': did you mean 'good'"):
        scripted_trajectories(world, retriever, protocol, n=4, quality={"god": 1.0})
    with pytest.raises(UserError, match="must be positive"):
        scripted_trajectories(world, retriever, protocol, n=4, quality={"good": 0.0})


def test_the_dataset_contains_the_exact_trajectories(
    world: World, retriever: Retriever, tokenizer: PreTrainedTokenizerBase
) -> None:
    protocol = load_protocol("qwen_tools", tokenizer, instruction="")
    trajectories = scripted_trajectories(world, retriever, protocol, n=12)
    failed = Trajectory((1, 2), ids=[3], mask=[1], logprobs=[0.0], error="the index is on fire")
    rows = sft_dataset([*trajectories, failed])
    assert rows["input_ids"] == [[*t.prompt_ids, *t.ids] for t in trajectories]
    assert rows["assistant_masks"] == [[*[0] * len(t.prompt_ids), *t.mask] for t in trajectories]
    assert len(sft_dataset(trajectories, max_tokens=60)) < 12
    with pytest.raises(UserError, match="none of 12 trajectories"):
        sft_dataset(trajectories, max_tokens=3)


def test_the_loss_covers_only_the_policys_tokens(
    tmp_path: Path,
    world: World,
    retriever: Retriever,
    tokenizer: PreTrainedTokenizerBase,
    random_model: Qwen2ForCausalLM,
) -> None:
    # Large weights, so that the context matters and a leak between packed trajectories would be visible.
    with torch.no_grad():
        for weight in random_model.parameters():
            weight.mul_(8 if weight.ndim == 2 else 1)
    protocol = load_protocol("qwen_tools", tokenizer, instruction="")
    rows = sft_dataset(scripted_trajectories(world, retriever, protocol, n=6, quality={"one_hop": 0.5, "good": 0.5}))
    total, count = 0.0, 0
    for row in rows:
        ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["assistant_masks"])[1:].bool()
        with torch.no_grad():
            logprobs = random_model(ids[None]).logits[0, :-1].log_softmax(-1)
        total -= logprobs[torch.arange(len(ids) - 1), ids[1:]][mask].sum().item()
        count += int(mask.sum())
    args = SFTConfig(
        str(tmp_path),
        per_device_eval_batch_size=6,
        padding_free=True,
        max_length=None,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(random_model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-4)


def test_the_warm_start_learns_and_saves(
    tmp_path: Path,
    world: World,
    retriever: Retriever,
    tokenizer: PreTrainedTokenizerBase,
    random_model: Qwen2ForCausalLM,
) -> None:
    protocol = load_protocol("qwen_tools", tokenizer, instruction="")
    before = random_model.model.embed_tokens.weight.detach().clone()
    trajectories = warm_start(
        random_model, protocol, world, retriever, output_dir=str(tmp_path), steps=4, batch_size=4, learning_rate=1e-2
    )
    assert len(trajectories) == 16
    assert not torch.equal(before, random_model.model.embed_tokens.weight)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(saved.model.embed_tokens.weight, random_model.model.embed_tokens.weight)


def test_a_warm_start_of_two_processes_has_a_trajectory_for_each_row_of_each_step(
    tmp_path: Path,
    world: World,
    retriever: Retriever,
    tokenizer: PreTrainedTokenizerBase,
    random_model: Qwen2ForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SearchSFTConfig, "world_size", property(lambda self: 2))
    monkeypatch.setattr("trl_search.trainer.sft.train", lambda *given: None)
    protocol = load_protocol("qwen_tools", tokenizer, instruction="")
    trajectories = warm_start(
        random_model, protocol, world, retriever, output_dir=str(tmp_path), steps=3, batch_size=4, learning_rate=1e-2
    )
    assert len(trajectories) == 3 * 4 * 2


def test_an_adapter_is_not_merged_into_a_sharded_model(
    random_model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl_search.trainer.sft.is_deepspeed_zero3_enabled", lambda: True)
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "assistant_masks": [0, 1, 1]}])
    config = SearchSFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(UserError, match="merge_adapter: false"):
        train(random_model, tokenizer, rows, config, peft_config=LoraConfig(r=2))


def test_an_empty_training_set_is_refused() -> None:
    with pytest.raises(UserError, match="none of 0 trajectories"):
        sft_dataset([])


def test_for_a_model_that_would_mix_packed_trajectories_batches_are_padded(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    rows = sft_rows([((1, 2, 3), (4, 5, 6), (1, 0, 1))] * 2)
    config = SearchSFTConfig(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
    for family, said in (("mistral", "padding_free is off for MistralForCausalLM"), ("qwen2", "")):
        caplog.clear()
        with caplog.at_level("WARNING", logger="trl_search"):
            train(miniature(family, vocab_size=len(tokenizer)), tokenizer, rows, config)
        assert said in caplog.text and bool(said) == ("padding_free" in caplog.text)


def test_initialised_tags_need_a_merged_adapter(
    tmp_path: Path, random_model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = SearchSFTConfig(str(tmp_path), initialise_tags=True, merge_adapter=False, use_cpu=True, bf16=False)
    with pytest.raises(UserError, match="set merge_adapter: true"):
        train(random_model, tokenizer, sft_rows([((1,), (2,), (1,))]), config, peft_config=LoraConfig(r=2))
