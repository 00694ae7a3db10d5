"""Pitfall 14: the log and the trackers name a collapse. The histories come from real runs: see
benchmarks/alarms.py and docs/monitoring.md."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState

from benchmarks.alarms import HISTORIES, condition, first_alarms, table
from tests.support.scripted_trainer import scripted_trainer, steps
from trl_search.trainer.callbacks.alarms import DRIFT, RULES, STOP_AFTER, WINDOW, CollapseAlarm, Watch, is_training_log
from trl_search.trainer.callbacks.progress import step_line

DOCS = Path(__file__).parents[3] / "docs"
RUNS = json.loads(HISTORIES.read_text())
HEALTHY = [name for name in RUNS if name.startswith(("search_masked", "healthy"))]
GOOD = {
    "loss": 0.1, "grad_norm": 1.0, "reward": 0.6, "reward_std": 0.4, "frac_reward_zero_std": 0.3, "entropy": 0.2,
    "kl": 0.01, "search/searches": 1.8, "tools/calls": 0.5, "search/turns": 2.8, "search/malformed_calls": 0.0,
    "search/duplicate_tags": 0.0, "stop/answer": 0.95, "search/no_answer": 0.05, "search/quoted_queries": 0.4,
    "search/repeated_queries": 0.1, "tokens/per_turn": 80.0, "eval/em": 0.5,
    "rewards/em/mean": 0.5,
}  # fmt: skip
COLLAPSED = {
    "not_finite": {"grad_norm": math.nan},
    "reward": {"reward": 0.2},
    "reward_variance": {"reward_std": 0.01, "reward": 0.3},
    "silent_groups": {"frac_reward_zero_std": 1.0, "reward": 0.3},
    "searches": {"search/searches": 0.3},
    "tool_calls": {"tools/calls": 0.1},
    "turns": {"search/turns": 1.0},
    "answers": {"stop/answer": 0.2},
    "no_answer": {"search/no_answer": 0.4},
    "exact_queries": {"search/quoted_queries": 0.1},
    "repeated_queries": {"search/repeated_queries": 0.5},
    "thoughts": {"tokens/per_turn": 20.0},
    "held_out": {"eval/em": 0.3},
    "held_out_gap": {"eval/em": 0.4, "eval/em_upper": 0.44},
    "held_out_halved": {"eval/em": 0.2, "eval/em_upper": 0.24},
    "malformed": {"search/malformed_calls": 0.8},
    "duplicate_tags": {"search/duplicate_tags": 2.0},
    "entropy_rise": {"entropy": 1.1},
    "entropy_fall": {"entropy": 0.004, "reward": 0.3},
    "kl": {"kl": 3.0},
}


def find_collapse(history):
    """The alarms at the end of a run: rule -> message."""
    watch, found = Watch(), {}
    for row in filter(is_training_log, history):
        found = watch.add(row)
    return {name: what for name, what in found.items() if what}


def play(rows, *, stop=False, state=None, first=1):
    """Logs the rows as a trainer does. Returns what callbacks after the alarms see, and the trainer's control."""
    alarm, state, control = CollapseAlarm(stop=stop), state or TrainerState(), TrainerControl()
    alarm.on_train_begin(None, state, control)
    seen = []
    for step, row in enumerate(rows, start=first):
        logs = dict(row)
        state.global_step = step
        state.log_history.append({**logs, "step": step})
        alarm.on_log(None, state, control, logs=logs)
        seen.append(logs)
        if control.should_training_stop:
            break
    return seen, control


def test_at_least_three_seeds_are_recorded_and_healthy_runs_raise_no_alarm():
    assert len(HEALTHY) >= 3 and all(len(RUNS[name]) >= 20 for name in HEALTHY)
    assert {name: first_alarms(RUNS[name]) for name in HEALTHY} == {name: {} for name in HEALTHY}


