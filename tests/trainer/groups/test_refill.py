"""Groups without a gradient are replaced: the batch keeps its shape, and TRL reads only the new questions."""

from __future__ import annotations

import asyncio
import re
import threading

import pytest
import torch
from datasets import Dataset, IterableDataset

from tests.support.fakes import FixedRetriever
from tests.support.scripted_trainer import GOLD, PASSAGES, answer, config, scripted_trainer, search, steps
from trl_search.common.errors import UserError
from trl_search.records.folder import read_run, read_trajectories
from trl_search.trainer.batch import Question, Rollout
from trl_search.trainer.groups import question_choice
from trl_search.trainer.groups.group_rewards import Group
from trl_search.trainer.groups.refill import Refill
from trl_search.types import StopReason, Trajectory

pytestmark = pytest.mark.slow

QUESTIONS = 120
DATA = Dataset.from_list(
    [{"question": f"Who wrote book {i}?", "golden_answers": [GOLD], "id": str(i)} for i in range(QUESTIONS)]
)


def book(prompt):
    return int(re.search(r"Who wrote book (\d+)\?", prompt)[1])


def half_are_useful(number, prompt):
    """For an even book, every second trajectory knows the author; for an odd one, none or all do."""
    number_of_book = book(prompt)
    right = number % 2 == 0 if number_of_book % 2 == 0 else number_of_book % 4 == 1
    return [answer(GOLD if right else "Nobody")]


def make(folder, model, tokenizer, script=half_are_useful, **options):
    defaults = {"per_device_train_batch_size": 8, "num_generations": 2, "refill_groups": 20, "data": DATA}
    return scripted_trainer(folder, model, tokenizer, script, **{**defaults, **options})


def asked(trainer):
    return [book(row["question"]) for row in trainer.last_rollout.rows]


def test_every_group_of_the_batch_has_a_gradient_and_its_shape_stays(tmp_path, random_model, tokenizer):
    trainer = make(tmp_path, random_model, tokenizer, max_steps=2)
    plain = make(tmp_path / "plain", random_model, tokenizer, max_steps=1, refill_groups=0)
    trainer.train()
    plain.train()
    assert len(asked(trainer)) == 8 and not [number for number in asked(trainer) if number % 2]
    assert asked(trainer)[::2] == asked(trainer)[1::2]
    for log in steps(trainer):
        assert log["refill/gradient_after"] == 1 > log["refill/gradient_before"]
        assert log["frac_reward_zero_std"] == 0 and log["reward"] == 0.5
        assert log["refill/extra_trajectories"] >= 2 and 1 <= log["refill/rounds"] <= 20
    assert steps(plain)[0]["frac_reward_zero_std"] == 1 - steps(trainer)[0]["refill/gradient_before"]
    assert steps(plain)[0]["reward"] == steps(trainer)[0]["refill/reward_before"]
    assert "refill/rounds" not in steps(plain)[0]


def test_the_loss_reads_the_questions_that_were_kept(tmp_path, random_model, tokenizer):
    trainer = make(tmp_path, random_model, tokenizer)
    batch = trainer.score(list(DATA.select([1, 1, 2, 2]).map(lambda row: {"prompt": [user(row)]})))
    assert asked(trainer)[2:] == [2, 2] and asked(trainer)[0] % 2 == 0
    for row, prompt_ids in zip(trainer.last_rollout.rows, batch["prompt_ids"], strict=True):
        assert row["question"] in tokenizer.decode(prompt_ids)
    in_loss = sum(sum(t.mask) for t in trainer.last_rollout.trajectories)
    assert int(batch["num_items_in_batch"]) == in_loss == int((batch["completion_mask"] * batch["tool_mask"]).sum())
    assert (batch["advantages"].abs() > 0.1).all()
    assert list(trainer._logs["prompt"]) == [row["prompt"] for row in trainer.last_rollout.rows]


def test_reward_functions_find_the_gpu_of_their_process(tmp_path, random_model, tokenizer, monkeypatch):
    """They run in a thread, which would start on GPU 0."""
    seen = []
    monkeypatch.setattr(question_choice, "use_device", lambda device: seen.append((threading.get_ident(), device)))

    def rewards(completions, **kwargs):
        assert seen[-1] == (threading.get_ident(), torch.device("cpu"))
        return [float(i) for i in range(len(completions))]

    rows = list(DATA.select([1, 1, 2, 2]).map(lambda row: {"prompt": [user(row)]}))
    make(tmp_path, random_model, tokenizer, rewards=rewards).score(rows)
    assert len(seen) == 2 and threading.main_thread().ident not in dict(seen)


