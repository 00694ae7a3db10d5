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
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from trl_search.common.errors import UserError
from trl_search.common.files import write_json
from trl_search.config.agent import SETTINGS_FILE, build_environment, protocol_of
from trl_search.config.run_file import shown_path
from trl_search.config.task import QuestionArguments, TaskArguments, load_task, searched_of
from trl_search.data.evidence import check_corpus
from trl_search.data.question_players import QuestionPlayers
from trl_search.data.scripted_players import scripted_trajectories
from trl_search.data.user_script import UserScript
from trl_search.data.world import generate_world
from trl_search.environment.registry import call_word, described, takes_retriever
from trl_search.evaluation.settings import describe_model
from trl_search.policies.adapters import adapter_config, check_target_modules, refuse_adapter_folder
from trl_search.policies.base import Policy
from trl_search.policies.loading import base_name, check_vocabulary, load_base, load_tokenizer
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.policies.vllm_address import client_options
from trl_search.policies.vllm_server import VLLMServerPolicy
from trl_search.protocols import SEARCH_TOOL
from trl_search.records.folder import SFT
from trl_search.records.run_log import RunLog
from trl_search.retrieval import load_retriever
from trl_search.trainer.callbacks.progress import announce, counted
from trl_search.trainer.cold_start.arguments import ColdStartArguments
from trl_search.trainer.cold_start.collect import PROBE, Attempt, collect, missing, read_attempts
from trl_search.trainer.cold_start.demonstrations import Demonstration, demonstrating, play_demonstrations
from trl_search.trainer.cold_start.select import Rules, describe, select, write_kept
from trl_search.trainer.inputs import refuse_one_process_for_several_gpus, refuse_push, refuse_quantization
from trl_search.trainer.sft import SearchSFTConfig, sft_dataset, sft_rows, train
from trl_search.trainer.tag_rows import initialise_tags, warn_of_untrained_tags
from trl_search.types import Passage, Sampling

logger = logging.getLogger(__name__)


_TASK_KEYS = tuple(key.name for key in dataclasses.fields(QuestionArguments))
# `_DEFINING`, the agent's keys, the questions, the retriever and the teacher define an attempt. A collection stays
# valid if other keys change, or if the questions, an index or the teacher's folder move.
_DESCRIBED = ("questions", "retriever", "retriever_options")  # described by content instead
_DEFINING = (*(key for key in _TASK_KEYS if key not in _DESCRIBED), "temperature", "top_p")


