"""The model card of an agent: what it is, how to run it, its results, how it was trained.

All facts come from the records of a run: the files of the model, `run.json`, and `results.json` of the training and of
`trl-search eval`. The card shows only configuration keys that say how the policy was trained, and only the names of
files: paths, addresses and keys of a machine are not published.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shlex
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from trl_search.config.agent import AgentSettings
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.data import HUB_SETS
from trl_search.data.scripted_players import Script, play_scripts
from trl_search.environment import SearchEnvironment
from trl_search.policies.tiny import tiny_policy_path
from trl_search.protocols import Protocol
from trl_search.records.publish.card_facts import CardFacts
from trl_search.records.publish.results import Result
from trl_search.records.publish.upload import on_hub
from trl_search.retrieval import load_retriever
from trl_search.types import Answer, Passage, Search

if TYPE_CHECKING:
    import jinja2

EXAMPLE_QUESTION = "Where was the author of Dracula born?"
_EXAMPLE_PASSAGES = (
    Passage("1", "Dracula", "Dracula is a novel by Bram Stoker, published in 1897."),
    Passage("2", "Bram Stoker", "Bram Stoker was born in Dublin in 1847."),
)
# Keys of run.json that say how a policy was trained, not on which machine.
TASK_KEYS = (
    "questions", "eval_questions", "max_train_questions", "world_passages", "world_seed", "retriever", "reward_funcs",
    "warm_start_steps", "warm_start_learning_rate", "teacher", "demonstrations", "samples_per_question", "min_f1",
    "well_formed", "min_searches", "keep_per_question",
)  # fmt: skip
CONFIG_KEYS = (
    "protocol", "instruction", "system_prompt", "chat_template_kwargs", "max_searches", "passages_per_query",
    "max_queries_per_search", "max_turn_length", "max_observation_length", "max_completion_length",
    "mask_observations", "reward_weights", "num_generations", "per_device_train_batch_size",
    "gradient_accumulation_steps", "steps_per_generation", "num_iterations", "max_steps", "num_train_epochs",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "beta", "epsilon",
    "epsilon_high", "loss_type", "scale_rewards", "temperature", "top_p", "use_vllm", "vllm_mode",
    "vllm_importance_sampling_mode", "bf16", "gradient_checkpointing", "seed",
)  # fmt: skip
# Options of the method; those that a run has changed are published.
OPTION_KEYS = (
    "turn_credit", "turn_credit_coef", "llds_coef", "search_floor_steps", "refill_groups", "curriculum", "carry_over",
    "max_staleness", "importance_sampling_level", "top_entropy_quantile",
)  # fmt: skip
_DEFAULTS = {key.name: key.default for key in dataclasses.fields(SearchGRPOConfig)}


def write_card(facts: CardFacts) -> ModelCard:
    """Writes the card: metadata, and the text of `model_card.md.jinja`."""
    name, settings = facts.repo_id.rstrip("/").rsplit("/", 1)[-1], facts.settings or AgentSettings()
    asked = facts.is_search_agent
    agent = "a search agent: it reasons, calls a search tool, reads what was found, searches again, and answers."
    if not asked:
        called = f"calls tools ({', '.join(facts.tools)}), reads their results," if facts.tools else "is replied to,"
        agent = f"an agent that reasons, {called} and answers."
    body = _template().render(
        facts=facts,
        settings=settings,
        name=name,
        adapter=facts.adapter is not None,
        base=_base_link(facts),
        agent=agent,
        command=_command(facts) if asked else "",
        snippet=snippet(facts) if asked else "",
        conversation=example_conversation(facts.protocol, settings) if asked else "",
        data=_data(facts),
        recipe=yaml.safe_dump(_recipe(facts), sort_keys=False, allow_unicode=True).rstrip(),
        versions=facts.versions,
        trained_on=_trained_on(facts),
    )
    return ModelCard(f"---\n{_metadata(facts, name).to_yaml()}\n---\n\n{body.rstrip()}\n")


# A training writes one card per checkpoint, so the parts that all cards share are cached.


@functools.cache
def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cell": _cell, "fenced": _fenced, "number": _number}
    source = resources.files("trl_search.records.publish").joinpath("model_card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(source)


@functools.lru_cache(maxsize=4)
def _question_of_the_world(passages: int, seed: int) -> str:
    from trl_search.data.world import generate_world

    return generate_world(passages, seed).questions("test", 1)[0].question


def snippet(facts: CardFacts) -> str:
    """Runnable Python code that asks the agent one question."""
    imports = ["from trl_search import load_retriever", "from trl_search.chat import load_chat"]
    retriever = 'load_retriever("web")  # or "http", "bm25", "dense", ...'
    if facts.in_world:
        imports.append("from trl_search.data.world import generate_world")
        retriever = _world(facts, 'load_retriever("bm25", passages=generate_world({}, seed={}).passages)')
    return "\n".join(
        [
            *imports,
            "",
            f"retriever = {retriever}",
            f"with load_chat({json.dumps(facts.repo_id)}, retriever) as chat:",
            f"    reply = chat.ask({json.dumps(question_for(facts))})",
            "print(reply.answer, reply.queries)",
        ]
    )


def question_for(facts: CardFacts) -> str:
    """A question that the agent can answer with its retriever."""
    if not facts.in_world:
        return EXAMPLE_QUESTION
    return _question_of_the_world(facts.task.get("world_passages", 2000), facts.task.get("world_seed", 0))


def example_conversation(protocol: Protocol, settings: AgentSettings) -> str:
    """A conversation exactly as the model reads it, made by the rollout loop of training with a scripted policy."""
    return _played(protocol, settings.max_searches, settings.passage_template)


@functools.lru_cache(maxsize=4)
def _played(protocol: Protocol, max_searches: int, passage_template: str) -> str:
    def script() -> Script:
        if max_searches:
            yield "I need the author.", Search(("author of Dracula",))
            yield "The author is Bram Stoker. I need the birthplace.", Search(("where was Bram Stoker born?",))
        yield "Bram Stoker was born in Dublin.", Answer("Dublin")

    environment = SearchEnvironment(
        load_retriever("bm25", passages=_EXAMPLE_PASSAGES, backend="numpy"),  # numba takes longer to load
        passages_per_query=1,
        max_searches=max(3, max_searches),
        passage_template=passage_template,
    )
    prompt = protocol.prompt_ids(protocol.messages(EXAMPLE_QUESTION))
    trajectory = play_scripts([script()], [prompt], protocol, environment)[0]
    return protocol.decode([*prompt, *trajectory.ids])


def _command(facts: CardFacts) -> str:
    """Shell commands that install trl-search and ask the agent a question."""
    extra, world = ("", f" --retriever world {_world(facts, '--world_passages {} --world_seed {}')}")
    if not facts.in_world:
        extra, world = "[web]", ""
    question = json.dumps(question_for(facts))
    return f'pip install "trl-search{extra}"\ntrl-search chat {shlex.quote(facts.repo_id)} {question}{world}'


def _recipe(facts: CardFacts) -> dict[str, Any]:
    """The keys of the recipe that are published."""
    recipe: dict[str, Any] = {"model_name_or_path": facts.hub_base} if facts.hub_base else {}
    recipe |= {key: _published(facts.task[key]) for key in TASK_KEYS if facts.task.get(key) is not None}
    recipe |= {key: facts.config[key] for key in CONFIG_KEYS if facts.config.get(key) is not None}
    given = {key: facts.config.get(key, _DEFAULTS[key]) for key in OPTION_KEYS}
    recipe |= {key: value for key, value in given.items() if value != _DEFAULTS[key]}
    if facts.adapter is not None:
        names = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
        adapter = {key: facts.adapter[name] for name, key in names.items() if facts.adapter.get(name) is not None}
        recipe |= {"use_peft": True, **adapter}
    return recipe


def _data(facts: CardFacts) -> str:
    questions = facts.task.get("questions")
    if facts.in_world:
        data = "questions about the embedded world"
    elif questions in HUB_SETS:
        repository = HUB_SETS[questions].repository
        data = f"the questions of [{repository}](https://huggingface.co/datasets/{repository})"
    else:
        data = f"the questions of `{_published(questions)}`" if questions else "questions that are not recorded"
    kind = facts.task.get("retriever")
    return data + (f", answered from a `{_published(kind)}` retriever" if kind else "")


def _trained_on(facts: CardFacts) -> str:
    hardware = facts.info.get("hardware") or {}
    gpus, processes = hardware.get("gpus") or [], hardware.get("processes")
    where = f"{len(gpus)} x {gpus[0]}" if gpus else f"{hardware.get('cpus', 'some')} CPU cores"
    return f"Trained on {where}, {processes} process{'' if processes == 1 else 'es'}. " if processes else ""


def _metadata(facts: CardFacts, name: str) -> ModelCardData:
    base = facts.hub_base
    questions = facts.task.get("questions")
    datasets = [HUB_SETS[questions].repository] if questions in HUB_SETS else None
    results = [_eval_result(one) for one in facts.results if one.final]
    return ModelCardData(
        model_name=name if results else None,
        license=facts.license,
        base_model=base,
        base_model_relation=("adapter" if facts.adapter is not None else "finetune") if base else None,
        library_name="transformers" if facts.adapter is None else "peft",
        pipeline_tag="text-generation",
        tags=["trl-search", "search-agent", "trl", "sft" if facts.is_cold_start else "grpo", "tool-use"],
        datasets=datasets,
        eval_results=results or None,
    )


def _eval_result(one: Result) -> EvalResult:
    held = HUB_SETS.get(one.dataset)
    return EvalResult(
        task_type="question-answering",
        dataset_type=held.repository if held else "other",
        dataset_name=one.dataset,
        dataset_config=held.config if held else None,
        dataset_split=held.split if held else None,
        metric_type="exact_match",
        metric_name="EM",
        metric_value=round(one.em, 4),
    )


def _base_link(facts: CardFacts) -> str:
    base = facts.base_model
    if not base:
        return "a base model that is not recorded" if facts.adapter is not None else ""
    if base == "tiny" or Path(base).parts[-2:] == Path(tiny_policy_path()).parts[-2:]:
        return "the small policy that ships with trl-search"
    return f"[{base}](https://huggingface.co/{base})" if on_hub(base) else f"`{Path(base).name}` (a local model)"


def _world(facts: CardFacts, form: str) -> str:
    """Fills the size and the seed of the embedded world into a format string."""
    return form.format(facts.task.get("world_passages", 2000), facts.task.get("world_seed", 0))


def _published(value: Any) -> Any:
    """A name without details of the machine: only the last part of a path, no address."""
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        return "http://your-server"
    if isinstance(value, str) and ("/" in value or "\\" in value) and not on_hub(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    if isinstance(value, list):
        return [_published(one) for one in value]
    return value


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
