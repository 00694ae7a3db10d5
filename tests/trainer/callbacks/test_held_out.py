"""Evaluation during training and the best checkpoint: questions, logs, checkpoints that are kept, resumed runs."""

from __future__ import annotations

import copy
import json
import os
import shutil

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import make_random_model
from tests.support.fakes import FixedRetriever
from tests.support.scripted_trainer import (
    GOLD,
    PASSAGES,
    ROWS,
    answer,
    four_ways,
    real_trainer,
    scripted_trainer,
    search,
    steps,
)
from tests.support.two_ranks import run_ranks
from trl_search.common.errors import UserError
from trl_search.evaluation.answers_file import Records
from trl_search.trainer.callbacks.best_checkpoint import BestCheckpoint, read_best
from trl_search.trainer.callbacks.held_out import ANSWERS_FOLDER, HELD_OUT_FILE, EvaluateEvery, HeldOut
from trl_search.trainer.resume import is_whole

# Three questions of one set and one of another: the average over sets differs from that over questions.
QUESTIONS = Dataset.from_list(
    [{**row, "id": f"q{i}", "data_source": "small" if i == 0 else "large"} for i, row in enumerate(ROWS[:4])]
)


def held_out_trainer(folder, tokenizer, right, *, every=1, model=None, questions=QUESTIONS, **options):
    """A trainer whose policy answers the first `right(step)` held-out questions correctly, and trains as usual."""
    # The same random weights, in a new model for every trainer.
    trainer = scripted_trainer(folder, model or make_random_model(tokenizer), tokenizer, **options)
    held_out = HeldOut(trainer, questions)
    measuring = [False]
    measure = held_out.measure

    def marked(*args, **kwargs):
        measuring[0] = True
        try:
            return measure(*args, **kwargs)
        finally:
            measuring[0] = False

    def script(number, prompt):
        if not measuring[0]:
            return four_ways(number, prompt)
        asked = next(i for i, row in enumerate(ROWS) if row["question"] in prompt)
        return [search("the author"), answer(GOLD if asked < right(trainer.state.global_step) else "Nobody")]

    held_out.measure = marked
    trainer.actor.script = script
    trainer.add_callback(EvaluateEvery(every, held_out))
    trainer.add_callback(BestCheckpoint(held_out))
    return trainer, held_out


class CountingRetriever(FixedRetriever):
    """Counts the queries since the last `take_metrics`, as `http` does."""

    def take_metrics(self):
        queries = sum(map(len, self.batches))
        self.batches.clear()
        return {"retrieval/requests": float(queries)}


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_the_log_of_a_step_has_every_set_and_their_average(tmp_path, tokenizer):
    options = {"retriever": CountingRetriever(PASSAGES), "max_steps": 4}
    trainer, held_out = held_out_trainer(tmp_path, tokenizer, lambda step: 2, every=2, **options)
    trainer.train()
    rows = steps(trainer)
    assert [row["step"] for row in rows if "eval/em" in row] == [2, 4]
    row = rows[1]
    # q0 of the small set is correct, and one of three in the large set.
    assert row["eval/small/em"] == 1.0 and row["eval/large/em"] == pytest.approx(1 / 3)
    assert row["eval/em"] == pytest.approx((1 + 1 / 3) / 2)
    assert row["eval/searches"] == 1.0 and row["eval/failed"] == 0.0 and row["eval/seconds"] > 0
    assert {"eval/f1", "eval/reflection_ratio"} <= set(row)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written if "eval/em" in line] == [2, 4]
    # The searches of the evaluation are not counted for the training.
    assert {row["retrieval/queries"] for row in rows} == {row["retrieval/requests"] for row in rows} == {3.0}
    assert held_out.ids == {"small": ["q0"], "large": ["q1", "q2", "q3"]}
    assert json.loads((tmp_path / HELD_OUT_FILE).read_text())["ids"] == held_out.ids
    # Every answer is recorded, in the order of the sets.
    kept = Records(tmp_path / ANSWERS_FOLDER, "search", "step_4").read()
    assert sorted((one.id, one.data_source, one.em) for one in kept.values()) == [
        ("q0", "small", 1.0), ("q1", "large", 1.0), ("q2", "large", 0.0), ("q3", "large", 0.0),
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / ANSWERS_FOLDER).iterdir()) == [
        "search-step_2.jsonl", "search-step_4.jsonl",
    ]  # fmt: skip


def test_a_step_that_would_not_be_logged_is_logged_for_its_evaluation(tmp_path, tokenizer):
    trainer, _ = held_out_trainer(tmp_path, tokenizer, lambda s: 1, every=3, max_steps=4, logging_steps=2)
    trainer.train()
    assert [(row["step"], "eval/em" in row) for row in steps(trainer)] == [(2, False), (3, True), (4, False)]


