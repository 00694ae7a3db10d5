"""`trl-search sft`: collects attempts at questions, keeps the good ones, and fine-tunes on them.

The attempts come from scripts of the embedded world (`questions: world`), which play it at the asked quality; from
scripted players of any other questions (`teacher: scripts`), which know the golden answers, or from a script of the
user's own (`script`); or from a policy that answers with real searches. Of all but the first, the right attempts are
kept (`collect.py`, `select.py`).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from trl_search.common.errors import UserError
from trl_search.common.files import write_json
from trl_search.config.agent import SETTINGS_FILE, AgentSettings, build_environment, protocol_of
from trl_search.config.task import QuestionArguments, TaskArguments, load_task
from trl_search.data.evidence import check_corpus
from trl_search.data.question_players import QuestionPlayers
from trl_search.data.scripted_players import PLAYERS, WEAK, scripted_trajectories
from trl_search.data.user_script import UserScript
from trl_search.data.world import generate_world
from trl_search.environment.registry import SEARCH, takes_retriever
from trl_search.environment.script import load_script
from trl_search.policies.base import Policy
from trl_search.policies.loading import adapter_config, base_name, check_vocabulary, load_base, load_tokenizer
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.policies.vllm_server import VLLMServerPolicy
from trl_search.protocols import SEARCH_TOOL
from trl_search.retrieval import load_retriever
from trl_search.trainer.cold_start.collect import PROBE, Attempt, collect, missing, read_attempts
from trl_search.trainer.cold_start.demonstrations import Demonstration, demonstrating, play_demonstrations
from trl_search.trainer.cold_start.select import Rules, describe, select, write_kept
from trl_search.trainer.inputs import refuse_quantization
from trl_search.trainer.sft import SearchSFTConfig, sft_dataset, sft_rows, train
from trl_search.trainer.tag_rows import initialise_tags, warn_of_untrained_tags
from trl_search.types import Passage, Sampling

logger = logging.getLogger(__name__)


@dataclass
class ColdStartArguments(AgentSettings, QuestionArguments):
    """Where the attempts come from, and which are kept."""

    max_failed_share: float = field(
        default=0.5,
        metadata={"help": "Collecting stops with an error when more than this share of the attempts has failed."},
    )
    rollout_batch_size: int = field(
        default=64, metadata={"help": "Attempts under way at once; a vLLM server takes several hundred."}
    )

    teacher: str = field(
        default="self",
        metadata={
            "help": "Who makes the attempts. self: the model that is trained. A model of the hub, a folder, or the "
            "address of a `vllm serve` (http://localhost:8000), with the same tokenizer. scripts: scripted players, "
            "for any questions and without a model: they look up what the question names, then what the passages lead "
            "to, by the gold passages where the rows know them and by trying queries where they do not."
        },
    )
    script: str | None = field(
        default=None,
        metadata={
            "help": "With teacher: scripts, your own script in place of those that ship, as an import path: "
            "my_agent:open_page. It can call the tools of any environment (docs/own-agent.md). With demonstrations, "
            "it plays those."
        },
    )
    quality: str = field(
        default=",".join(f"{name}={share}" for name, share in WEAK.items()),
        metadata={
            "help": f"With teacher: scripts and questions: world, the shares of the players {', '.join(PLAYERS)}."
        },
    )
    demonstrations: int = field(
        default=0,
        metadata={
            "help": "With a model as the teacher: it sees this many answered questions before each prompt, which "
            "scripted players played. They are left out of what is trained on (context distillation)."
        },
    )
    samples_per_question: int = field(default=4, metadata={"help": "Attempts at each question."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the attempts."})
    top_p: float = field(default=1.0, metadata={"help": "Top-p of the attempts; here it may be below 1."})
    collection: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the attempts, appended to as they finish, and read again by the next run. Default: "
            "output_dir/collection."
        },
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Train into an output_dir that holds a finished model, and replace it."}
    )
    collect_only: bool = field(default=False, metadata={"help": "Collect and choose, and do not train."})

    min_f1: float | None = field(
        default=None, metadata={"help": "Keep answers of at least this F1. Default: exact matches alone."}
    )
    well_formed: bool = field(
        default=True, metadata={"help": "Keep attempts alone in which every call and the answer are well-formed."}
    )
    min_searches: int = field(
        default=1, metadata={"help": "Keep attempts with at least this many searches, or calls of another tool."}
    )
    keep_per_question: int = field(default=2, metadata={"help": "Keep at most this many attempts per question."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples_per_question", "keep_per_question", "rollout_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.min_f1 is not None and not 0 < self.min_f1 <= 1:
            raise UserError(f"min_f1={self.min_f1} must be above 0, and at most 1")
        played = self.teacher == "scripts" or self.demonstrations > 0
        if self.script is not None:
            if not played:
                raise UserError(f"script: {self.script} is played with teacher: scripts: set it, or leave script out")
            load_script(self.script)
        elif played and self.environment != SEARCH:
            raise UserError(
                f"the scripted players that ship only search, and the environment is {self.environment}: give a "
                "script of your own (script: my_agent:open_page; docs/own-agent.md), or take a model as the teacher "
                "and set demonstrations: 0"
            )
        elif self.teacher == "scripts" and self.questions != "world" and not self.max_searches:
            raise UserError("teacher: scripts shows how to search: set max_searches to at least 1")
        if self.demonstrations < 0 or (self.demonstrations and self.teacher == "scripts"):
            raise UserError(
                "demonstrations are shown to a model: set them to 0 with teacher: scripts, or take another"
            )
        if self.collect_only and self.plays_the_world:
            raise UserError("the trajectories of the world's scripts are not collected: leave collect_only out")

    @property
    def plays_the_world(self) -> bool:
        """Whether the shipped scripts write right trajectories of the world: nothing is collected or chosen."""
        return self.teacher == "scripts" and self.questions == "world" and self.script is None

    @staticmethod
    def settled(values: dict[str, Any]) -> dict[str, Any]:
        """With `collect_only` nothing is trained, so the precision of the training asks for no GPU."""
        return {**values, "bf16": False, "fp16": False} if values["collect_only"] else values


_TASK_KEYS = tuple(key.name for key in dataclasses.fields(QuestionArguments))
# These keys, the agent's keys and the questions define an attempt. A collection stays valid when other keys change, or
# when the file of questions moves.
_DEFINING = (*(key for key in _TASK_KEYS if key != "questions"), "temperature", "top_p")


def run_sft(arguments: ColdStartArguments, config: SearchSFTConfig, model_config: ModelConfig) -> Path:
    """Runs a recipe of `trl-search sft`. Returns the folder of the model, or of the collection with `collect_only`."""
    refuse_quantization(model_config)
    name = base_name(model_config)
    tokenizer = load_tokenizer(
        name,
        revision=model_config.model_revision,
        trust_remote_code=config.trust_remote_code,
        eos_token=config.eos_token,
    )
    folder = Path(arguments.collection or f"{config.output_dir}/collection")
    if arguments.plays_the_world:
        rows = _scripted(arguments, config, tokenizer)
    else:
        kept = _collect_and_choose(folder, arguments, config, tokenizer, model_config)
        if arguments.collect_only:
            return folder
        rows = sft_rows((attempt.prompt_ids, attempt.ids, attempt.mask) for attempt in kept)
    model = load_base(name, model_config, config)
    check_vocabulary(model, tokenizer)
    protocol = protocol_of(arguments.agent, tokenizer, (SEARCH_TOOL,))
    if config.initialise_tags:
        initialise_tags(model, protocol)
    warn_of_untrained_tags(model, protocol)
    train(model, tokenizer, rows, config, peft_config=adapter_config(model_config))
    if PartialState().is_main_process:
        write_json(Path(f"{config.output_dir}/{SETTINGS_FILE}"), arguments.agent.as_json())
        print(f"{config.output_dir}: trained on {len(rows):,} trajectories")
    return Path(config.output_dir or "")


def _scripted(arguments: ColdStartArguments, config: SearchSFTConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    if config.max_steps < 1:
        raise UserError("teacher: scripts writes as many trajectories as are asked for: set max_steps")
    world = generate_world(arguments.world_passages, arguments.world_seed)
    retriever = load_retriever("bm25", passages=world.passages)
    environment = build_environment(arguments.agent, retriever)
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
            f"{len(left)} attempts are missing in {folder}, and one process collects: run this recipe with "
            "--collect_only true first, without accelerate launch"
        )
    teacher = base_name(model_config) if arguments.teacher == "self" else arguments.teacher
    environment = build_environment(arguments.agent, task.retriever)
    protocol = protocol_of(arguments.agent, tokenizer, environment.tools, environment.instruction)
    limits = arguments.agent.limits

    def find(queries: Sequence[str], k: int) -> list[list[Passage]]:
        assert task.retriever is not None  # only scripted players search, in a search environment
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
        settings={
            **{key: getattr(arguments, key) for key in _DEFINING},
            **arguments.agent.described(),
            "seed": config.seed,
            "teacher": teacher,
            **({"demonstrations": arguments.demonstrations} if arguments.demonstrations else {}),
            **(players.described() if isinstance(players, UserScript) else {}),
        },
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
        print(f"{describe(attempts, kept, outcomes)}\n{collected.new:,} new, {collected.before:,} from before", end="")
        print(f", {collected.failed:,} failed searches to try again" if collected.failed else "", f"\n{path}", sep="")
    return kept


def _tell_of_evidence(rows: Sequence[Mapping[str, Any]]) -> None:
    without = sum(not row.get("gold_ids") and not row.get("gold_titles") for row in rows)
    if without:
        logger.warning(
            "%s of %s questions name no gold passages: players try queries until one finds a golden answer, and leave "
            "yes/no questions out",
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
    if teacher.startswith(("http://", "https://")):
        check_server_tokenizer(teacher, tokenizer)
        return VLLMServerPolicy(teacher)
    theirs = load_tokenizer(teacher, trust_remote_code=config.trust_remote_code)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{teacher} has another tokenizer than the model that is trained, so its tokens mean something else: take "
            "a teacher of the same family"
        )
    model = load_base(teacher, model_config, config).to(config.device)  # type: ignore[arg-type]
    return TransformersPolicy(model, tokenizer, max_sequences=arguments.rollout_batch_size)


def check_server_tokenizer(url: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `UserError` if the server's tokenizer encodes the probe differently."""
    try:
        answer = httpx.post(f"{url.rstrip('/')}/tokenize", json={"prompt": PROBE, "add_special_tokens": False})
        ids = answer.raise_for_status().json()["tokens"]
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise UserError(
            f"no vLLM server answers at {url}/tokenize ({error}): start it first (`vllm serve`)"
        ) from error
    if ids != tokenizer.encode(PROBE, add_special_tokens=False):
        raise UserError(
            f"the server at {url} has another tokenizer than the model that is trained, so its tokens mean something "
            "else: serve a teacher of the same family"
        )


def _shares(text: str) -> dict[str, float]:
    try:
        return {name.strip(): float(share) for name, share in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise UserError(f"quality: write it as guess=0.5,good=0.5, not {text!r}") from error
