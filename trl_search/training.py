"""What `trl-search train` does: load the task, warm the policy up, measure, train, measure again, draw the curves."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, get_peft_config

from trl_search.config import SearchGRPOConfig
from trl_search.curves import draw_curves
from trl_search.data import HUB_SETS, load_questions
from trl_search.errors import UserError
from trl_search.evaluate import Evaluation, evaluate
from trl_search.policies.transformers import TransformersPolicy
from trl_search.progress import StepLines
from trl_search.protocols import load_protocol
from trl_search.retrieval import Retriever, load_retriever
from trl_search.sft import warm_start
from trl_search.tiny_policy import tiny_policy_path
from trl_search.trainer import SearchGRPOTrainer, search_environment
from trl_search.world import Question, generate_world

BASELINES = {"direct": "direct answer, no search", "rag": "one-shot RAG"}
# Added to the seed of a world: that of the world in which its policy is warmed up.
_ELSEWHERE = 1_000_003


@dataclass
class TaskArguments:
    """What is asked, what is searched, and what is measured."""

    questions: str = field(
        default="world",
        metadata={"help": "Training questions: 'world' (the embedded one), a name such as nq_hotpotqa, or a file."},
    )
    eval_questions: str | None = field(
        default=None,
        metadata={"help": "Questions to evaluate on: a name or a file. With the world: its held-out split."},
    )
    max_train_questions: int | None = field(default=None, metadata={"help": "Train on a sample of so many questions."})
    max_eval_questions: int | None = field(
        default=200, metadata={"help": "Evaluate on a sample of so many questions."}
    )
    world_passages: int = field(default=2000, metadata={"help": "Passages of the embedded world: 1,000 to 1,000,000."})
    world_seed: int = field(default=0, metadata={"help": "Seed of the embedded world: another seed, other facts."})
    retriever: str = field(default="bm25", metadata={"help": "Kind of retriever; see load_retriever."})
    retriever_options: str = field(
        default="{}", metadata={"help": 'Its options as JSON: \'{"index": "indexes/wiki"}\'. The world needs none.'}
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["em"], metadata={"help": "Rewards by name; weights in reward_weights."}
    )
    warm_start_steps: int = field(
        default=0,
        metadata={
            "help": "Supervised steps before GRPO, on scripted trajectories of mixed quality in another embedded "
            "world. They show the format and leave the behaviour weak. 0: none."
        },
    )
    warm_start_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the warm start."})
    baselines: list[str] = field(
        default_factory=list, metadata={"help": "Measured before training: direct (no search), rag (one search)."}
    )
    evaluate: bool = field(default=True, metadata={"help": "Measure held-out EM before and after training."})
    evaluate_every: int = field(
        default=0, metadata={"help": "Measure it every so many steps too, and log it as eval/em. 0: never."}
    )


@dataclass(frozen=True)
class Task:
    """Questions to train and to be measured on, and what to search."""

    train: Dataset
    held_out: Dataset | None
    retriever: Retriever


def load_task(arguments: TaskArguments, *, seed: int) -> Task:
    """Loads questions and retriever; everything that can be wrong with a recipe's data is said here."""
    try:
        options = json.loads(arguments.retriever_options)
    except json.JSONDecodeError as error:
        raise UserError(f"retriever_options is not JSON ({error}): {arguments.retriever_options}") from error
    if arguments.questions == "world":
        world = generate_world(passages=arguments.world_passages, seed=arguments.world_seed)
        train = _sample(_as_dataset(world.questions("train")), arguments.max_train_questions, seed)
        held_out = _sample(_as_dataset(world.questions("test")), arguments.max_eval_questions, seed)
        retriever = load_retriever(arguments.retriever, passages=world.passages, **options)
        return Task(train, held_out, retriever)
    train = load_questions(arguments.questions, limit=arguments.max_train_questions, seed=seed)
    held_out = None
    if arguments.eval_questions:
        # A set of the hub has one split that published numbers are measured on, and it is not always called test.
        split = None if arguments.eval_questions in HUB_SETS else "test"
        held_out = load_questions(arguments.eval_questions, split=split, limit=arguments.max_eval_questions, seed=seed)
    return Task(train, held_out, load_retriever(arguments.retriever, **options))


