"""The line of a step shows the metrics that were logged."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import sys
import termios
from types import ModuleType, SimpleNamespace

import pytest
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from trl_search.trainer.callbacks import progress
from trl_search.trainer.callbacks.progress import StepLines, announce, counted, show_steps, step_line, step_table


def test_a_line_shows_what_was_logged():
    line = step_line(3, 12, {"reward": 0.5, "kl": None, "search/searches": 0.72, "step_time": 5.1, "other": 1})
    assert line == "step  3/12  reward 0.500  searches 0.720  seconds 5.10"
    large = step_line(3, 12, {"loss": -1.5e-6, "tokens/model": 1520.4, "entropy": 99.96, "step_time": 173.2})
    assert large == "step  3/12  loss -1.50e-06  tokens 1,520  entropy 100  seconds 173"


def test_a_heading_counts_one_step_and_several_questions():
    assert f"{counted(1, 'step')} on {counted(1500, 'question')}" == "1 step on 1,500 questions"


def test_only_steps_print_lines_and_only_in_the_main_process(capsys):
    for is_main, logs in ((True, {"loss": 0.1, "reward": 1.0}), (True, {"eval_loss": 1.0}), (False, {"loss": 0.1})):
        state = SimpleNamespace(is_world_process_zero=is_main, global_step=1, max_steps=2)
        StepLines().on_log(None, state, None, logs=logs)
    assert capsys.readouterr().out == "step 1/2  reward 1.00  loss 0.100\n"


def test_an_evaluation_by_trl_prints_its_reward(capsys):
    state = SimpleNamespace(is_world_process_zero=True, global_step=1, max_steps=2)
    for name in ("eval_reward", "eval_nq_reward"):
        StepLines().on_log(None, state, None, logs={"eval_loss": 0.0, name: 0.5, f"{name}_std": 0.1})
    assert capsys.readouterr().out.splitlines() == [
        "step 1/2  held-out reward 0.500", "step 1/2  held-out reward nq 0.500"
    ]  # fmt: skip


def drawn(output: int, source: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The stderr of a training of ten steps that logs none of them."""
    state = TrainerState(max_steps=10)
    with os.fdopen(output, "w") as stderr, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stderr)
        bar = StepLines()
        bar.on_train_begin(None, state, None)
        bar.training_bar.mininterval = 0  # every step is drawn, like steps that take a second
        for state.global_step in range(1, 11):
            bar.on_step_end(None, state, None)
        bar.on_train_end(None, state, None)
        stderr.write("end")
        stderr.flush()
        written = ""
        while not written.endswith("end"):
            written += os.read(source, 100_000).decode()
    os.close(source)
    return written.removesuffix("end")


@pytest.mark.parametrize("size", [(40, 100), (0, 0)], ids=["known size", "unknown size"])
def test_a_terminal_shows_a_bar_between_the_lines(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = pty.openpty()
    fcntl.ioctl(output, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    written = drawn(output, source, monkeypatch)
    assert all(f"| {step}/10 [" in written for step in range(11))


def test_without_a_terminal_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = os.pipe()
    assert drawn(output, source, monkeypatch) == ""


def test_without_a_terminal_an_evaluation_has_no_bar_either(capsys: pytest.CaptureFixture[str]) -> None:
    lines, state = StepLines(), TrainerState(max_steps=10)
    for event in (lines.on_train_begin, lines.on_prediction_step, lines.on_evaluate):
        event(None, state, None, eval_dataloader=[1, 2])
    assert capsys.readouterr().err == ""


def test_a_minimal_stderr_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example one that copies everything to a file."""
    written: list[str] = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append, flush=lambda: None))
    StepLines().on_train_begin(None, TrainerState(max_steps=10), None)
    assert "0/10" in "".join(written)


class Shower:
    """The methods of a trainer that `show_steps` uses."""

    def __init__(self, *, disable_tqdm: bool) -> None:
        self.args = SimpleNamespace(disable_tqdm=disable_tqdm)
        self.shown: list[object] = [PrinterCallback() if disable_tqdm else ProgressCallback()]

    def remove_callback(self, kind: type) -> None:
        self.shown = [one for one in self.shown if type(one) is not kind]

    def add_callback(self, one: object) -> None:
        self.shown.append(one)


def test_a_script_gets_the_same_lines_and_can_turn_them_off() -> None:
    trainer = Shower(disable_tqdm=False)
    show_steps(trainer)  # type: ignore[arg-type]
    assert [type(one) for one in trainer.shown] == [StepLines]
    quiet = Shower(disable_tqdm=True)
    show_steps(quiet)  # type: ignore[arg-type]
    assert [type(one) for one in quiet.shown] == [PrinterCallback]


def test_a_notebook_gets_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[str] = []
    display = ModuleType("IPython.display")
    display.HTML = str  # type: ignore[attr-defined]
    output = SimpleNamespace(update=pages.append)
    display.display = lambda page, **_: pages.append(page) or output  # type: ignore[attr-defined]
    ipython = ModuleType("IPython")
    ipython.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    monkeypatch.setattr(progress, "is_in_notebook", lambda: True)
    trainer = Shower(disable_tqdm=False)
    show_steps(trainer)  # type: ignore[arg-type]
    table, args = trainer.shown[-1], SimpleNamespace(eval_strategy="no")
    assert type(table).__name__ == type(step_table()).__name__ == "StepTable"
    state = TrainerState(global_step=1, max_steps=2, epoch=0.5, num_train_epochs=1)
    table.on_train_begin(args, state, None)
    for step, logs in ((1, {"loss": 0.25, "reward": 0.5}), (2, {"loss": 0.125, "reward": 1.0, "alarm/entropy": 1})):
        state.global_step = step
        table.on_log(args, state, None, logs=logs)
        table.on_step_end(args, state, None)
    assert all(word in pages[-1] for word in ("reward", "0.500", "1.00", "0.125"))
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook")


def test_a_phase_has_a_heading(capsys: pytest.CaptureFixture[str]) -> None:
    announce("GRPO", "12 steps on [1,500] questions")
    assert capsys.readouterr().out == "\n── GRPO: 12 steps on [1,500] questions\n"
