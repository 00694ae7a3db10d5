"""The line of a step: what is there is shown, what is not is left out."""

from __future__ import annotations

from types import SimpleNamespace

from trl_search.trainer.callbacks.progress import StepLines, step_line


def test_a_line_shows_what_was_logged():
    line = step_line(3, 12, {"reward": 0.5, "kl": None, "search/searches": 0.72, "step_time": 5.1, "other": 1})
    assert line == "step  3/12  reward 0.500  searches 0.720  seconds 5.10"


def test_only_steps_are_lines_and_only_of_the_main_process(capsys):
    for is_main, logs in ((True, {"loss": 0.1, "reward": 1.0}), (True, {"eval_loss": 1.0}), (False, {"loss": 0.1})):
        state = SimpleNamespace(is_world_process_zero=is_main, global_step=1, max_steps=2)
        StepLines().on_log(None, state, None, logs=logs)
    assert capsys.readouterr().out == "step 1/2  reward 1.00  loss 0.100\n"
