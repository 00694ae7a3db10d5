"""Pitfall 14: collapse is named in the log. The histories are those of the runs in docs/results.md."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from trl_search.alarms import WINDOW, CollapseAlarm, find_collapse

HISTORIES = json.loads((Path(__file__).parent / "data" / "histories.json").read_text())


def first_alarms(history):
    steps = {}
    for length in range(1, len(history) + 1):
        for metric in find_collapse(history[:length]):
            steps.setdefault(metric, length)
    return steps


@pytest.mark.parametrize("seed", range(3))
def test_healthy_runs_raise_no_alarm(seed):
    history = HISTORIES[f"search_masked_{seed}"]
    assert len(history) == 40 and first_alarms(history) == {}


def test_a_learning_rate_that_collapses_is_seen_within_ten_steps():
    steps = first_alarms(HISTORIES["learning_rate_x_10_0"])
    assert {"search/searches", "search/malformed_calls", "entropy", "frac_reward_zero_std"} <= set(steps)
    assert min(steps.values()) <= WINDOW and max(steps.values()) < 10


def test_a_policy_that_gives_up_searching_is_seen_though_its_reward_is_full():
    history = HISTORIES["format_reward_alone_0"]
    assert set(first_alarms(history)) == {"search/searches"} and history[-1]["reward"] == 1.0


def test_the_reference_running_away_is_seen():
    assert "kl" in find_collapse([{"kl": 2.0, "loss": 0.0}] * WINDOW)
    assert find_collapse([{"kl": 0.05, "loss": 0.0}] * WINDOW) == {}


def test_missing_metrics_and_short_histories_are_silent():
    assert find_collapse([]) == find_collapse([{"loss": 1.0}] * 20) == {}
    assert find_collapse([{"reward": None, "search/searches": None}] * 20) == {}


def test_each_alarm_is_told_once_and_only_by_the_main_process(caplog):
    for is_main in (False, True):
        caplog.clear()
        alarm = CollapseAlarm()
        for row in HISTORIES["learning_rate_x_10_0"]:
            alarm.on_log(None, SimpleNamespace(global_step=row["step"], is_world_process_zero=is_main), None, logs=row)
        assert len(caplog.records) == (len(first_alarms(HISTORIES["learning_rate_x_10_0"])) if is_main else 0)
    assert "step 5: 0.61 malformed calls" in caplog.text and "Look at its completions" in caplog.text