def test_an_evaluation_does_not_change_the_training(tmp_path, random_model, tokenizer):
    results = [make_random_model(tokenizer).state_dict()]
    for every in (0, 1):
        model = make_random_model(tokenizer)
        trainer = real_trainer(tmp_path / str(every), model, tokenizer, max_steps=2)
        if every:
            trainer.add_callback(EvaluateEvery(every, HeldOut(trainer, QUESTIONS)))
        trainer.train()
        assert model.training and len([row for row in steps(trainer) if "eval/em" in row]) == 2 * every
        results.append(model.state_dict())
    start, plain, measured = results
    assert all(torch.equal(plain[name], measured[name]) for name in plain)
    assert any(not torch.equal(plain[name], start[name]) for name in plain)


def test_held_out_prompts_are_those_of_the_training(tmp_path, tokenizer):
    marked = copy.deepcopy(tokenizer)
    marked.chat_template = "{% if marker is defined %}{{ marker }}{% endif %}" + tokenizer.chat_template
    trainer, held_out = held_out_trainer(tmp_path, marked, lambda step: 4, chat_template_kwargs={"marker": "THINK "})
    held_out.measure()
    assert all(marked.decode(asked[0]).startswith("THINK ") for asked in trainer.actor.asked)


def test_the_same_weights_are_evaluated_once(tmp_path, tokenizer):
    trainer, held_out = held_out_trainer(tmp_path, tokenizer, lambda step: 1, max_steps=2)
    trainer.train()
    rollouts = trainer.actor.rollouts
    assert held_out.measure() is held_out.last and trainer.actor.rollouts == rollouts
    assert held_out.measure("direct").average.mode == "direct" and trainer.actor.rollouts == rollouts + 1
    assert held_out.last.average.mode == "search"


def test_without_saving_only_the_best_checkpoint_is_kept(tmp_path, tokenizer):
    curve = {1: 1, 2: 3, 3: 3, 4: 2, 5: 0}
    trainer, _ = held_out_trainer(tmp_path, tokenizer, curve.__getitem__, max_steps=5)
    at_2 = {}
    trainer.add_callback(_copy_at(2, trainer.model, at_2))
    trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-2"]  # of equal ones, the first
    best = tmp_path / "best"
    assert (
        best.is_symlink() and os.readlink(best) == "checkpoint-2"
    )  # a relative link, because the folder may be moved
    assert read_best(tmp_path).step == 2 and read_best(tmp_path).average.em == pytest.approx((1 + 2 / 3) / 2)
    assert read_best(tmp_path).datasets["large"].questions == 3
    model = AutoModelForCausalLM.from_pretrained(best)
    assert all(torch.equal(value, at_2[name]) for name, value in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(best).vocab_size == tokenizer.vocab_size
    assert trainer.state.best_metric == pytest.approx(read_best(tmp_path).average.em)


def test_rotation_keeps_the_best_and_other_checkpoints_stay(tmp_path, tokenizer):
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "max_steps": 7}
    curve = {1: 1, 2: 2, 3: 4, 4: 0, 5: 0, 6: 0, 7: 0}
    trainer, _ = held_out_trainer(tmp_path / "a", tokenizer, curve.__getitem__, **saving)
    trainer.train()
    assert os.readlink(tmp_path / "a" / "best") == "checkpoint-3" and is_whole(tmp_path / "a" / "checkpoint-3")
    assert "checkpoint-3" in checkpoints(tmp_path / "a") and len(checkpoints(tmp_path / "a")) <= 2
    # Without a limit, checkpoints that are saved anyway stay; a former best one that is not is deleted.
    trainer, _ = held_out_trainer(tmp_path / "b", tokenizer, curve.__getitem__, **{**saving, "save_total_limit": None})
    trainer.train()
    assert checkpoints(tmp_path / "b") == [f"checkpoint-{step}" for step in (2, 3, 4, 6, 7)]


def test_a_run_can_be_resumed_from_its_best_checkpoint(tmp_path, tokenizer):
    trainer, _ = held_out_trainer(tmp_path, tokenizer, lambda step: 3 if step == 2 else 1, max_steps=3)
    trainer.train()
    again, _ = held_out_trainer(tmp_path, tokenizer, lambda step: 4 if step == 5 else 2, max_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "best"))
    assert [row["step"] for row in steps(again)] == [1, 2, 3, 4, 5, 6]
    assert os.readlink(tmp_path / "best") == "checkpoint-5" and read_best(tmp_path).average.em == 1.0
    assert checkpoints(tmp_path) == ["checkpoint-5"]


