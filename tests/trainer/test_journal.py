"""Trajectories that a killed run finished are not repeated, and the journal of another batch is not used."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support.scripted_trainer import GOLD, PASSAGES, answer, scripted_trainer, search, steps
from trl_search.config.agent import AgentSettings
from trl_search.trainer.batch import Rollout
from trl_search.trainer.journal import Journal, batch_digest, open_journal
from trl_search.types import (
    Answer,
    Completion,
    EndOfTurn,
    FinishReason,
    Invalid,
    Passage,
    Sampling,
    Search,
    StopReason,
    ToolCall,
    Trajectory,
)


def make_trajectory(reason=StopReason.ANSWER):
    trajectory = Trajectory(prompt_ids=(5, 9))
    trajectory.act(Completion((2, 7), (-0.1, math.inf), FinishReason.EOS), "<search> x </search>")
    trajectory.observe((31, 4), "<information> … </information>")
    trajectory.actions += [Search(("x", "y")), ToolCall("read", {"page": [1, None]}), Invalid("no JSON", near=True)]
    trajectory.actions += [EndOfTurn(), Answer(GOLD)]
    trajectory.passages.append(tuple(PASSAGES))
    trajectory.generation_s = 1 / 3
    trajectory.finish(reason, error="down" if reason is StopReason.RETRIEVAL_FAILED else "")
    return trajectory


def same(one, other):
    assert math.isnan(one.logprobs[1]) and math.isnan(other.logprobs[1])
    assert [x for x in one.logprobs if x == x] == [x for x in other.logprobs if x == x]
    one.logprobs, other.logprobs = [], []
    return one == other


def write(path, batch, **trajectories):
    journal = Journal(path, batch, resumed=False)
    for index, trajectory in trajectories.items():
        journal.add(int(index[1:]), trajectory)
    journal.close()


def test_a_trajectory_is_read_back_unchanged(tmp_path):
    write(tmp_path / "rank0.jsonl", "a", _3=make_trajectory())
    found = Journal(tmp_path / "rank0.jsonl", "a", resumed=True).finished
    assert list(found) == [3] and same(found[3], make_trajectory())


def test_resumed_trajectories_are_kept_for_the_next_kill(tmp_path):
    path = tmp_path / "rank0.jsonl"
    write(path, "a", _3=make_trajectory())
    second = Journal(path, "a", resumed=True)
    second.add(0, make_trajectory())
    assert sorted(Journal(path, "a", resumed=True).finished) == [0, 3]


@pytest.mark.parametrize(("batch", "resumed"), [("b", True), ("a", False)])
def test_another_batch_and_a_new_run_use_nothing(tmp_path, batch, resumed):
    write(tmp_path / "rank0.jsonl", "a", _0=make_trajectory())
    assert Journal(tmp_path / "rank0.jsonl", batch, resumed=resumed).finished == {}


@pytest.mark.parametrize("cut", [2, 40, 5000])
def test_only_a_truncated_line_is_lost(tmp_path, cut):
    path = tmp_path / "rank0.jsonl"
    write(path, "a", _0=make_trajectory(), _1=make_trajectory())
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(Journal(path, "a", resumed=True).finished) in ([0], [])


def test_a_trajectory_whose_retrieval_failed_is_repeated(tmp_path):
    write(tmp_path / "rank0.jsonl", "a", _0=make_trajectory(StopReason.RETRIEVAL_FAILED))
    assert Journal(tmp_path / "rank0.jsonl", "a", resumed=True).finished == {}


class Page(Passage):
    """A user's subclass of Passage."""


def test_trajectories_that_cannot_be_restored_exactly_are_not_kept(tmp_path, caplog):
    scored, own = make_trajectory(), make_trajectory()
    scored.passages[-1] = (Passage("1", "a", "b", score=np.float32(0.1)),)
    own.passages[-1] = (Page("1", "a", "b"),)
    write(tmp_path / "rank0.jsonl", "a", _0=own, _1=scored, _2=own)
    found = Journal(tmp_path / "rank0.jsonl", "a", resumed=True).finished
    assert list(found) == [1] and same(found[1], scored)
    assert caplog.text.count("Page is not a class of trl_search.types") == 1


def test_a_changed_weight_or_setting_makes_another_batch():
    weights = torch.ones(4, dtype=torch.bfloat16)
    moved = torch.tensor([1, 1, 1, 1.0078125], dtype=torch.bfloat16)
    digests = {batch_digest([weights], "a"), batch_digest([moved], "a"), batch_digest([weights], "b")}
    assert len(digests) == 3 and batch_digest([weights.clone()], "a") in digests


@pytest.mark.parametrize(("retriever", "found"), [("indexes/wiki", [0]), ("indexes/other", [])])
def test_a_run_resumed_with_another_retriever_repeats_its_batch(tmp_path, retriever, found):
    def opened(name, step):
        return open_journal(
            SimpleNamespace(
                model=torch.nn.Linear(2, 2).requires_grad_(False),
                args=SimpleNamespace(output_dir=str(tmp_path), agent=AgentSettings()),
                last_rollout=Rollout(rows=[]),
                run_log=SimpleNamespace(model="tiny", task={"retriever": name}, environment={}),
                accelerator=SimpleNamespace(process_index=0),
                state=SimpleNamespace(global_step=step),
            ),
            Sampling(),
        )

    with opened("indexes/wiki", 4) as journal:
        journal.add(0, make_trajectory())
    with opened(retriever, 4) as journal:
        assert list(journal.finished) == found


class Killed(BaseException):
    """Stands for a kill of the process."""


def test_a_killed_run_is_resumed_in_the_middle_of_its_batch(tmp_path, random_model, tokenizer):
    def script(number, prompt):
        return [search(f"query {number}"), answer(GOLD if number % 2 else "Nobody")]

    def make(folder, **options):
        return scripted_trainer(
            folder, str(tmp_path / "model"), tokenizer, script, rewards=differs, save_strategy="steps", save_steps=1,
            max_steps=2, **options,
        )  # fmt: skip

    def differs(completions, **columns):
        return [float(len(completion[-1]["content"])) for completion in completions]

    random_model.save_pretrained(tmp_path / "model")
    whole = make(tmp_path / "whole")
    whole.train()

    killed = make(tmp_path / "killed")
    generate, asked = killed.actor.generate, []

    async def dying(prompt_ids, **options):
        completion = await generate(prompt_ids, **options)
        if killed.state.global_step == 1 and len(asked) == 5:  # two of four trajectories are finished
            raise Killed
        if killed.state.global_step == 1:
            asked.append(prompt_ids)
        return completion

    killed.actor.generate = dying
    killed.actor.seconds = lambda number: 0.05 * number
    with pytest.raises(Killed):
        killed.train()
    lines = (tmp_path / "killed" / "journal" / "rank0.jsonl").read_text().splitlines()
    done = len(lines) - 1
    assert 0 < done < 4

    resumed = make(tmp_path / "killed")
    # The script numbers the trajectories that run, and the first ones are finished.
    resumed.actor.script = lambda number, prompt: script(number + done, prompt)
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-1"))
    assert len(resumed.actor.said) == 4 - done
    for mine, theirs in zip(resumed.last_rollout.trajectories, whole.last_rollout.trajectories, strict=True):
        assert (mine.ids, mine.mask, mine.actions) == (theirs.ids, theirs.mask, theirs.actions)
    assert steps(resumed)[-1]["loss"] == pytest.approx(steps(whole)[-1]["loss"])
