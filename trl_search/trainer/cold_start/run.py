"""`trl-search sft`: collects attempts at questions, keeps the good ones, and fine-tunes on them.

The attempts come from one of

- scripts of the embedded world (`teacher: scripts`, `questions: world`), with the mix of players in `quality`;
- scripted players of other questions (`teacher: scripts`), which know the golden answers, or a user's script
(`script`);
- a policy that answers with real searches.

All attempts of the first are trained on; of the others, only the right ones (`collect.py`, `select.py`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from trl_search.common.errors import UserError
from trl_search.common.files import write_json
from trl_search.config.agent import SETTINGS_FILE, build_environment, protocol_of
from trl_search.config.refused_keys import refuse_keys
from trl_search.config.run_file import shown_path
from trl_search.config.task import QuestionArguments, TaskArguments, load_task, searched_of
from trl_search.data.scripted_players import scripted_trajectories
from trl_search.data.world import generate_world
from trl_search.environment.registry import call_word, described, takes_retriever
from trl_search.policies.adapters import adapter_config, check_target_modules, refuse_adapter_folder
from trl_search.policies.loading import base_name, check_vocabulary, load_base, load_tokenizer
from trl_search.protocols import SEARCH_TOOL
from trl_search.records.folder import SFT
from trl_search.records.run_log import RunLog
from trl_search.retrieval import load_retriever
from trl_search.trainer.callbacks.progress import announce, counted
from trl_search.trainer.cold_start.arguments import ColdStartArguments
from trl_search.trainer.cold_start.collect import Attempt, collect, missing, read_attempts
from trl_search.trainer.cold_start.select import Rules, describe, select, write_kept
from trl_search.trainer.cold_start.teacher import Teacher
from trl_search.trainer.inputs import refuse_one_process_for_several_gpus
from trl_search.trainer.sft import SearchSFTConfig, sft_dataset, sft_rows, train
from trl_search.trainer.tag_rows import initialise_tags, warn_of_untrained_tags
from trl_search.types import Sampling

_TASK_KEYS = tuple(key.name for key in dataclasses.fields(QuestionArguments))
# `_DEFINING`, the agent's keys, the questions, the retriever and the teacher define an attempt. A collection stays
# valid if other keys change, or if the questions, an index or the teacher's folder move.
_DESCRIBED = ("questions", "retriever", "retriever_options")  # described by content instead
_DEFINING = (*(key for key in _TASK_KEYS if key not in _DESCRIBED), "temperature", "top_p")


def run_sft(arguments: ColdStartArguments, config: SearchSFTConfig, model_config: ModelConfig) -> Path:
    """Runs a recipe of `trl-search sft`. Returns the folder of the model, or of the collection with `collect_only`."""
    refuse_keys(arguments, config, model_config)
    adapter = adapter_config(model_config)
    if not arguments.collect_only:
        refuse_adapter_folder(base_name(model_config))
        refuse_one_process_for_several_gpus(config)
    name = base_name(model_config)
    tokenizer = load_tokenizer(
        name,
        revision=model_config.model_revision,
        trust_remote_code=config.trust_remote_code,
        eos_token=config.eos_token,
    )
    folder = Path(arguments.collection or f"{config.output_dir}/collection")
    log = RunLog(model=name, protocol=arguments.protocol, method=SFT)

    def load_model() -> PreTrainedModel:
        model = load_base(name, model_config, config)
        check_vocabulary(model, tokenizer)
        check_target_modules(model, adapter)
        return model

    # Load the model first, to report its problems before anything is collected, unless a teacher needs the memory.
    teacher_is_loaded = not (arguments.teacher_is_scripted or arguments.teacher_is_served)
    model = None if arguments.collect_only or teacher_is_loaded else load_model()
    if arguments.plays_the_world:
        rows = _scripted(arguments, config, tokenizer, log)
    else:
        kept = _collect_and_choose(folder, arguments, config, tokenizer, model_config, log)
        if arguments.collect_only:
            return folder
        rows = sft_rows((attempt.prompt_ids, attempt.ids, attempt.mask) for attempt in kept)
    announce("SFT", f"on {len(rows):,} trajectories")
    model = model or load_model()
    protocol = protocol_of(arguments.agent, tokenizer, (SEARCH_TOOL,))
    if config.initialise_tags:
        initialise_tags(model, protocol)
    warn_of_untrained_tags(model, protocol)
    log.agent = arguments.agent.described()
    of_agent = dataclasses.asdict(arguments.agent)
    task = {key: value for key, value in dataclasses.asdict(arguments).items() if key not in of_agent}
    log.task = {"base_model": model_config.model_name_or_path, **task, "train_trajectories": len(rows)}
    train(model, tokenizer, rows, config, peft_config=adapter, run_log=log)
    output = Path(config.output_dir or ".")
    if PartialState().is_main_process:
        write_json(output / SETTINGS_FILE, arguments.agent.as_json())
        print(f"{shown_path(output)}: trained on {len(rows):,} trajectories")
    return output


def _scripted(
    arguments: ColdStartArguments, config: SearchSFTConfig, tokenizer: PreTrainedTokenizerBase, log: RunLog
) -> Dataset:
    if config.max_steps < 1:
        raise UserError("teacher: scripts needs max_steps, which sets the number of trajectories: set max_steps")
    world = generate_world(arguments.world_passages, arguments.world_seed)
    retriever = load_retriever("bm25", passages=world.passages)
    environment = build_environment(arguments.agent, retriever)
    log.environment = described(environment)
    trajectories = scripted_trajectories(
        world,
        retriever,
        protocol_of(arguments.agent, tokenizer, environment.tools, environment.instruction),
        n=config.max_steps * config.train_batch_size * config.gradient_accumulation_steps * config.world_size,
        quality=_shares(arguments.quality),
        seed=config.seed,
        environment=environment,
    )
    return sft_dataset(trajectories, max_tokens=config.max_length)


def _collect_and_choose(
    folder: Path,
    arguments: ColdStartArguments,
    config: SearchSFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    model_config: ModelConfig,
    log: RunLog,
) -> list[Attempt]:
    # 1. The questions, the environment and the teacher.
    task = load_task(
        TaskArguments(**{key: getattr(arguments, key) for key in _TASK_KEYS}, evaluate=False),
        seed=config.seed,
        evidence=arguments.plays_with_evidence,
        searches=takes_retriever(arguments.environment),
    )
    environment = build_environment(arguments.agent, task.retriever)
    log.environment = described(environment)
    protocol = protocol_of(arguments.agent, tokenizer, environment.tools, environment.instruction)
    teacher = Teacher(arguments, config, model_config, protocol, environment, task)

    # 2. The attempts that are missing.
    left = missing(folder, len(teacher.rows), arguments.samples_per_question)
    if left and PartialState().num_processes > 1:
        raise UserError(
            f"{len(left)} attempts are missing in {folder}, but only a single process can collect: run this recipe "
            "with --collect_only true first, without accelerate launch"
        )
    if left:
        asked = f"{counted(len(left), 'attempt')} at {counted(len(teacher.rows), 'question')}"
        announce("Collecting", f"{asked}, teacher: {teacher.name}")
    collected = collect(
        folder,
        teacher.rows,
        policy=teacher.policy,
        player=teacher.player,
        environment=environment,
        protocol=protocol,
        limits=arguments.agent.limits,
        sampling=Sampling(temperature=arguments.temperature, top_p=arguments.top_p, seed=config.seed),
        samples=arguments.samples_per_question,
        concurrency=arguments.rollout_batch_size,
        settings={
            **{key: getattr(arguments, key) for key in _DEFINING},
            **arguments.agent.described(),
            **teacher.described(),
            "seed": config.seed,
            "searched": searched_of(arguments).content(),
        },
        max_failed_share=arguments.max_failed_share,
    )

    # 3. The attempts that are kept.
    attempts = [one for one in read_attempts(folder) if one.sample < arguments.samples_per_question]
    rules = Rules(
        min_f1=arguments.min_f1,
        well_formed=arguments.well_formed,
        min_searches=arguments.min_searches,
        keep_per_question=arguments.keep_per_question,
        max_tokens=config.max_length,
    )
    kept, outcomes = select(attempts, rules)
    if PartialState().is_main_process:
        path = write_kept(folder, kept)
        print(describe(attempts, kept, outcomes, call_word(arguments.environment)))
        again = f", {collected.failed:,} that failed to try again" if collected.failed else ""
        print(f"{collected.new:,} new, {collected.before:,} from before{again}\n{shown_path(path)}")
    return kept


def _shares(text: str) -> dict[str, float]:
    try:
        return {name.strip(): float(share) for name, share in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise UserError(f"quality={text!r} is not a list of shares: write it as guess=0.5,good=0.5") from error
