"""Pass rates: what is counted, the weights that follow, and how checkpoints restore them."""

from __future__ import annotations

import pytest
from datasets import Dataset

from tests.support.scripted_trainer import GOLD, answer, scripted_trainer, steps
from trl_search.common.errors import UserError
from trl_search.trainer.groups.pass_rates import FILE, PassRates
from trl_search.types import Completion, FinishReason, StopReason, Trajectory

DATA = Dataset.from_list([{"question": f"Who wrote book {i}?", "golden_answers": [GOLD]} for i in range(12)])


def ended(text, reason=StopReason.ANSWER):
    trajectory = Trajectory(prompt_ids=(1,))
    trajectory.act(Completion((2,), (-0.1,), FinishReason.EOS), f"<answer> {text} </answer>")
    trajectory.finish(reason)
    return trajectory


RIGHT, WRONG, FAILED = GOLD, "Nobody", None


def visit(rates, number, *answers):
    trajectories = [ended("", StopReason.RETRIEVAL_FAILED) if text is None else ended(text) for text in answers]
    return rates.learn([(DATA[number], trajectories)])


def test_the_weight_of_a_question_without_signal_is_halved_per_visit():
    rates = PassRates(DATA)
    seen = []
    for answers in ((RIGHT, RIGHT), (WRONG, WRONG), (RIGHT, RIGHT), *[(WRONG, WRONG)] * 3, (RIGHT, WRONG)):
        visit(rates, 3, *answers)
        seen.append((rates.weights_N[3], rates.weight_of(DATA[3])))
    assert seen == [(weight, weight) for weight in (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16, 1 / 16, 1)]
    assert sum(rates.weights_N) == 12


def test_trajectories_whose_retrieval_failed_do_not_count():
    rates = PassRates(DATA)
    metrics = visit(rates, 3, FAILED, RIGHT)
    assert (rates.visits["Who wrote book 3?"].solved, rates.visits["Who wrote book 3?"].tried) == (1, 1)
    assert metrics == {"curriculum/known": 1 / 12, "curriculum/never_solved": 0, "curriculum/always_solved": 1}
    visit(rates, 4, FAILED, FAILED)
    assert rates.weight_of(DATA[4]) == 1 and len(rates.visits) == 1


def test_a_pass_rate_column_gives_the_initial_rates():
    rates = PassRates(DATA.add_column("pass_rate", [0.0, 1.0, 0.5, None] * 3))
    assert rates.weights_N.tolist() == [0.5, 0.5, 1, 1] * 3


def test_rates_are_restored_from_a_checkpoint_and_a_broken_file_is_named(tmp_path):
    rates, again = PassRates(DATA), PassRates(DATA)
    visit(rates, 3, RIGHT, RIGHT)
    visit(rates, 5, RIGHT, WRONG)
    rates.save(tmp_path)
    visit(again, 7, WRONG)  # a rollback forgets later results
    again.load(tmp_path)
    assert again.visits == rates.visits and again.weights_N.tolist() == rates.weights_N.tolist()
    (tmp_path / FILE).write_text('{"question": "Who?"}\n')
    with pytest.raises(UserError, match=FILE):
        again.load(tmp_path)


def test_questions_without_golden_answers_are_refused():
    with pytest.raises(UserError, match="golden_answers"):
        PassRates(DATA.remove_columns("golden_answers"))


def test_a_resumed_run_draws_the_same_questions(tmp_path, random_model, tokenizer):
    random_model.save_pretrained(tmp_path / "model")
    shape = {"per_device_train_batch_size": 8, "num_generations": 2, "curriculum": "pass_rate", "data": DATA}

    def make(**options):
        return scripted_trainer(
            tmp_path / "run", str(tmp_path / "model"), tokenizer, lambda *_: [answer(GOLD)], max_steps=5,
            **shape, **options,
        )  # fmt: skip

    whole = make(save_strategy="steps", save_steps=3)
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    questions = [[row["question"] for row in run.last_rollout.rows] for run in (resumed, whole)]
    assert questions[0] == questions[1]  # in the second epoch
    assert resumed.question_choice.pass_rates.visits == whole.question_choice.pass_rates.visits
    # All 12 questions are solved in the first epoch of three steps; in the second, half of them are put back.
    put_back = [log["curriculum/put_back"] for log in steps(whole)]
    assert put_back[:3] == [0, 0, 0] and max(put_back) > 0