def test_a_collapse_after_learning_is_detected_before_the_reward_is_zero():
    history = RUNS["learning_rate_x_5_0"]
    assert max(row["reward"] for row in history) > 0.7 and history[-1]["reward"] == 0
    first = {name: step for name, (step, _) in first_alarms(history).items()}
    unrecorded = {"no_answer", "tool_calls", "held_out_halved", *DRIFT}
    assert set(first) == set(COLLAPSED) - {"not_finite", "entropy_fall"} - unrecorded
    gone = next(row["step"] for row in history if row["reward"] == 0)
    assert first["malformed"] == first["duplicate_tags"] == 11 and 11 < first["reward"] < gone


def literesearcher():
    """A published run: 19 checkpoints from step 1 to 750, interpolated in between."""
    rows = json.loads((HISTORIES.parent / "literesearcher.json").read_text())["rows"]
    for before, after in itertools.pairwise(rows):
        for step in range(before["step"], after["step"]):
            share = (step - before["step"]) / (after["step"] - before["step"])
            now = {key: value + share * (after[key] - value) for key, value in before.items()}
            without = now["no_answer_percent"] / 100
            yield {
                "step": step, "loss": 0.1, "reward": now["reward"], "search/turns": now["turns"],
                "search/searches": now["searches"], "stop/answer": 1 - without, "search/no_answer": without,
                "search/quoted_queries": now["exact_phrase_queries_percent"] / 100,
            }  # fmt: skip


def test_drift_is_detected_a_hundred_steps_before_a_published_run_collapses():
    """It decays unnoticed from step 250 and collapses between 490 and 540, although its reward rose until 480."""
    first = {name: step for name, (step, _) in first_alarms(list(literesearcher())).items()}
    assert first["exact_queries"] <= 390
    assert 490 <= first["no_answer"] < first["searches"] + 10 and "answers" not in first
    assert set(first) == {"exact_queries", "no_answer", "searches", "turns"}


def test_healthy_runs_raise_no_alarm_about_missing_answers():
    for name in HEALTHY:
        rows = [{**row, "search/no_answer": 1 - row["stop/answer"]} for row in RUNS[name] if "stop/answer" in row]
        assert first_alarms(rows) == {}, name


@pytest.mark.parametrize("file", ["real_model.json", "real_model_0.5b.json", "real_model_0.5b_credit.json"])
def test_real_models_that_learned_raise_no_alarm(file):
    """The runs in docs/results.md: three seeds each of Qwen2.5-Coder-1.5B and 0.5B."""
    runs = json.loads((DOCS / "data" / file).read_text())["histories"]
    learned = {name: rows for name, rows in runs.items() if name.startswith("em_")}
    assert len(learned) >= 3
    for name, rows in learned.items():
        assert first_alarms([row for row in rows if "reward" in row]) == {}, name
    watched = {"search/repeated_queries", "search/no_answer", "tokens/per_turn", "search/quoted_queries", "eval/em"}
    assert sum(watched <= set().union(*rows) for rows in learned.values()) >= 2, (
        "the histories lack the metrics of drift"
    )


def test_held_out_em_that_falls_while_the_reward_rises_is_detected_before_it_halves():
    """A run in docs/results.md: the 0.5B model at five times its learning rate."""
    runs = json.loads((DOCS / "data" / "real_model_0.5b_fast_1.json").read_text())["histories"]
    first = first_alarms([row for row in runs["fast_1"] if "reward" in row])
    assert {name: step for name, (step, _) in first.items()} == {"held_out_gap": 10, "held_out_halved": 20}
    assert first["held_out_gap"][1] == "eval/em fell from 0.29 to 0.22, while reward is at 0.43, near its highest"


def test_drift_is_reported_and_does_not_end_the_run(caplog):
    vague = {**GOOD, "search/quoted_queries": 0.05}
    _, control = play([GOOD] * 6 + [vague] * 40, stop=True)
    assert control.should_training_stop is False and "alarm exact_queries" in caplog.text