def run_sft(arguments: ColdStartArguments, config: SearchSFTConfig, model_config: ModelConfig) -> Path:
    """Runs a recipe of `trl-search sft`. Returns the folder of the model, or of the collection with `collect_only`."""
    refuse_quantization(model_config)
    adapter = adapter_config(model_config)
    if not arguments.collect_only:
        refuse_adapter_folder(base_name(model_config))
        refuse_one_process_for_several_gpus(config)
    refuse_push(config.push_to_hub, config.output_dir)
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
    teacher_is_loaded = arguments.teacher != "scripts" and not arguments.teacher_is_served
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
    state, scripts = PartialState(), arguments.teacher == "scripts"
    evidence = arguments.script is None and (scripts or arguments.demonstrations > 0)
    task = load_task(
        TaskArguments(**{key: getattr(arguments, key) for key in _TASK_KEYS}, evaluate=False),
        seed=config.seed,
        evidence=evidence,
        searches=takes_retriever(arguments.environment),
    )
    rows: list[Any] = list(task.train)
    left = missing(folder, len(rows), arguments.samples_per_question)
    if left and state.num_processes > 1:
        raise UserError(
            f"{len(left)} attempts are missing in {folder}, but only a single process can collect: run this recipe "
            "with --collect_only true first, without accelerate launch"
        )
    teacher = base_name(model_config) if arguments.teacher == "self" else arguments.teacher
    environment = build_environment(arguments.agent, task.retriever)
    log.environment = described(environment)
    protocol = protocol_of(arguments.agent, tokenizer, environment.tools, environment.instruction)
    limits = arguments.agent.limits

    def find(queries: Sequence[str], k: int) -> list[list[Passage]]:
        assert task.retriever is not None  # only scripted players call this, in a search environment
        return task.retriever.search(queries, k)

    players: QuestionPlayers | UserScript
    if arguments.script is not None:
        players = UserScript(arguments.script, environment, protocol)
    else:
        players = QuestionPlayers(
            lambda queries: find(queries, arguments.passages_per_query), protocol, max_searches=arguments.max_searches
        )
    pool: list[Demonstration] = []

    def policy() -> Policy | None:
        if evidence:
            check_corpus(rows, lambda queries: find(queries, 10))
            _tell_of_evidence(rows)
        if scripts:
            return None
        if arguments.demonstrations:
            pool.extend(play_demonstrations(rows, players, environment, protocol, limits, seed=config.seed))
        return _policy(teacher, arguments, config, tokenizer, model_config)

    def player(policy: Policy | None, row: Mapping[str, Any], seed: int) -> Policy:
        if policy is None:
            return players.for_row(row, seed)
        return demonstrating(policy, row, seed, pool=pool, count=arguments.demonstrations) if pool else policy

    if left:
        announce(
            "Collecting", f"{counted(len(left), 'attempt')} at {counted(len(rows), 'question')}, teacher: {teacher}"
        )
    is_folder = not scripts and Path(teacher).expanduser().is_dir()
    settings = {
        **{key: getattr(arguments, key) for key in _DEFINING},
        **arguments.agent.described(),
        "seed": config.seed,
        **({"demonstrations": arguments.demonstrations} if arguments.demonstrations else {}),
        **(players.described() if isinstance(players, UserScript) else {}),
        "searched": searched_of(arguments).content(),
        "teacher": describe_model(teacher) if is_folder else teacher,
    }
    collected = collect(
        folder,
        rows,
        policy=policy,
        player=player,
        environment=environment,
        protocol=protocol,
        limits=limits,
        sampling=Sampling(temperature=arguments.temperature, top_p=arguments.top_p, seed=config.seed),
        samples=arguments.samples_per_question,
        concurrency=arguments.rollout_batch_size,
        settings=settings,
        max_failed_share=arguments.max_failed_share,
    )
    attempts = [one for one in read_attempts(folder) if one.sample < arguments.samples_per_question]
    rules = Rules(
        min_f1=arguments.min_f1,
        well_formed=arguments.well_formed,
        min_searches=arguments.min_searches,
        keep_per_question=arguments.keep_per_question,
        max_tokens=config.max_length,
    )
    kept, outcomes = select(attempts, rules)
    if state.is_main_process:
        path = write_kept(folder, kept)
        print(describe(attempts, kept, outcomes, call_word(arguments.environment)))
        again = f", {collected.failed:,} that failed to try again" if collected.failed else ""
        print(f"{collected.new:,} new, {collected.before:,} from before{again}\n{shown_path(path)}")
    return kept


def _tell_of_evidence(rows: Sequence[Mapping[str, Any]]) -> None:
    without = sum(not row.get("gold_ids") and not row.get("gold_titles") for row in rows)
    if without:
        logger.warning(
            "%s of %s questions have no gold passages: players try queries until one finds a golden answer, and skip "
            "yes/no questions",
            f"{without:,}",
            f"{len(rows):,}",
        )


def _policy(
    teacher: str,
    arguments: ColdStartArguments,
    config: SearchSFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    model_config: ModelConfig,
) -> Policy:
    if arguments.teacher_is_served:
        check_server_tokenizer(teacher, tokenizer)
        return VLLMServerPolicy(teacher)
    theirs = load_tokenizer(teacher, trust_remote_code=config.trust_remote_code)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"the tokenizer of {teacher} differs from that of the model that is trained: use a teacher of the same "
            "family"
        )
    model = load_base(teacher, model_config, config).to(config.device)  # type: ignore[arg-type]
    return TransformersPolicy(model, tokenizer, max_sequences=arguments.rollout_batch_size)


def check_server_tokenizer(url: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `UserError` if the server's tokenizer encodes the probe differently."""
    try:
        with httpx.Client(**client_options(url)) as client:
            answer = client.post("/tokenize", json={"prompt": PROBE, "add_special_tokens": False})
        ids = answer.raise_for_status().json()["tokens"]
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise UserError(
            f"no vLLM server answers at {url}/tokenize ({error}): start one first (`vllm serve`)"
        ) from error
    if ids != tokenizer.encode(PROBE, add_special_tokens=False):
        raise UserError(
            f"the tokenizer of the server at {url} differs from that of the model that is trained: serve a teacher of "
            "the same family"
        )


def _shares(text: str) -> dict[str, float]:
    try:
        return {name.strip(): float(share) for name, share in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise UserError(f"quality={text!r} is not a list of shares: write it as guess=0.5,good=0.5") from error