def test_a_run_resumed_from_an_earlier_step_forgets_a_later_best_checkpoint(tmp_path, tokenizer, caplog):
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer, _ = held_out_trainer(tmp_path, tokenizer, lambda step: step, max_steps=3, **saving)
    trainer.train()
    assert os.readlink(tmp_path / "best") == "checkpoint-3"
    again, _ = held_out_trainer(tmp_path, tokenizer, lambda step: 0, max_steps=3, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert os.readlink(tmp_path / "best") == "checkpoint-2" and read_best(tmp_path).step == 2
    fresh, _ = held_out_trainer(tmp_path, tokenizer, lambda step: 1, max_steps=1)
    fresh.train()
    assert "the best checkpoint of another run" in caplog.text
    assert os.readlink(tmp_path / "best") == "checkpoint-1"


def test_an_incomplete_checkpoint_is_never_the_best(tmp_path, tokenizer):
    trainer, _ = held_out_trainer(tmp_path, tokenizer, lambda step: step, max_steps=3)
    save = trainer._save_optimizer_and_scheduler

    def breaks(folder):
        if folder.endswith("checkpoint-2"):
            raise OSError("no space left on device")
        save(folder)

    trainer._save_optimizer_and_scheduler = breaks
    with pytest.raises(OSError, match="no space"):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists() and not is_whole(tmp_path / "checkpoint-2")
    assert os.readlink(tmp_path / "best") == "checkpoint-1" and is_whole(tmp_path / "best")


def test_a_deleted_best_checkpoint_is_replaced_by_the_next_best(tmp_path, tokenizer):
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer, _ = held_out_trainer(tmp_path, tokenizer, lambda s: 4 if s == 1 else 1, max_steps=2, **saving)
    trainer.train()
    shutil.rmtree(tmp_path / "checkpoint-1")
    again, _ = held_out_trainer(tmp_path, tokenizer, lambda step: 2, max_steps=3, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert os.readlink(tmp_path / "best") == "checkpoint-3"  # worse than the deleted one, but the best that is left


def test_with_lora_the_best_checkpoint_contains_the_adapter(tmp_path, random_model, tokenizer):
    from peft import AutoPeftModelForCausalLM, LoraConfig

    random_model.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft = {"peft_config": LoraConfig(r=2, target_modules="all-linear")}
    trainer, _ = held_out_trainer(
        tmp_path / "run", tokenizer, lambda step: 2 - step, max_steps=2, trainer=peft, model=base
    )
    trainer.train()
    assert os.readlink(tmp_path / "run" / "best") == "checkpoint-1"
    assert (tmp_path / "run" / "best" / "adapter_model.safetensors").exists()
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "best")


def test_failed_searches_are_not_wrong_answers_and_give_no_best_checkpoint(tmp_path, tokenizer, caplog):
    retriever = FixedRetriever(PASSAGES, poison="of 2")
    trainer, _ = held_out_trainer(tmp_path, tokenizer, lambda step: 4, retriever=retriever, max_steps=1)
    script = trainer.actor.script
    trainer.actor.script = lambda number, prompt: (
        [search("the author of 2"), ""] if "book 2" in prompt else script(number, prompt)
    )
    trainer.train()
    row = steps(trainer)[0]
    assert row["eval/em"] == 1.0 and row["eval/failed"] == 0.25
    assert "the search failed for 1 of 4 held-out questions" in caplog.text and "the index is on fire" in caplog.text
    assert not (tmp_path / "best").exists() and read_best(tmp_path) is None


def test_resuming_with_other_questions_is_refused(tmp_path, tokenizer):
    trainer, _ = held_out_trainer(tmp_path, tokenizer, lambda step: 1, max_steps=1)
    trainer.train()
    other, _ = held_out_trainer(tmp_path, tokenizer, lambda step: 1, questions=QUESTIONS.select([0, 1]), max_steps=2)
    with pytest.raises(UserError, match="evaluated on other questions so far"):
        other.train(resume_from_checkpoint=str(tmp_path / "best"))
    assert len(json.loads((tmp_path / HELD_OUT_FILE).read_text())["ids"]["large"]) == 3


def test_bad_input_is_refused_before_anything_runs(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(tmp_path, random_model, tokenizer)
    with pytest.raises(UserError, match="lack the columns data_source, id"):
        HeldOut(trainer, Dataset.from_list(ROWS))
    with pytest.raises(UserError, match="no held-out questions"):
        HeldOut(trainer, QUESTIONS.select([]))
    with pytest.raises(UserError, match="evaluate_every=-1 must be at least 1"):
        EvaluateEvery(-1, HeldOut(trainer, QUESTIONS))
    trainer.args.metric_for_best_model = "reward"
    with pytest.raises(UserError, match="both choose the best checkpoint"):
        BestCheckpoint(HeldOut(trainer, QUESTIONS))
    (tmp_path / "best").mkdir()
    other, _ = held_out_trainer(tmp_path, tokenizer, lambda step: 1)
    with pytest.raises(UserError, match="best exists, but the link"):
        other.train()


@pytest.mark.slow
def test_two_ranks_share_the_questions_and_keep_one_best_checkpoint(tmp_path, random_model, tokenizer):
    random_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run_ranks("tests.support.held_out_run", [str(tmp_path)], tmp_path)
    one, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    # Each rank evaluated its share (three and two of five questions), and both know the whole result.
    assert (one.pop("asked"), other.pop("asked")) == ([3, 3, 3], [2, 2, 2])
    assert one == other and [row["eval/em"] for row in one["history"]] == [0.2, 0.8, 0.4]
    assert os.readlink(tmp_path / "run" / "best") == "checkpoint-2"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (tmp_path / "run" / "best").iterdir()}
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]


def _copy_at(step, model, copies):
    from transformers import TrainerCallback

    class Copy(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                copies.update({name: value.clone() for name, value in model.state_dict().items()})

    return Copy()