def test_an_immediate_collapse_is_detected_within_ten_steps():
    first = {name: step for name, (step, _) in first_alarms(RUNS["learning_rate_x_10_0"]).items()}
    assert set(first) == {"searches", "entropy_rise", "reward_variance", "silent_groups"}
    assert min(first.values()) <= WINDOW and max(first.values()) < 10


def test_a_policy_that_stops_searching_is_detected_at_full_reward():
    history = RUNS["format_reward_alone_0"]
    assert set(first_alarms(history)) == {"searches"} and history[-1]["reward"] == 1.0


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.name in COLLAPSED], ids=lambda rule: rule.name)
def test_each_alarm_fires_on_its_metric_and_names_it(rule):
    assert find_collapse([GOOD] * 20) == {}
    found = find_collapse([GOOD] * 20 + [{**GOOD, **COLLAPSED[rule.name]}] * (1 if rule.at_once else WINDOW))
    metric = next(iter(COLLAPSED[rule.name]))
    assert set(found) == {rule.name} and metric in found[rule.name] and rule.means and rule.advice and condition(rule)


NOTHING = {**GOOD, "reward": 0.0, "reward_std": 0.0, "rewards/em/mean": 0.0, "rewards/em/std": 0.0}


def test_a_run_without_any_reward_raises_an_alarm_in_its_first_steps(caplog):
    assert find_collapse([NOTHING] * 2) == {}
    found = find_collapse([NOTHING] * 3)
    assert set(found) == {"never_rewarded", "never_right"}
    assert found["never_rewarded"] == "reward was 0 in every rollout of the first 3 logs"
    seen, _ = play([NOTHING] * 4)
    assert [row.get("alarm/never_rewarded") for row in seen] == [0.0, 0.0, 1.0, 1.0]
    for remedy in ("trl-search sft", "your own script", "easier questions", "your own reward"):
        assert caplog.text.count(remedy) >= 1, remedy
    assert "ALARM never_rewarded" in step_line(3, 4, seen[2])


def test_one_reward_prevents_the_alarm_about_no_reward():
    once = {**NOTHING, "reward": 0.1, "rewards/em/mean": 0.1}
    assert find_collapse([NOTHING, once, *[NOTHING] * 3]) == {}
    penalties = {**NOTHING, "reward_std": 1.0}  # as many penalties as rewards
    assert set(find_collapse([penalties] * 3)) == {"never_right"}
    brief = {**NOTHING, "reward": 0.09, "reward_std": 0.01}  # only from a side reward
    assert set(find_collapse([brief] * 3)) == {"never_right"}


def test_a_run_that_has_solved_its_questions_has_no_variance_and_no_alarm():
    solved = {**GOOD, "reward": 1.0, "reward_std": 0.0, "frac_reward_zero_std": 1.0, "entropy": 0.001}
    assert find_collapse([GOOD] * 20 + [solved] * 20) == {}


def test_a_single_outlier_is_not_a_collapse():
    wild = {**GOOD, "kl": 1e6, "entropy": 5.0, "search/searches": 0.0, "reward": 0.0}
    assert find_collapse([*[GOOD] * 10, wild, GOOD, wild, GOOD]) == {}


def test_missing_metrics_short_histories_and_nonfinite_values_are_accepted():
    assert find_collapse([]) == find_collapse([{"loss": 1.0}] * 20) == find_collapse([{"eval_loss": 1.0}] * 9) == {}
    odd = {"loss": 1.0, "reward": None, "search/searches": None, "search/turns": math.nan, "reward_std": -math.inf}
    assert find_collapse([GOOD] * 3 + [odd] * 20) == {}
    assert find_collapse([{"loss": math.inf, "entropy": None}]) == {"not_finite": "loss, entropy: not a finite number"}


