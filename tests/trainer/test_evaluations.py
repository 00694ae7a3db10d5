"""`evaluate` and `predict` of a trainer, called by a script in any order."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from tests.support.scripted_trainer import DATA, ROWS, later_is_better, real_trainer, scripted_trainer, steps
from trl_search.common.errors import UserError

WRONG = Dataset.from_list([{**row, "golden_answers": ["Nobody"]} for row in ROWS[:2]])
NONE = Dataset.from_list([{**row, "golden_answers": ["somebody else"]} for row in ROWS[:2]])


def last_em(trainer: Any) -> float:
    return [log for log in trainer.state.log_history if "eval_rewards/em/mean" in log][-1]["eval_rewards/em/mean"]


def test_a_prediction_returns_its_metrics_and_leaves_none_to_the_next_evaluation(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(tmp_path, random_model, tokenizer)
    assert trainer.predict(NONE).metrics["test_rewards/em/mean"] == 0.0
    trainer.evaluate(WRONG)
    assert last_em(trainer) == 0.5
    assert trainer.predict(WRONG, metric_key_prefix="late").metrics["late_search/searches"] == 0.75


def test_an_interrupted_evaluation_leaves_nothing_to_the_next(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(tmp_path, random_model, tokenizer, per_device_eval_batch_size=4)
    run, calls = trainer.prediction_step, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    trainer.prediction_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate(NONE)
    trainer.prediction_step = run
    trainer.evaluate(WRONG)
    assert last_em(trainer) == 0.5


def test_streams_are_predicted_in_groups(tmp_path, random_model, tokenizer):
    trainer = real_trainer(tmp_path, random_model, tokenizer)
    assert "test_reward" in trainer.predict(DATA.to_iterable_dataset()).metrics
    asked = [row["question"] for row in trainer.last_rollout.rows]
    assert len(asked) == 8 and len(set(asked[:4])) == len(set(asked[4:])) == 1


def test_with_persistent_workers_each_dataset_is_evaluated(tmp_path, random_model, tokenizer):
    trainer = real_trainer(
        tmp_path, random_model, tokenizer, dataloader_num_workers=1, dataloader_persistent_workers=True
    )
    for first in (0, 2):
        trainer.evaluate(DATA.select([first, first + 1]))
        assert {row["question"] for row in trainer.last_rollout.rows} == {
            ROWS[first]["question"], ROWS[first + 1]["question"]
        }  # fmt: skip


@pytest.mark.parametrize("call", ["evaluate", "predict"])
def test_what_would_fail_after_the_rollout_is_refused_before_it(tmp_path, random_model, tokenizer, call):
    trainer = real_trainer(tmp_path, random_model, tokenizer, per_device_train_batch_size=16, num_generations=16)
    with pytest.raises(
        UserError, match=r"batch has 8 trajectories .* set per_device_eval_batch_size to a multiple of 16"
    ):
        getattr(trainer, call)(DATA)

    def by_year(completions: Any, year: list[int], **kwargs: Any) -> list[float]:
        return later_is_better(completions)

    dated = DATA.add_column("year", [1900] * len(DATA))
    trainer = real_trainer(tmp_path, random_model, tokenizer, data=dated, rewards=by_year)
    assert getattr(trainer, call)(dated)
    with pytest.raises(
        UserError, match=r"'by_year' cannot be called with the columns of .*_dataset: missing .* 'year'"
    ):
        getattr(trainer, call)(DATA)
    assert not trainer.last_rollout.rows or trainer.last_rollout.rows[0]["year"] == 1900


def test_each_question_weighs_the_same_in_the_means(tmp_path, random_model, tokenizer):
    """Batches of two questions: the third is alone in its batch."""

    def by_book(completions: Any, question: list[str], **kwargs: Any) -> list[float]:
        return [float(text == ROWS[2]["question"]) for text in question]

    trainer = real_trainer(tmp_path, random_model, tokenizer, rewards=by_book)
    for call in (
        lambda rows: trainer.evaluate(rows)["eval_reward"],
        lambda rows: trainer.predict(rows).metrics["test_reward"],
    ):
        assert call(DATA.select(range(3))) == pytest.approx(1 / 3)
        assert call(DATA.select(range(4))) == pytest.approx(1 / 4)


def test_the_mean_of_a_reward_weighs_the_trajectories_that_have_it(tmp_path, random_model, tokenizer):
    """Batches of two questions: the first of the first batch has no reward."""

    def for_some(completions: Any, question: list[str], **kwargs: Any) -> list[float | None]:
        values = {ROWS[0]["question"]: None, ROWS[1]["question"]: 1.0}
        return [values.get(text, 0.0) for text in question]

    trainer = real_trainer(tmp_path, random_model, tokenizer, rewards=for_some)
    for rows, mean in ((DATA.select(range(4)), 1 / 3), (DATA.select([2, 3, 0]), 0.0), (DATA.select([0, 0, 1]), 1.0)):
        metrics = trainer.evaluate(rows)
        assert metrics["eval_reward"] == metrics["eval_rewards/for_some/mean"] == pytest.approx(mean)


def test_a_batch_that_is_scored_after_an_evaluation_has_rewards(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(tmp_path, random_model, tokenizer)
    trainer.evaluate(DATA.select(range(2)))
    trainer.model.eval()
    trainer._generate_and_score_completions([trainer.train_dataset[0]] * 4)
    assert not trainer.last_rollout.rewards_RF.isnan().any()


def test_the_metrics_of_several_sets_have_their_names(tmp_path, random_model, tokenizer, capsys):
    lines: list[str] = []

    class Listens(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            lines.extend(name for name in logs if name.endswith("_reward"))

    two = {"right": DATA.select(range(2)), "wrong": WRONG}
    trainer = scripted_trainer(tmp_path, random_model, tokenizer, rewards="em", trainer={"eval_dataset": two})
    trainer.add_callback(Listens())
    metrics = trainer.evaluate()
    assert metrics["eval_right_reward"] == metrics["eval_right_rewards/em/mean"] == 0.5
    assert lines == ["eval_right_reward", "eval_wrong_reward"] and "eval_reward" not in metrics
    assert {"eval_right_search/searches", "eval_wrong_completions/mean_length"} <= metrics.keys()
    assert "near_reward" in trainer.evaluate(WRONG, metric_key_prefix="near")


def test_the_best_checkpoint_is_chosen_by_one_of_several_sets(tmp_path, random_model, tokenizer):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "reward"}
    best |= dict.fromkeys(("eval_strategy", "save_strategy"), "steps")
    best |= dict.fromkeys(("eval_steps", "save_steps", "max_steps"), 1)
    two = {"near": DATA.select(range(2)), "far": DATA.select(range(2))}
    with pytest.raises(
        UserError, match=r"names none of the evaluation sets.*such as eval_near_reward, eval_far_reward"
    ):
        real_trainer(tmp_path, random_model, tokenizer, trainer={"eval_dataset": two}, **best)
    for given, metric, remedy in (
        (two["near"], "rewards/later_is_better", "eval_rewards/later_is_better/mean"),
        (two, "near_later_is_better", "eval_near_rewards/later_is_better/mean"),
    ):
        options = {**best, "metric_for_best_model": metric}
        with pytest.raises(UserError, match=rf"{metric} is a reward, not a metric: set it to {remedy}$"):
            real_trainer(tmp_path, random_model, tokenizer, trainer={"eval_dataset": given}, **options)

    def reward(completions: Any, **kwargs: Any) -> list[float]:
        return later_is_better(completions)

    real_trainer(tmp_path, random_model, tokenizer, rewards=reward, trainer={"eval_dataset": two["near"]}, **best)
    for given, metric in ((two["near"], "reward"), (two, "eval_near_reward"), (two, "far_reward")):
        one = {"eval_dataset": given}
        trainer = real_trainer(
            tmp_path, random_model, tokenizer, trainer=one, **{**best, "metric_for_best_model": metric}
        )
        trainer.train()
        assert trainer.state.best_metric == 3.5 and trainer.state.best_model_checkpoint


@pytest.mark.parametrize("call", ["evaluate", "predict"])
def test_a_step_in_which_a_callback_evaluates_is_logged_whole(tmp_path, random_model, tokenizer, call):
    class Evaluates(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            getattr(trainer, call)(DATA.select(range(2)))

    trainer = real_trainer(tmp_path, random_model, tokenizer)
    trainer.add_callback(Evaluates())
    trainer.train()
    assert [entry["reward"] for entry in steps(trainer)] == [1.5, 1.5]
