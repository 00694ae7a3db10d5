"""The results as Markdown: exact match beside published numbers, then all other metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trl_search.data import HUB_SETS
from trl_search.environment.registry import SEARCH, call_word
from trl_search.evaluation.outcomes import Evaluation
from trl_search.evaluation.published_scores import SETS, TITLES, rows_beside
from trl_search.evaluation.sets import MACRO

# results[mode][set]; the key MACRO has the average over sets.
Results = Mapping[str, Mapping[str, Evaluation]]


def results_markdown(settings: Mapping[str, Any], results: Results, *, size: str | None) -> str:
    """The content of `results.md`. `size`: the published rows to show (`3B`, `7B`, `all`)."""
    names = ordered(settings["sets"])
    return "\n".join(
        [
            f"# Evaluation of {settings['model_name']}",
            "",
            *exact_match_table(settings, results, names, size),
            "",
            *notes(settings, results, names, size),
            "",
            *others_table(results, names, call_word(settings["agent"].get("environment", SEARCH))),
            "",
            *_how(settings),
            "",
        ]
    )


def ordered(names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """The seven sets in their usual order, then the others."""
    return [*(name for name in SETS if name in names), *(name for name in names if name not in SETS)]


def exact_match_table(
    settings: Mapping[str, Any], results: Results, names: Sequence[str], size: str | None
) -> list[str]:
    """EM with its 95 % interval: one row per mode, one column per set and the average; published rows below."""
    columns = _columns(names)
    lines = [
        f"| exact match | {' | '.join(TITLES.get(name, name) for name in columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for mode, by_set in results.items():
        cells = [_em(by_set[name]) for name in columns]
        lines.append(f"| **{mode}**, measured here | {' | '.join(cells)} |")
    shared = [name for name in names if name in SETS]
    for row in rows_beside(shared, size):
        known = dict(zip(SETS, row.em, strict=True)) if row.em else {}
        values = [f"{known[name]:.3f}" if name in known else "" for name in names]
        if MACRO in columns:
            average = row.macro(shared) if shared == list(names) else None
            values.append("" if average is None else f"{average:.3f}")
        lines.append(f"| {row.title} | {' | '.join(values)} |")
    return lines


def notes(settings: Mapping[str, Any], results: Results, names: Sequence[str], size: str | None) -> list[str]:
    """The notes that a reader needs before comparing numbers."""
    resampled = "; for the macro average, questions are resampled within each set" if len(names) > 1 else ""
    said = [f"± is half of the 95 % bootstrap interval{resampled}."]
    shared = [name for name in names if name in SETS]
    if set(names) == set(SETS):
        said.append("The macro average is over the seven sets.")
    elif len(names) > 1:
        said.append(f"**The macro average is over these {len(names)} sets, not over the seven.**")
    for name in names:
        one, published = settings["sets"][name], HUB_SETS.get(name)
        if one["asked"] < one["total"]:
            said.append(f"**{TITLES.get(name, name)} is a sample: {one['asked']:,} of {one['total']:,} questions.**")
        if published is not None and published.rows not in (None, one["total"]):
            said.append(
                f"**{TITLES.get(name, name)} has {one['total']:,} questions here, but {published.rows:,} in published "
                "numbers.**"
            )
    for mode, by_set in results.items():
        macro = by_set[MACRO]
        if macro.failed:
            reasons = "; ".join(f"{count} x {error}" for error, count in list(macro.errors.items())[:3])
            said.append(
                f"**{mode}: the search of {macro.failed:,} of {macro.questions:,} questions failed ({reasons}). They "
                "are left out of the means; the same command asks them again.**"
            )
    if rows_beside(shared, size):
        said.append(
            "Rows without *measured here* are published numbers, with the retriever and the prompts of their authors. "
            "[2°]: read in a secondary copy."
        )
    return [f"- {line}" for line in said]


def others_table(results: Results, names: Sequence[str], calls: str) -> list[str]:
    """All other metrics, one row per mode and set. `calls` is the heading for calls of the environment's tools."""
    lines = [
        f"| mode | set | questions | failed | F1 | contains | {calls} | turns | tokens | retrieved | s | reflective |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for mode, by_set in results.items():
        for name in _columns(names):
            one = by_set[name]
            values = [
                *(_number(value, 3) for value in (one.f1, one.contains)),
                *(_number(value, 2) for value in (one.searches, one.turns)),
                *(_number(value, 0) for value in (one.model_tokens, one.observation_tokens)),
                _number(one.latency_s, 2),
                _number(one.reflective_ratio, 3),
            ]
            title = TITLES.get(name, name)
            lines.append(f"| {mode} | {title} | {one.questions:,} | {one.failed:,} | {' | '.join(values)} |")
    return lines


def _how(settings: Mapping[str, Any]) -> list[str]:
    sampling, agent, retriever = settings["sampling"], settings["agent"], settings["retriever"]
    how = "greedy" if sampling["temperature"] == 0 else f"temperature {sampling['temperature']}"
    searched = "nothing" if retriever is None else retriever["kind"]
    world = f"k = {agent['passages_per_query']}, at most {agent['max_searches']} searches"
    if "environment" in agent:  # recorded only if it is not the search environment
        world = f"environment {agent['environment']}"
    return [
        "*contains*: the answer contains a golden answer. *tokens*: tokens that the policy wrote. *retrieved*: tokens "
        "that it read from its tools. *s*: seconds from question to answer, with concurrent questions.",
        "",
        f"One answer per question, {how}, top_p {sampling['top_p']}; protocol {agent['protocol']}, "
        f"{world}; retriever {searched}. "
        "results.json has prompts, hashes and versions.",
    ]


def _columns(names: Sequence[str]) -> list[str]:
    """The sets, and the average if there are several."""
    return [*names, MACRO] if len(names) > 1 else list(names)


def _em(one: Evaluation) -> str:
    return "no answers" if math.isnan(one.em) else f"{one.em:.3f} ± {one.em_ci95:.3f}"


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"
