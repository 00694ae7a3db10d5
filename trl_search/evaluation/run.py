"""Runs an evaluation: asks every question in every mode, records each outcome, and writes the results.

    DIR/settings.json            every setting that defines the result, and the sessions of the evaluation
    DIR/search-nq.jsonl          one line per finished question (`answers_file.py`)
    DIR/results.json, results.md

A resumed evaluation asks only the questions without a record. Several processes (`accelerate launch`) share them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from trl_search.common.errors import UserError
from trl_search.common.files import write_json, written_whole
from trl_search.common.provenance import git_state, hardware, versions
from trl_search.config.agent import build_environment
from trl_search.config.searched import WORLD
from trl_search.data.world import World, generate_world
from trl_search.environment import AnswerOnly, Environment
from trl_search.environment.registry import call_word
from trl_search.evaluation.answers_file import Records
from trl_search.evaluation.backends import open_policy
from trl_search.evaluation.evaluate import answer_questions, check_room, mode_protocol
from trl_search.evaluation.outcomes import RESULTS_FILE, Evaluation, Outcome, macro, summarize
from trl_search.evaluation.plan import Plan, searches, what_is_searched
from trl_search.evaluation.published_scores import size_class
from trl_search.evaluation.sets import MACRO, QuestionSet, check_names, load_sets, load_world_set
from trl_search.evaluation.settings import (
    SETTINGS,
    check_same,
    compared_settings,
    describe_model,
    describe_retriever,
    prompts_of,
    read_settings_file,
    settings_hash,
    with_left_out,
)
from trl_search.evaluation.table import results_markdown
from trl_search.policies.loading import load_tokenizer
from trl_search.policies.tiny import tiny_policy_path
from trl_search.retrieval import Retriever

FORMAT = 1
RESULTS_MD = "results.md"
_FEW = 100  # questions before the share of failed ones is checked


def run_evaluation(plan: Plan) -> str:
    """Runs the rest of an evaluation and writes its results. Returns the table of results, in Markdown."""
    import torch

    # 1. The questions and the retriever.
    # Without a GPU, accelerate finds the other processes only if it is told to use CPUs.
    processes = PartialState(cpu=not torch.accelerator.is_available())
    plan.backend.check(processes.num_processes)
    world = _world(plan)
    sets = _question_sets(plan, world)
    model = tiny_policy_path() if plan.model == "tiny" else plan.model
    tokenizer = load_tokenizer(model)
    retriever, description = _retriever(plan)
    environment = build_environment(plan.agent, retriever) if plan.acts else AnswerOnly()
    calls = call_word(plan.agent.environment)

    # 2. The settings, which must equal those in the folder.
    folder = plan.output
    settings = compared_settings(
        model=describe_model(model),
        model_name=plan.model,
        backend={"name": plan.backend.name, "served_model": plan.backend.served_model},
        sampling=dataclasses.asdict(plan.sampling),
        agent=plan.agent.described(),
        prompts=prompts_of(plan.modes, tokenizer, environment, plan.agent),
        retriever=description,
        modes=list(plan.modes),
        sets={one.name: one.describe() for one in sets},
    )
    before = read_settings_file(folder)
    if before is not None:
        check_same(folder, before, settings)
    processes.wait_for_everyone()

    with _alone(folder, processes):
        # 3. The policy.
        backend = plan.backend
        if backend.device is None and processes.num_processes > 1:
            device = processes.device  # a CPU device has a meaningless index
            backend = dataclasses.replace(backend, device="cpu" if device.type == "cpu" else str(device))
        with open_policy(backend, model, tokenizer) as (policy, facts):
            settings["dtype"] = facts.get("dtype")
            if before is not None:
                check_same(folder, before, settings)
            settings["sessions"] = [*(before or {}).get("sessions", []), _session(plan, processes)]
            if processes.is_main_process:
                write_json(folder / SETTINGS, with_left_out(before, settings))
            processes.wait_for_everyone()

            for mode in plan.modes:
                protocol = mode_protocol(mode, tokenizer, environment, plan.agent)
                for one in sets:
                    check_room(mode, one.rows, protocol, plan.agent, policy.positions)

            # 4. The questions without a record.
            results: dict[str, dict[str, Evaluation]] = {}
            for mode in plan.modes:
                groups: dict[str, list[Outcome]] = {}
                for one in sets:
                    started = time.perf_counter()
                    groups[one.name] = _measure(mode, one, plan, policy, tokenizer, environment, processes)
                    result = summarize(mode, groups[one.name])
                    results.setdefault(mode, {})[one.name] = result
                    if processes.is_main_process:
                        print(_line(mode, one, result, time.perf_counter() - started, calls))
                results[mode][MACRO] = macro(mode, groups)
    if retriever is not None:
        retriever.close()

    # 5. The results.
    size = size_class(plan.model, facts.get("parameters")) if plan.published == "auto" else plan.published
    report = {
        "format": FORMAT,
        "settings_hash": settings_hash(settings),
        "results": {mode: {name: one.as_json() for name, one in by_set.items()} for mode, by_set in results.items()},
        "settings": settings,
    }
    markdown = results_markdown(settings, results, size=size)
    if processes.is_main_process:
        write_json(folder / RESULTS_FILE, report)
        with written_whole(folder / RESULTS_MD) as path:
            path.write_text(markdown, encoding="utf-8")
    return markdown


def _measure(
    mode: str,
    asked: QuestionSet,
    plan: Plan,
    policy: Any,
    tokenizer: Any,
    environment: Environment,
    processes: PartialState,
) -> list[Outcome]:
    """Asks this process's share of the remaining questions. Returns the outcomes of all processes and sessions."""
    records = Records(plan.output, mode, asked.name, processes.process_index)
    done = records.read()
    processes.wait_for_everyone()  # all processes must divide the same list, so none may write before all have read
    left = [index for index in range(len(asked.rows)) if index not in done or done[index].failed]
    mine = left[processes.process_index :: processes.num_processes]
    watch = _FailureWatch(f"{mode}, {asked.name}", len(mine), plan.max_failed_share)
    bar = tqdm(
        total=len(mine) + len(asked.rows) - len(left),
        initial=len(asked.rows) - len(left),
        desc=f"{mode}, {asked.name}",
        unit="question",
        disable=None if processes.is_main_process else True,
    )

    def finished(position: int, outcome: Outcome) -> None:
        records.append(mine[position], outcome)
        bar.update()
        watch.see(outcome)

    with bar, contextlib.closing(records):
        if mine:
            answer_questions(
                mode,
                [asked.rows[index] for index in mine],
                policy=policy,
                tokenizer=tokenizer,
                environment=environment,
                agent=plan.agent,
                sampling=plan.sampling,
                concurrency=plan.backend.concurrency,
                on_outcome=finished,
                progress=False,
            )
    processes.wait_for_everyone()
    outcomes = records.read()
    if lost := sum(index not in outcomes for index in range(len(asked.rows))):
        raise UserError(
            f"{lost:,} of {len(asked.rows):,} answers are no longer in {records.path}, because another program "
            "changed it: run the same command again, which asks these questions only"
        )
    return [outcomes[index] for index in range(len(asked.rows))]