def run_training(
    arguments: TaskArguments, config: SearchGRPOConfig, model_config: ModelConfig
) -> dict[str, Evaluation]:
    """Runs a recipe to its end. Returns the evaluations, by the name of the table's row."""
    started = time.perf_counter()
    task = load_task(arguments, seed=config.seed)
    folder = Path(config.output_dir or "runs/train")
    name = tiny_policy_path() if model_config.model_name_or_path == "tiny" else model_config.model_name_or_path
    if not name:
        raise UserError("model_name_or_path is missing: give a model of the hub, a folder, or 'tiny'")
    peft_config = get_peft_config(model_config)
    model, tokenizer = _load_model(name, model_config, config)
    measured: dict[str, Evaluation] = {}

    def measure(row: str, mode: str, model: PreTrainedModel) -> None:
        if task.held_out is not None and arguments.evaluate:
            measured[row] = _evaluate(mode, task, model, tokenizer, config)

    mode = "search" if config.max_searches else "direct"
    checkpoint = _checkpoint(config, folder)
    warm_folder = folder / "warm_start"
    if checkpoint is None:  # a resumed run has all of this behind it
        # 1. What the model can do without having learnt to search.
        for baseline in arguments.baselines:
            measure(BASELINES.get(baseline, baseline), baseline, model)

        # 2. The warm start: the format, and weak behaviour.
        if arguments.warm_start_steps:
            _warm_up(model, tokenizer, arguments, config, warm_folder)
        measure("search, warm-started" if arguments.warm_start_steps else "search, before GRPO", mode, model)
    if arguments.warm_start_steps:
        # The reference model of beta > 0 is loaded from where the policy came from: that is the warm start now.
        model.config._name_or_path = str(warm_folder)

    # 3. GRPO.
    trainer = SearchGRPOTrainer(
        model=model,
        reward_funcs=list(arguments.reward_funcs),
        args=config,
        train_dataset=task.train,
        eval_dataset=task.held_out,
        processing_class=tokenizer,
        retriever=task.retriever,
        peft_config=_peft(peft_config),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(StepLines)
    if arguments.evaluate_every and task.held_out is not None:
        trainer.add_callback(_EvaluateEvery(arguments.evaluate_every, trainer, task, tokenizer))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(folder))
    measure("search, after GRPO", mode, trainer.accelerator.unwrap_model(trainer.model))

    # 4. What came of it.
    if trainer.accelerator.is_main_process:
        _write_results(folder, measured, trainer.state.log_history, time.perf_counter() - started)
    return measured


class _EvaluateEvery(TrainerCallback):
    """Measures held-out EM every so many steps; the numbers go out with the step's own log."""

    def __init__(self, steps: int, trainer: SearchGRPOTrainer, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
        self.steps, self.trainer, self.task, self.tokenizer = steps, trainer, task, tokenizer

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps:
            return
        model, config = self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer.args
        result = _evaluate("search" if config.max_searches else "direct", self.task, model, self.tokenizer, config)
        for name, value in (("eval/em", result.em), ("eval/searches", result.searches)):
            self.trainer._metrics["train"][name].append(value)


def _warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TaskArguments,
    config: SearchGRPOConfig,
    folder: Path,
) -> None:
    if arguments.questions != "world":
        raise UserError("warm_start_steps needs questions: world; for other data run trl-search sft first")
    protocol = load_protocol(
        config.protocol, tokenizer, instruction=config.instruction, system_prompt=config.system_prompt
    )
    # The policy warms up in another world: it has read none of the passages that it is trained and measured on.
    world = generate_world(passages=arguments.world_passages, seed=arguments.world_seed + _ELSEWHERE)
    warm_start(
        model,
        protocol,
        world,
        load_retriever("bm25", passages=world.passages),
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


def _evaluate(
    mode: str, task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: SearchGRPOConfig
) -> Evaluation:
    assert task.held_out is not None
    state = PartialState()
    rows = list(task.held_out)[state.process_index :: state.num_processes]
    model.to(config.device)  # type: ignore[arg-type]
    with torch.no_grad():
        return evaluate(
            mode,
            rows,
            policy=TransformersPolicy(model, tokenizer, max_sequences=config.rollout_batch_size),
            tokenizer=tokenizer,
            environment=search_environment(task.retriever, config),
            limits=config.limits,
            protocol=config.protocol,
            # A baseline is asked in its own words: the recipe's instruction is the search agent's.
            instruction=config.instruction if mode == "search" else None,
            system_prompt=config.system_prompt,
            gather=gather_object,
        )


def _load_model(
    name: str, model_config: ModelConfig, config: SearchGRPOConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"dtype": model_config.dtype or "float32"}
    if isinstance(config.model_init_kwargs, dict):
        options |= config.model_init_kwargs
    if model_config.attn_implementation:
        options["attn_implementation"] = model_config.attn_implementation
    if Path(name).is_absolute() and not Path(name).exists():
        raise UserError(f"there is no model at {name}")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        name, revision=model_config.model_revision, trust_remote_code=config.trust_remote_code, **options
    )
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        name,
        revision=model_config.model_revision,
        padding_side="left",
        truncation_side="left",
        trust_remote_code=config.trust_remote_code,
    )
    return model, tokenizer


def _peft(peft_config: PeftConfig | None) -> PeftConfig | None:
    if peft_config is not None and not getattr(peft_config, "target_modules", None):
        peft_config.target_modules = "all-linear"  # type: ignore[attr-defined]
    return peft_config


def _checkpoint(config: SearchGRPOConfig, folder: Path) -> str | None:
    """The checkpoint to resume from: `resume_from_checkpoint: last` takes the newest of the output folder."""
    if config.resume_from_checkpoint != "last":
        return config.resume_from_checkpoint
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if checkpoint is None:
        raise UserError(f"resume_from_checkpoint=last, and {folder} holds no checkpoint")
    return str(checkpoint)


def _write_results(
    folder: Path, measured: Mapping[str, Evaluation], history: Sequence[Mapping[str, Any]], seconds: float
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    results = {row: dataclasses.asdict(result) for row, result in measured.items()}
    record = {"seconds": seconds, "rows": results, "history": list(history)}
    (folder / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    curves = draw_curves(history, folder / "curves.png", measured)
    if measured:
        print(f"\n{results_table(measured)}\n")
    print(f"{seconds:.0f} s in all. Model, results.json and {curves.name} are in {folder}.")


def _sample(dataset: Dataset, limit: int | None, seed: int) -> Dataset:
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(limit))


def _as_dataset(questions: Sequence[Question]) -> Dataset:
    return Dataset.from_list([question.row() for question in questions])
