"""The summary at the top of a report: one sentence, and a row of numbers.

"Held-out exact match rose from 0.140 to 0.935 on 200 questions, 2.4 times one-shot RAG (0.390)."
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_search.common.errors import UserError
from trl_search.common.files import is_number
from trl_search.protocols.instructions import tool_names
from trl_search.records.folder import BEST_ROW, SFT, Run, section
from trl_search.records.report.charts import history_of, points

# The reward of one step is noisy, so the first and last reward are means over this many logs.
REWARD_LOGS = 3
# Calls per question: on held-out questions, else in training; without a search, calls of other tools.
_CALLS = ("eval/searches", "search/searches", "tools/calls")


@dataclass(frozen=True, slots=True)
class Fact:
    """One number of the summary: `Fact("Held-out EM", "0.140 → 0.935", "95 % interval 0.90 to 0.97")`."""

    name: str
    value: str
    note: str = ""


def headline(run: Run) -> str:
    """The main result of a run in one sentence, as far as it was measured."""
    if run.method == SFT:
        return _cold_start(run)
    em = points(history_of(run), "eval/em")
    if len(em) < 2:
        reward = points(run.history, "reward")
        if len(reward) < 2:
            return "Nothing was measured yet."
        first, last = _ends(list(reward.values()))
        return f"The training reward {_went(first, last)}; held-out questions were not measured."
    (start, before), *_, (end, after) = em.items()
    questions = f" on {run.after['questions']:,} questions" if is_number(run.after.get("questions")) else ""
    said = f"Held-out exact match {_went(before, after)}{questions}"
    noise = math.hypot(_half_width(run.before), _half_width(run.after))
    if abs(after - before) <= noise:
        return f"{said}, which is within the noise of the measurement (± {noise:.3f})."
    baselines = {name: row["em"] for name, row in run.baselines.items() if is_number(row.get("em"))}
    if baselines and (name := max(baselines, key=lambda name: baselines[name])):
        best = baselines[name]
        said += f", {after / best:.1f} times {name} ({best:.3f})" if best else f"; {name} has {best:.3f}"
    return said + ("." if start == 0 else f" between step {start:,} and step {end:,}.")


def _cold_start(run: Run) -> str:
    loss = list(points(run.history, "loss").values())
    went = f" Its loss {_went(loss[0], loss[-1])}." if len(loss) > 1 else ""
    return f"A cold start: supervised training, without rewards.{went} What it answers, `trl-search eval` measures."


def facts_of(run: Run) -> list[Fact]:
    """The row of numbers; numbers that were not recorded are left out."""
    history = history_of(run)
    found = [_em_fact(run)]
    for name, row in run.baselines.items():
        if is_number(row.get("em")):
            found.append(Fact(_capital(name), f"{row['em']:.3f}", _interval(row)))
    reward = points(history, "reward")
    if len(reward) > 1:
        first, last = _ends(list(reward.values()))
        logs = _ends_of(len(reward))
        note = f"means of the first and the last {logs} logs" if logs > 1 else "first and last log"
        found.append(Fact("Training reward", f"{first:.3f} → {last:.3f}", note))
    calls = next((logged for name in _CALLS if (logged := points(history, name))), {})
    if len(calls) > 1:
        values = list(calls.values())
        asked = "held-out questions" if points(history, "eval/searches") else "training questions"
        name = f"{_capital(call_words(run)[1])} per question"
        found.append(Fact(name, f"{values[0]:.2f} → {values[-1]:.2f}", asked))
    found += [_steps_fact(run), _rollbacks_fact(run), _model_fact(run), _recipe_fact(run)]
    return [fact for fact in found if fact is not None]


def call_words(run: Run) -> tuple[str, str]:
    """The words for one call and for several: "search", or "call of ..." if the environment has one other tool.

    Example:
        >>> call_words(read_run("runs/my_agent"))
        ('call of open', 'calls of open')
    """
    tools = section(run.info, "environment").get("tools")
    try:
        names = tool_names(tools) if tools else ["search"]
    except UserError:  # run.json is damaged
        names = ["search"]
    if names == ["search"]:
        return "search", "searches"
    return (f"call of {names[0]}", f"calls of {names[0]}") if len(names) == 1 else ("call", "calls")


def _em_fact(run: Run) -> Fact | None:
    em = points(history_of(run), "eval/em")
    if not em:
        return None
    values = list(em.values())
    best = next((name for name in run.results if name.startswith(BEST_ROW)), "")
    note = _interval(run.after)
    if best and is_number(run.results[best].get("em")):
        note += f"{'; ' if note else ''}best {run.results[best]['em']:.3f} {best.removeprefix(BEST_ROW).strip()}"
    ends = values if len(values) == 1 else [values[0], values[-1]]
    return Fact("Held-out exact match", " → ".join(f"{value:.3f}" for value in ends), note)


def _steps_fact(run: Run) -> Fact | None:
    steps = [row["step"] for row in run.history]
    if not steps:
        return None
    planned = section(run.info, "config").get("max_steps")
    of = f" of {planned:,}" if is_number(planned) and planned > max(steps) else ""
    seconds = list(points(run.history, "step_time").values())
    spent = f"{_duration(sum(seconds) / len(seconds))} per step" if seconds else ""
    if is_number(run.seconds):
        spent = f"{_duration(run.seconds or 0)} in all" + (f", {spent}" if spent else "")
    return Fact("Steps", f"{max(steps):,}{of}", spent)


def _rollbacks_fact(run: Run) -> Fact | None:
    if not run.rollbacks:
        return None
    steps = ", ".join(f"step {one['step']:,} to {one['to']:,}" for one in run.rollbacks)
    return Fact("Rollbacks", str(len(run.rollbacks)), f"{steps}; each halved the learning rate")


def _model_fact(run: Run) -> Fact | None:
    # After a warm start, `model` is a folder of the run; the task names the original model.
    model = run.task.get("base_model") or run.info.get("model")
    if not isinstance(model, str):
        return None
    searched = [value for value in (run.info.get("protocol"), run.task.get("retriever")) if isinstance(value, str)]
    return Fact("Model", Path(model).name, " · ".join(searched))


def _recipe_fact(run: Run) -> Fact | None:
    command = run.info.get("command")
    if not isinstance(command, str):
        return None
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    command = next((word for word in words if word in ("train", "sft")), None)
    named = [] if command is None else words[words.index(command) + 1 :][:1]
    started = str(run.info.get("started_at", ""))[:16].replace("T", " ")
    note = f"started {started}" if started else ""
    return Fact("Recipe", Path(named[0]).name.removesuffix(".yaml"), note) if named else None


def _interval(row: Mapping[str, Any]) -> str:
    ends = row.get("em_interval")
    if isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends)):
        return f"95 % interval {ends[0]:.3f} to {ends[1]:.3f}"
    return ""


def _half_width(row: Mapping[str, Any]) -> float:
    return float(row["em_ci95"]) if is_number(row.get("em_ci95")) else 0.0


def _ends_of(logs: int) -> int:
    """How many logs each end has: the two do not overlap."""
    return min(REWARD_LOGS, logs // 2)


def _ends(values: list[float]) -> tuple[float, float]:
    logs = _ends_of(len(values))
    return sum(values[:logs]) / logs, sum(values[-logs:]) / logs


def _went(before: float, after: float) -> str:
    """What a number did: "rose from 0.140 to 0.935", or "stayed at 0.935"."""
    first, last = f"{before:.3f}", f"{after:.3f}"
    return f"stayed at {last}" if first == last else f"{'rose' if after > before else 'fell'} from {first} to {last}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