class _FailureWatch:
    """Stops an evaluation early when too many searches fail."""

    def __init__(self, what: str, asked: int, share: float) -> None:
        self.what, self.least, self.share = what, min(asked, _FEW), share
        self.finished = self.failed = 0

    def see(self, outcome: Outcome) -> None:
        self.finished += 1
        self.failed += outcome.failed
        if self.failed > self.share * max(self.finished, self.least):
            raise UserError(
                f"{self.what}: the search of {self.failed} of {self.finished} questions failed, more than "
                f"--max_failed_share {self.share} allows. The last error: {outcome.error}. Repair the retriever and "
                "run the same command again: it does not repeat finished questions."
            )


def _world(plan: Plan) -> World | None:
    if WORLD not in plan.datasets:
        return None
    if len(plan.datasets) > 1:
        raise UserError("the embedded world has its own passages: give --datasets world without other sets")
    return generate_world(passages=plan.world_passages, seed=plan.world_seed)


def _question_sets(plan: Plan, world: World | None) -> list[QuestionSet]:
    if world is not None:
        return [load_world_set(world, limit=plan.limit, seed=plan.seed)]
    sets = [
        one for name in plan.datasets for one in load_sets(name, limit=plan.limit, seed=plan.seed, fields=plan.fields)
    ]
    check_names(sets)
    return sets


def _retriever(plan: Plan) -> tuple[Retriever | None, dict[str, Any] | None]:
    """The retriever and its description; none if no mode searches."""
    if not plan.acts or not searches(plan):
        return None, None
    searched = what_is_searched(plan)
    return searched.load(), describe_retriever(searched.kind, searched.described())


@contextlib.contextmanager
def _alone(folder: Path, processes: PartialState) -> Iterator[None]:
    """Locks the folder against other evaluations."""
    if not processes.is_main_process:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError(
            f"another evaluation is writing into {folder}: wait for it, or give another --output"
        ) from None


def _session(plan: Plan, processes: PartialState) -> dict[str, Any]:
    return {
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": plan.command,
        "concurrency": plan.backend.concurrency,
        "engine_options": dict(plan.backend.engine_options),
        "versions": versions(),
        "git": git_state(),
        "hardware": hardware(processes.num_processes),
    }


def _line(mode: str, asked: QuestionSet, result: Evaluation, seconds: float, calls: str) -> str:
    failed = f", {result.failed:,} failed" if result.failed else ""
    return (
        f"{mode}, {asked.name}: EM {result.em:.3f} ± {result.em_ci95:.3f}, {result.searches:.2f} {calls} "
        f"({result.questions:,} questions{failed}, {seconds:.0f} s)"
    )
