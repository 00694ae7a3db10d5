"""`trl-search train`, one function per step: load, warm up, build, measure, train, report.

Start at `run_training`. `resume.py` finds what a resumed run continues from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import ModelConfig

from trl_search.common.files import finite_or_none, write_json
from trl_search.config.agent import build_environment, protocol_of
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.config.refused_keys import refuse_keys
from trl_search.config.run_file import shown_path
from trl_search.config.task import BASELINES, Task, TaskArguments, load_task
from trl_search.data.scripted_players import WEAK
from trl_search.data.world import generate_world
from trl_search.environment.registry import ENVIRONMENTS, call_word, takes_retriever
from trl_search.evaluation.outcomes import RESULTS_FILE, Evaluation
from trl_search.policies.adapters import adapter_config, check_target_modules, refuse_adapter_folder
from trl_search.policies.loading import base_name, check_vocabulary, load_base, load_tokenizer
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.records.finish import REPORT, finish_run
from trl_search.records.folder import AFTER_ROW, BEST_ROW
from trl_search.retrieval import load_retriever
from trl_search.trainer.callbacks.best_checkpoint import LINK, BestCheckpoint, read_best
from trl_search.trainer.callbacks.held_out import EvaluateEvery, HeldOut, measure
from trl_search.trainer.callbacks.progress import announce, counted
from trl_search.trainer.groups.question_choice import check_dataset
from trl_search.trainer.grpo import SearchGRPOTrainer
from trl_search.trainer.inputs import refuse_one_process_for_several_gpus, refuse_what_rollouts_cannot_do
from trl_search.trainer.prompts import with_prompts, with_room
from trl_search.trainer.resume import checkpoint_to_resume, measured_before, warmed_up_model
from trl_search.trainer.sft import warm_start

WARM_START = "warm_start"  # the folder of the warmed-up model, in the run folder
# Added to the seed of the world to get the seed of the world for the warm start.
_ELSEWHERE = 1_000_003


@dataclass
class Run:
    """The state of a run of `trl-search train`: settings, loaded objects and evaluations."""

    arguments: TaskArguments
    config: SearchGRPOConfig
    model_config: ModelConfig
    folder: Path
    task: Task
    checkpoint: str | None  # to resume from
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    measured: dict[str, Evaluation]  # by row of the table of results
    started: float = field(default_factory=time.perf_counter)

    @property
    def baselines(self) -> list[str]:
        return self.arguments.baselines if self.arguments.evaluate and self.task.held_out is not None else []


def run_training(
    arguments: TaskArguments, config: SearchGRPOConfig, model_config: ModelConfig
) -> dict[str, Evaluation]:
    """Runs a recipe. Returns the rows of the table of results; several sets are averaged with equal weights."""
    run = load(arguments, config, model_config)
    if arguments.warm_start_steps and run.checkpoint is None:
        measure_untrained(run)
        warm_up(run.model, run.tokenizer, arguments, config, run.folder / WARM_START)
    trainer = build(run)
    held_out = add_measurements(run, trainer)
    trainer.train(resume_from_checkpoint=run.checkpoint)
    trainer.save_model(str(run.folder))
    report(run, trainer, held_out)
    return run.measured


def load(arguments: TaskArguments, config: SearchGRPOConfig, model_config: ModelConfig) -> Run:
    """Loads questions, retriever, model and tokenizer, and finds the checkpoint to resume from.

    Raises:
        UserError: for a mistake in the recipe.
    """
    refuse_keys(arguments, config, model_config)
    adapter = adapter_config(model_config)
    refuse_adapter_folder(base_name(model_config))
    refuse_one_process_for_several_gpus(config)
    task = load_task(arguments, seed=config.seed, searches=takes_retriever(config.environment))
    # Both report mistakes before a model is loaded and warmed up.
    environment = build_environment(config.agent, task.retriever)
    refuse_what_rollouts_cannot_do(config, None, environment, {})
    check_dataset(config, task.train)
    folder = Path(config.output_dir or ".")
    checkpoint = checkpoint_to_resume(config.resume_from_checkpoint, folder)
    name = base_name(model_config)
    if checkpoint and arguments.warm_start_steps:
        name = warmed_up_model(
            folder / WARM_START, name, checkpoint, needed=model_config.use_peft or bool(config.beta)
        )
    tokenizer = load_tokenizer(
        name,
        revision=model_config.model_revision if name == base_name(model_config) else None,
        trust_remote_code=config.trust_remote_code,
        eos_token=config.eos_token,
    )
    # The trainer checks the protocol too, but after the model is loaded, and the prompts, but after the warm start.
    protocol = protocol_of(config.agent, tokenizer, environment.tools, environment.instruction)
    model = load_base(name, model_config, config)
    check_vocabulary(model, tokenizer)
    check_target_modules(model, adapter)
    if arguments.warm_start_steps and checkpoint is None:
        prompts = with_prompts(task.train, protocol, [], "train_dataset")
        with_room(prompts, "train_dataset", protocol, model, config, skip=config.skip_long_prompts)
    return Run(
        arguments,
        config,
        model_config,
        folder,
        task,
        checkpoint,
        model=model,
        tokenizer=tokenizer,
        measured=measured_before(folder) if checkpoint else {},
    )


def measure_untrained(run: Run) -> None:
    """Measures the baselines before the warm start, without a trainer."""
    if not run.baselines:
        return
    announce(
        "Baselines", f"{', '.join(run.baselines)}, on {counted(len(run.task.held_out or []), 'held-out question')}"
    )
    run.model.to(run.config.device)  # type: ignore[arg-type]
    speaker = TransformersPolicy(run.model, run.tokenizer, max_sequences=run.config.rollout_batch_size)
    for mode in run.baselines:
        with torch.no_grad():
            result = measure(
                mode,
                list(run.task.held_out or []),
                policy=contextlib.nullcontext(speaker),
                tokenizer=run.tokenizer,
                environment=build_environment(run.config.agent, run.task.retriever),
                agent=run.config.agent,
                folder=run.folder,
            )
        run.measured[BASELINES.get(mode, mode)] = result.average


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TaskArguments,
    config: SearchGRPOConfig,
    folder: Path,
) -> None:
    """Fine-tunes the model on weak scripted play in another world, so that it knows the format before GRPO."""
    announce("Warm start", f"{counted(arguments.warm_start_steps, 'supervised step')}, in another world")
    world = generate_world(passages=arguments.world_passages, seed=arguments.world_seed + _ELSEWHERE)
    retriever = load_retriever("bm25", passages=world.passages)
    environment = build_environment(config.agent, retriever)
    warm_start(
        model,
        protocol_of(config.agent, tokenizer, environment.tools, environment.instruction),
        world,
        retriever,
        environment=environment,
        # Without a tool, the scripts can only guess.
        quality=WEAK if config.max_searches else {"guess": 1.0},
        output_dir=str(folder),
        steps=arguments.warm_start_steps,
        learning_rate=arguments.warm_start_learning_rate,
        seed=config.seed,
        use_cpu=config.use_cpu,
    )
    # From now on this folder is the policy's name: the reference model and vLLM load it, and an adapter names it as
    # its base.
    model.name_or_path = model.config._name_or_path = str(folder)


def build(run: Run) -> SearchGRPOTrainer:
    """The trainer of the run."""
    trainer = SearchGRPOTrainer(
        model=run.model,
        reward_funcs=list(run.arguments.reward_funcs),
        args=run.config,
        train_dataset=run.task.train,
        eval_dataset=run.task.held_out_sets,
        processing_class=run.tokenizer,
        retriever=run.task.retriever,
        peft_config=adapter_config(run.model_config),
    )
    base = {"base_model": run.model_config.model_name_or_path}
    trainer.run_log.task = {**base, **dataclasses.asdict(run.arguments), **run.task.description}
    return trainer


def add_measurements(run: Run, trainer: SearchGRPOTrainer) -> HeldOut | None:
    """Adds the evaluations on held-out questions: before the first step, and every `evaluate_every` steps."""
    if run.task.held_out is None:
        return None
    held_out = HeldOut(trainer, run.task.held_out)
    if run.arguments.evaluate:
        trainer.add_callback(MeasureBefore(run, held_out))
    if run.arguments.evaluate_every:
        trainer.add_callback(EvaluateEvery(run.arguments.evaluate_every, held_out))
        trainer.add_callback(BestCheckpoint(held_out))
    return held_out


class MeasureBefore(TrainerCallback):
    """Measures the policy before the first step, when the trainer has moved it to its device."""

    def __init__(self, run: Run, held_out: HeldOut) -> None:
        self.run, self.held_out = run, held_out

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step:  # resumed: already measured
            return
        run, warmed_up = self.run, bool(self.run.arguments.warm_start_steps)
        announce("Evaluation", f"before GRPO, on {counted(len(self.held_out.rows), 'held-out question')}")
        for mode in [] if warmed_up else run.baselines:
            run.measured[BASELINES.get(mode, mode)] = self.held_out.measure(mode).average
        row = "search, warm-started" if warmed_up else "search, before GRPO"
        run.measured[row] = self.held_out.measure().average
        if state.is_world_process_zero:  # written now, in case the run is killed and resumed
            write_results(run, [])
        announce("GRPO", f"{counted(state.max_steps, 'step')} on {counted(len(run.task.train), 'question')}")


def report(run: Run, trainer: SearchGRPOTrainer, held_out: HeldOut | None) -> None:
    """Measures the trained policy, writes results and report, and prints the table."""
    if held_out is not None and run.arguments.evaluate:
        announce("Evaluation", f"after GRPO, on {counted(len(held_out.rows), 'held-out question')}")
        run.measured[AFTER_ROW] = held_out.measure().average
    best = read_best(run.folder) if run.arguments.evaluate_every else None
    if best is not None and best.step != trainer.state.global_step:
        run.measured[f"{BEST_ROW} (step {best.step})"] = best.average
    if not trainer.accelerator.is_main_process:
        return
    seconds = write_results(run, trainer.state.log_history)
    finish_run(run.folder, run.config)
    folder = shown_path(run.folder)
    if run.measured:
        print(f"\n{results_table(run.measured, call_word(run.config.environment))}\n")
    print(f"{seconds:.0f} s in all. Model, {RESULTS_FILE} and {REPORT} are in {folder}.")
    quoted = shlex.quote(folder)
    print(f"  trl-search report {quoted}    curves, alarms, and every token of its trajectories")
    environment = run.config.environment
    # `refuse_unnamed_code` refuses an import path that only the model's folder names, so the command names it.
    named = "" if environment in ENVIRONMENTS else f" --environment {environment}"
    print(f"  trl-search chat {quoted}{named}      asks it a question")
    if best is not None:
        print(f"The best checkpoint, of step {best.step} with held-out EM {best.average.em:.3f}, is {folder}/{LINK}.")


def results_table(measured: Mapping[str, Evaluation], calls: str) -> str:
    """The before/after table, in Markdown that is aligned for a terminal."""
    table = Table(box=box.MARKDOWN)
    table.add_column("policy")
    for name in ("EM", "± 95 %", "F1", f"{calls} per question", "reflective-phrase ratio"):
        table.add_column(name, justify="right")
    for row, result in measured.items():
        numbers = (result.em, result.em_ci95, result.f1)
        shown = [*(f"{value:.3f}" for value in numbers), f"{result.searches:.2f}", f"{result.reflective_ratio:.3f}"]
        table.add_row(row, *shown)
    text = io.StringIO()
    Console(file=text, width=200).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())


def write_results(run: Run, history: Sequence[Mapping[str, Any]]) -> float:
    """Writes `results.json`, and returns the seconds that the run has taken."""
    seconds = time.perf_counter() - run.started
    rows = {row: result.as_json() for row, result in run.measured.items()}
    write_json(run.folder / RESULTS_FILE, finite_or_none({"seconds": seconds, "rows": rows, "history": list(history)}))
    return seconds