def test_an_alarm_is_in_every_log_and_in_the_history():
    state = TrainerState()
    seen, _ = play([GOOD] * 6 + [{**GOOD, "kl": 3.0}] * 4 + [{"eval_loss": 1.0}], state=state)
    assert [row.get("alarm/kl") for row in seen] == [0.0] * 8 + [1.0] * 2 + [None]
    assert [row.get("alarm/kl") for row in state.log_history] == [0.0] * 8 + [1.0] * 2 + [None]
    assert all(f"alarm/{rule.name}" in seen[0] for rule in RULES)
    assert "alarm/kl" not in play([{"loss": 0.1}])[0][0]  # no alarm about metrics that the run does not log


def test_each_alarm_is_logged_once_until_it_recovers_and_only_by_the_main_process(caplog):
    bad = {**GOOD, "kl": 3.0}
    rows = [GOOD] * 6 + [bad] * 10 + [GOOD] * 10 + [bad] * 5
    play(rows, state=TrainerState(is_world_process_zero=False))
    assert not caplog.records
    play(rows)
    said = [record.getMessage() for record in caplog.records]
    assert [message.split(":")[0] for message in said] == ["step 9, alarm kl", "step 29, alarm kl"]
    assert "kl rose from 0.01 to 3: the policy moves too far from its reference. To do: raise beta" in said[0]
    caplog.clear()
    play([GOOD] * 6 + [bad] * 5 + [GOOD] * 4 + [bad] * 5)  # it recovered only briefly
    assert len(caplog.records) == 1


def test_a_resumed_run_is_compared_with_its_history_and_repeats_no_alarm(caplog):
    before = [{**GOOD, "step": step} for step in range(1, 11)] + [
        {**GOOD, "kl": 3.0, "step": 11 + i} for i in range(5)
    ]
    state = TrainerState(global_step=15, log_history=before)
    seen, _ = play([{**GOOD, "kl": 3.0, "search/searches": 0.1}] * 3, state=state, first=16)
    assert [row["alarm/kl"] for row in seen] == [1.0] * 3 and [row["alarm/searches"] for row in seen] == [0, 0, 1.0]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["step 18, alarm searches"]


def test_a_run_can_end_when_an_alarm_lasts_and_names_its_best_checkpoint(caplog):
    bad = {**GOOD, "kl": 3.0}
    rows = [GOOD] * 6 + [bad] * 40
    assert play(rows)[1].should_training_stop is False
    seen, control = play(rows, stop=True, state=TrainerState(best_model_checkpoint="runs/a/checkpoint-4"))
    assert control.should_training_stop is True and len(seen) == 8 + STOP_AFTER
    assert (
        "the training stops (on_collapse) because of kl (10 logs)" in caplog.text
        and "runs/a/checkpoint-4" in caplog.text
    )
    # An alarm that comes and goes does not last.
    assert play([GOOD] * 6 + ([bad] * 8 + [GOOD] * 5) * 4, stop=True)[1].should_training_stop is False


def test_a_run_ends_at_once_when_the_held_out_em_has_significantly_halved():
    """A run at five times the learning rate fell from .29 to 0 between two evaluations, and ran for ten more logs."""

    def ends(*scores):
        rows = [{**GOOD, "eval/em": em, "eval/em_upper": upper} for em, upper in scores]
        seen, control = play([rows[0], {"loss": 0.1}, *rows[1:]], stop=True)
        return control.should_training_stop, seen[-1]["alarm/held_out_halved"]

    assert ends((0.23, 0.27), (0.29, 0.33), (0.08, 0.12)) == (True, 1.0)
    assert ends((0.23, 0.27), (0.29, 0.33), (0.12, 0.16)) == (False, 0.0), "it may be by chance"
    assert ends((0.09, 0.13), (0.0, 0.0)) == (False, 0.0), "half of almost nothing is not a collapse"
    first = {**GOOD, "eval/em": 0.1, "eval/em_upper": 0.2, "eval/em_before": 0.57}
    assert play([first], stop=True)[1].should_training_stop, "a collapse in the first steps counts"


