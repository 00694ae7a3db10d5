"""What `trl-search train` does: load the task, warm the policy up, measure, train, measure again, draw the curves."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import ModelConfig

from trl_search.common.errors import UserError
from trl_search.common.files import read_object, written_whole
from trl_search.config.agent import protocol_of, search_environment
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.config.task import BASELINES, Task, TaskArguments, load_task
from trl_search.data.scripted_players import WEAK
from trl_search.data.world import generate_world
from trl_search.evaluation.evaluate import answer_questions
from trl_search.evaluation.outcomes import RESULTS_FILE, Evaluation, evaluation_of
from trl_search.policies.loading import adapter_config, base_name, load_base, load_tokenizer
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.records.finish import REPORT, finish_run
from trl_search.records.folder import AFTER_ROW, BEST_ROW, INFO_FILE
from trl_search.retrieval import load_retriever
from trl_search.trainer.callbacks.best_checkpoint import LINK, BestCheckpoint, is_whole, read_best
from trl_search.trainer.callbacks.held_out import EvaluateEvery, HeldOut, summarize_held_out
from trl_search.trainer.callbacks.progress import StepLines
from trl_search.trainer.grpo import SearchGRPOTrainer
from trl_search.trainer.inputs import refuse_quantization
from trl_search.trainer.sft import warm_start

__all__ = ["Task", "TaskArguments", "load_task", "results_table", "run_training"]

# Added to the seed of a world: that of the world in which its policy is warmed up.
_ELSEWHERE = 1_000_003


def run_training(
    arguments: TaskArguments, config: SearchGRPOConfig, model_config: ModelConfig
) -> dict[str, Evaluation]:
    """Runs a recipe to its end. Returns the evaluations, by the name of the table's row; over several sets, averages
    in which each set counts the same."""
    refuse_quantization(model_config)
    name = base_name(model_config)
    started = time.perf_counter()
    task = load_task(arguments, seed=config.seed)
    folder = Path(config.output_dir or "runs/train")
    if arguments.evaluate_every and task.held_out is None:
        raise UserError(f"evaluate_every={arguments.evaluate_every} needs eval_questions to measure on")
    checkpoint = _checkpoint(config, folder)
    warm_folder = folder.absolute() / "warm_start"
    if checkpoint and arguments.warm_start_steps:
        if (warm_folder / "config.json").is_file():
            name = str(warm_folder)
        # A full fine-tuning's checkpoint has all weights; an adapter's has none of its base, nor of the reference.
        elif model_config.use_peft or config.beta:
            raise UserError(
                f"the run to resume was warmed up, and {warm_folder} holds no model: copy warm_start there from the "
                f"folder of the run that {checkpoint} is of, or start anew without resume_from_checkpoint"
            )
    model = load_base(name, model_config, config)
    tokenizer = load_tokenizer(
        name,
        revision=model_config.model_revision if name == base_name(model_config) else None,
        trust_remote_code=config.trust_remote_code,
        eos_token=config.eos_token,
    )
    measured = _measured_before(folder) if checkpoint else {}
    baselines = list(arguments.baselines)

    # 1. The warm start: the format, and weak behaviour. What the model could do without comes before it.
    if arguments.warm_start_steps:
        if not checkpoint:
            if task.held_out is not None and arguments.evaluate:
                measured |= {
                    BASELINES.get(mode, mode): _baseline(mode, task, model, tokenizer, config) for mode in baselines
                }
            _warm_up(model, tokenizer, arguments, config, warm_folder)
            # The policy comes from the warm start now: a reference model is loaded from the config's name, and an
            # adapter names as its base, and vLLM loads, the model's.
            model.name_or_path = model.config._name_or_path = str(warm_folder)
        baselines = []

    # 2. The trainer, and what is measured with it.
    trainer = SearchGRPOTrainer(
        model=model,
        reward_funcs=list(arguments.reward_funcs),
        args=config,
        train_dataset=task.train,
        eval_dataset=task.held_out,
        processing_class=tokenizer,
        retriever=task.retriever,
        peft_config=adapter_config(model_config),
    )
    base = {"base_model": model_config.model_name_or_path}
    trainer.run_log.task = {**base, **dataclasses.asdict(arguments), **task.description}
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(StepLines)
    held_out = None if task.held_out is None else HeldOut(trainer, task.held_out)
    if held_out is not None and arguments.evaluate:
        row = "search, warm-started" if arguments.warm_start_steps else "search, before GRPO"

        def save() -> None:
            _write_results(folder, measured, [], time.perf_counter() - started)

        trainer.add_callback(_MeasureBefore(baselines, row, held_out, measured, save))
    if held_out is not None and arguments.evaluate_every:
        trainer.add_callback(EvaluateEvery(arguments.evaluate_every, held_out))
        trainer.add_callback(BestCheckpoint(held_out))

    # 3. GRPO.
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(folder))
    if held_out is not None and arguments.evaluate:
        measured[AFTER_ROW] = held_out.measure().average
    best = read_best(folder) if arguments.evaluate_every else None
    if best is not None and best.step != trainer.state.global_step:
        measured[f"{BEST_ROW} (step {best.step})"] = best.average

    # 4. What came of it.
    if trainer.accelerator.is_main_process:
        seconds, history = time.perf_counter() - started, trainer.state.log_history
        _write_results(folder, measured, history, seconds)
        finish_run(folder, config)
        if measured:
            print(f"\n{results_table(measured)}\n")
        print(f"{seconds:.0f} s in all. Model, {RESULTS_FILE} and {REPORT} are in {folder}.")
        if best is not None:
            print(
                f"The best checkpoint, of step {best.step} with held-out EM {best.average.em:.3f}, is {folder / LINK}."
            )
    return measured


class _MeasureBefore(TrainerCallback):
    """Measures what the policy does before its first step, when the trainer has put it where it generates."""

    def __init__(
        self,
        baselines: list[str],
        row: str,
        held_out: HeldOut,
        measured: dict[str, Evaluation],
        save: Callable[[], None],
    ) -> None:
        self.baselines, self.row, self.held_out, self.measured, self.save = baselines, row, held_out, measured, save

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step:  # a resumed run has this behind it
            return
        for mode in self.baselines:
            self.measured[BASELINES.get(mode, mode)] = self.held_out.measure(mode).average
        self.measured[self.row] = self.held_out.measure().average
        if state.is_world_process_zero:  # now, as the run may be killed and resumed
            self.save()


def _warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TaskArguments,
    config: SearchGRPOConfig,
    folder: Path,
) -> None:
    if arguments.questions != "world":
        raise UserError("warm_start_steps needs questions: world; for other data run trl-search sft first")
    # The policy warms up in another world: it has read none of the passages that it is trained and measured on.
    world = generate_world(passages=arguments.world_passages, seed=arguments.world_seed + _ELSEWHERE)
    retriever = load_retriever("bm25", passages=world.passages)
    environment = search_environment(retriever, config.agent)
    warm_start(
        model,
        protocol_of(config.agent, tokenizer, environment.tools),
        world,
        retriever,
        environment=environment,
        # Who has no tool can show no search.
        quality=WEAK if config.max_searches else {"guess": 1.0},
        output_dir=str(folder),
        steps=arguments.warm_start_steps,
        learning_rate=arguments.warm_start_learning_rate,
        seed=config.seed,
        use_cpu=config.use_cpu,
    )


def results_table(measured: Mapping[str, Evaluation]) -> str:
    """The before/after table, in Markdown."""
    lines = [
        "| policy | EM | ± 95 % | F1 | searches a question | reflective-phrase ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row, result in measured.items():
        lines.append(
            f"| {row} | {result.em:.3f} | {result.em_ci95:.3f} | {result.f1:.3f} | {result.searches:.2f} | "
            f"{result.reflective_ratio:.3f} |"
        )
    return "\n".join(lines)


def _baseline(
    mode: str, task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: SearchGRPOConfig
) -> Evaluation:
    """What a model does that no trainer has yet."""
    assert task.held_out is not None
    state, started = PartialState(), time.perf_counter()
    model.to(config.device)  # type: ignore[arg-type]
    with torch.no_grad():
        outcomes = answer_questions(
            mode,
            list(task.held_out)[state.process_index :: state.num_processes],
            policy=TransformersPolicy(model, tokenizer, max_sequences=config.rollout_batch_size),
            tokenizer=tokenizer,
            environment=search_environment(task.retriever, config.agent),
            agent=config.agent,
        )
    seconds = time.perf_counter() - started
    return summarize_held_out(mode, gather_object(outcomes), step=0, seconds=seconds).average


def _checkpoint(config: SearchGRPOConfig, folder: Path) -> str | None:
    """The checkpoint to resume from: `resume_from_checkpoint: last` takes the newest whole one of the folder's run."""
    if config.resume_from_checkpoint != "last":
        return config.resume_from_checkpoint
    name = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = {int(match[1]): path for path in folder.glob("*") if (match := name.fullmatch(path.name))}
    started = _started_at(folder)
    for _, path in sorted(found.items(), reverse=True):
        if not is_whole(path):
            print(f"{path} was not written to its end: it is passed over")
        elif (path / TRAINER_STATE_NAME).stat().st_mtime < started:
            print(f"{path} is older than the run of {folder / INFO_FILE}, so of another: it is passed over")
        else:
            return str(path)
    raise UserError(
        f"resume_from_checkpoint=last, and {folder} holds no checkpoint of its run that was written to its end: give "
        f"the path of one, or leave resume_from_checkpoint out"
    )


def _started_at(folder: Path) -> float:
    """When the run of a folder began, as a file's time: resumes do not change it. 0 where nothing tells."""
    path = folder / INFO_FILE
    text = read_object(path, "move it away").get("started_at") if path.is_file() else None
    return datetime.datetime.fromisoformat(text).timestamp() if text else 0.0


def _measured_before(folder: Path) -> dict[str, Evaluation]:
    """What a run that is resumed measured before its training; what came after is measured again."""
    path = folder / RESULTS_FILE
    rows = read_object(path, "move it away").get("rows", {}) if path.is_file() else {}
    return {
        row: evaluation_of(values, str(path))
        for row, values in rows.items()
        if not row.startswith((AFTER_ROW, BEST_ROW))
    }


def _write_results(
    folder: Path, measured: Mapping[str, Evaluation], history: Sequence[Mapping[str, Any]], seconds: float
) -> None:
    results = {row: result.as_json() for row, result in measured.items()}
    record = {"seconds": seconds, "rows": results, "history": list(history)}
    with written_whole(folder / RESULTS_FILE) as path:
        path.write_text(json.dumps(record, indent=2) + "\n")