def user(row):
    return {"role": "user", "content": row["question"]}


def test_after_the_last_round_every_group_is_kept(tmp_path, random_model, tokenizer):
    trainer = make(tmp_path, random_model, tokenizer, lambda *_: [answer(GOLD)], refill_groups=2, max_steps=1)
    trainer.train()
    log = steps(trainer)[0]
    assert (log["refill/gradient_after"], log["refill/extra_trajectories"], log["refill/rounds"]) == (0, 16, 2)


def test_if_all_groups_have_a_gradient_nothing_changes(tmp_path, random_model, tokenizer):
    def useful(number, prompt):
        return [answer(GOLD if number % 2 else "Nobody")]

    random_model.save_pretrained(tmp_path / "model")
    runs = []
    for rounds in (0, 3):
        runs.append(make(tmp_path / str(rounds), str(tmp_path / "model"), tokenizer, useful, refill_groups=rounds))
        runs[-1].train()
    assert [log["loss"] for log in steps(runs[0])] == [log["loss"] for log in steps(runs[1])]
    for mine, theirs in zip(*(run.model.state_dict().values() for run in runs), strict=True):
        assert torch.equal(mine, theirs)


def test_a_group_is_replaced_while_others_still_run(tmp_path, random_model, tokenizer):
    """The first trajectory waits for a question that was not in the original batch."""
    trainer = make(tmp_path, random_model, tokenizer)
    rows = list(DATA.select([2, 2, 1, 1]).map(lambda row: {"prompt": [user(row)]}))
    generate, others = trainer.actor.generate, asyncio.Event()

    async def waiting(prompt_ids, **options):
        if book(tokenizer.decode(list(prompt_ids))) not in (1, 2):
            others.set()
        elif book(tokenizer.decode(list(prompt_ids))) == 2:
            await asyncio.wait_for(others.wait(), 60)
        return await generate(prompt_ids, **options)

    trainer.actor.generate = waiting
    trainer.score(rows)
    assert others.is_set() and asked(trainer)[:2] == [2, 2]


def test_trajectories_of_a_refill_that_a_killed_process_finished_are_not_repeated():
    def score(rows, trajectories):
        rewards = torch.tensor([[float(row["question"] == "useful")] for row in rows])
        return Group(rows, trajectories, rewards, bool(rewards.any()), {}, {})

    def ended():
        trajectory = Trajectory(prompt_ids=(1,))
        trajectory.finish(StopReason.ANSWER)
        return trajectory

    spare = [[Question({"question": word}, (2, number))] for number, word in enumerate(("useless", "useful", "spare"))]
    batch = Rollout(rows=[{"question": "first"}] * 2, prompt_ids=[(1,)] * 2, spare=spare)
    batch.trajectories, before = [ended(), ended()], ended()

    async def run():
        refill = Refill(batch, group_size=2, score=score, finished={3: before})
        assert await refill.more(1, batch.trajectories[1]) == {}
        second = await refill.more(0, batch.trajectories[0])
        assert list(second) == [2, 3] and second[2].finished is None and second[3].finished is before
        assert second[2].prompt == (2, 0) and [second[n].key for n in (2, 3)] == ["2", "3"]
        await refill.more(3, before)
        third = await refill.more(2, ended())
        assert [job.row["question"] for job in third.values()] == ["useful"] * 2
        await refill.more(4, ended())
        assert await refill.more(5, ended()) == {}
        refill.settle()

    asyncio.run(run())
    assert [row["question"] for row in batch.rows] == ["useful"] * 2
    assert [group.rows[0]["question"] for group in batch.replaced[0]] == ["first", "useless"]


def test_groups_whose_retrieval_failed_are_replaced_and_counted(tmp_path, random_model, tokenizer):
    def script(number, prompt):
        words = "poison" if book(prompt) % 2 else "author"
        return [search(words), answer(GOLD if number % 2 else "Nobody")]

    retriever = FixedRetriever(PASSAGES, poison="poison")
    trainer = make(tmp_path, random_model, tokenizer, script, retriever=retriever, max_failed_share=0.9, max_steps=1)
    trainer.train()
    assert all(number % 2 == 0 for number in asked(trainer))
    strict = make(tmp_path, random_model, tokenizer, script, retriever=retriever, max_failed_share=0.1, max_steps=1)
    with pytest.raises(RuntimeError, match="max_failed_share"):
        strict.train()