def test_an_evaluation_with_failed_searches_is_not_compared():
    """While the search server is down, only questions that the policy answers without a search are scored."""

    def ends(*evaluations):
        names = ("eval/em", "eval/em_upper", "eval/failed")
        rows = [{**GOOD, **dict(zip(names, numbers, strict=True))} for numbers in evaluations]
        return play(rows, stop=True)[1].should_training_stop

    assert not ends((0.4, 0.45, 0.0), (0.01, 0.1, 0.8)), "the failed searches explain the drop"
    assert not ends((1.0, 1.0, 0.99), (0.4, 0.45, 0.0)), "an evaluation of one question cannot be the best"
    assert ends((0.4, 0.45, 0.0), (0.01, 0.1, 0.05)), "a few failures do not explain the drop"


def test_a_trainer_reports_alarms_and_stops(tmp_path, random_model, tokenizer, monkeypatch):
    """Every trajectory is malformed from step 1, so nothing falls or rises: a separate rule fires here."""
    import dataclasses

    silent = dataclasses.replace(next(rule for rule in RULES if rule.name == "malformed"), rises=0.0, beyond=0.1)
    monkeypatch.setattr("trl_search.trainer.callbacks.alarms.RULES", (silent,))
    monkeypatch.setattr("trl_search.trainer.callbacks.alarms.STOP_AFTER", 2)
    reported = []

    class Tracker(TrainerCallback):  # like the callbacks of report_to, it is added before ours
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(logs.get("alarm/malformed"))

    options = {"max_steps": 20, "on_collapse": "stop", "trainer": {"callbacks": [Tracker()]}}
    trainer = scripted_trainer(tmp_path, random_model, tokenizer, **options)
    trainer.train()
    assert reported == [0.0] * (WINDOW - 1) + [1.0] * 2 + [None]  # the last log is the summary
    assert trainer.state.global_step == WINDOW + 1
    assert [row["alarm/malformed"] for row in steps(trainer)] == [0.0] * (WINDOW - 1) + [1.0] * 2
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["alarm/malformed"] for row in written if "loss" in row] == [0.0] * (WINDOW - 1) + [1.0] * 2


def test_an_alarm_is_in_the_line_of_its_step():
    assert (
        step_line(3, 12, {"reward": 0.5, "alarm/kl": 1.0, "alarm/turns": 0.0}) == "step  3/12  reward 0.500  ALARM kl"
    )


def test_the_page_lists_the_alarms_of_the_code():
    page = (Path(__file__).parents[3] / "docs" / "monitoring.md").read_text()
    rows = re.findall(r"^\| `alarm/(\w+)` \| (.+?) \| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    watched = {rule.name: ", ".join(f"`{name}`" for name in rule.metric.split(", ")) for rule in RULES}
    assert rows == [(rule.name, watched[rule.name], condition(rule), rule.means) for rule in RULES]
    for name, history in RUNS.items():
        fired = first_alarms(history)
        line = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        told = {alarm: int(step) for step, alarm in re.findall(r"(\d+): `(\w+)`", line)}
        assert told == {alarm: step for alarm, (step, _) in fired.items()}


def test_the_benchmark_shows_the_recorded_runs():
    shown = table(RUNS)
    assert "| learning_rate_x_5_0 | 30 | 11: `malformed`" in shown and shown.count("| none |") >= len(HEALTHY)


def test_a_slow_decline_is_detected():
    watch = Watch()
    for step in range(200):
        found = watch.add({**GOOD, "search/searches": 2.0 * 0.985**step})
    assert found["searches"].startswith("search/searches fell from 2 to")


def test_with_refill_the_reward_is_that_before_the_refill():
    """After a refill, about half of each group is correct, however good the policy is."""
    drawn = [0.8] * 10 + [0.05] * 10
    rows = [{"loss": 0.0, "reward": 0.5, "refill/reward_before": reward} for reward in drawn]
    assert "reward" in find_collapse(rows) and "reward" not in find_collapse(rows[:10])