def test_rewards_and_their_logs_are_those_of_the_kept_groups_in_order(tmp_path, random_model, tokenizer):
    calls = []

    async def judged(prompts, completions, question, log_extra, log_metric, trainer_state, **columns):
        assert [prompt[-1]["content"] for prompt in prompts] == question
        calls.append(len(completions))
        log_extra("book", [book(text) for text in question])
        log_metric("books", float(book(question[0])))
        return [1.0 if GOLD in completion[-1]["content"] else 0.0 for completion in completions]

    def plain(completions, **columns):
        return [2.0 if GOLD in completion[-1]["content"] else None for completion in completions]

    trainer = make(tmp_path, random_model, tokenizer, rewards=[judged, plain], max_steps=1)
    trainer.train()
    assert set(calls) == {2} and len(calls) > 4  # called once per group
    assert list(trainer._logs["extra"]["book"])[-8:] == asked(trainer)
    assert steps(trainer)[0]["books"] == pytest.approx(sum(asked(trainer)) / 8)
    whole = super(type(trainer), trainer)._calculate_rewards  # TRL's own computation over the final batch
    batch = trainer.last_rollout
    kept, batch.groups = batch.groups, []
    again = whole(
        batch.rows, [row["prompt"] for row in batch.rows], [t.messages for t in batch.trajectories],
        [t.ids for t in batch.trajectories],
    )  # fmt: skip
    torch.testing.assert_close(again, torch.cat([group.rewards_GF for group in kept]), equal_nan=True)


def test_the_search_floor_applies_before_groups_are_replaced(tmp_path, random_model, tokenizer):
    """All answers are correct; only trajectories that searched keep their reward, so their groups have a gradient."""

    def script(number, prompt):
        searches = book(prompt) % 2 == 0 and number % 2 == 0
        return [*([search("author")] if searches else []), answer(GOLD)]

    trainer = make(tmp_path, random_model, tokenizer, script, search_floor_steps=1, max_steps=1)
    trainer.train()
    assert steps(trainer)[0]["refill/gradient_after"] == 1 and not [n for n in asked(trainer) if n % 2]


def test_replaced_trajectories_are_recorded_with_a_flag_and_no_mask(tmp_path, random_model, tokenizer):
    trainer = make(tmp_path, random_model, tokenizer, max_steps=1)
    trainer.train()
    run = read_run(tmp_path)
    rows = read_trajectories(run).to_pylist()
    kept = [row for row in rows if not row["replaced"]]
    others = [row for row in rows if row["replaced"]]
    assert run.problems == [] and [row["index"] for row in kept] == list(range(8))
    assert len(others) == steps(trainer)[0]["refill/extra_trajectories"]
    assert all(book(row["question"]) % 2 == 1 and row["reward"] in (0, 1) for row in others)
    assert all(not any(row["mask"]) and row["advantage"] == 0 for row in others)


def test_the_same_questions_are_drawn_after_a_resume(tmp_path, random_model, tokenizer):
    random_model.save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    whole = make(tmp_path / "a", model, tokenizer, max_steps=2, save_strategy="steps", save_steps=1)
    whole.train()
    resumed = make(tmp_path / "a", model, tokenizer, max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert asked(resumed) == asked(whole)
    assert steps(resumed)[-1]["loss"] == pytest.approx(steps(whole)[-1]["loss"])


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"refill_groups": -1}, "at least 0"),
        (
            {"data": IterableDataset.from_generator(lambda: iter(DATA))},
            "draws questions at random, which IterableDataset",
        ),
        ({"data": DATA.select(range(4))}, "needs more questions than the 4"),
        ({"trainer": {"retriever": None}}, "needs our rollouts"),
    ],
)
def test_incompatible_options_are_refused_by_name(tmp_path, random_model, tokenizer, options, cause):
    with pytest.raises((UserError, ValueError), match=cause):
        make(tmp_path, random_model, tokenizer, **options)


def test_refill_is_off_by_default(tmp_path):
    assert config(tmp_path).refill_groups == 0 and config(tmp_path).curriculum == "none"
