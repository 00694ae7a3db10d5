"""How an agent is asked: its protocol, its instruction, its budgets.

A policy that was trained on bare questions answers worse with an instruction before them, and the other way round. So
what it was trained with travels with it: in the folder of a run as `run.json`, in a published model as
`trl_search.json`, which `trl-search push` writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from transformers import PreTrainedTokenizerBase

from trl_search.common.errors import UserError, unknown_name
from trl_search.common.files import parse_object, read_object
from trl_search.config.run_file import REMEDY, find_run_file
from trl_search.environment import PASSAGE_TEMPLATE, SearchEnvironment
from trl_search.protocols import Protocol, load_protocol, protocol_names
from trl_search.retrieval.base import Retriever
from trl_search.rollout import Limits

FORMAT = 1
SETTINGS_FILE = "trl_search.json"


@dataclass
class AgentSettings:
    """The keys that shape a conversation. They stand here alone, each with its help.

    [`SearchGRPOConfig`] and the arguments of `trl-search sft` inherit them, and [`add_agent_options`] makes options of
    them for `trl-search eval` and `chat`. Treat an instance as a value: change it with `dataclasses.replace`.

    Raises:
        UserError: for a value that is out of range.
    """

    protocol: str = field(
        default="qwen_tools",
        metadata={
            "help": "How the policy calls the search tool and is answered. qwen_tools: the chat template's own tool "
            "calling; qwen_inline: the reply in the same assistant turn; search_r1: <search> and <information> tags, "
            "for base models.",
            "choices": protocol_names(),
        },
    )
    instruction: str | None = field(
        default=None, metadata={"help": "Text put before each question. Default: the protocol's own. '': none."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "The system message. Default: whatever the chat template puts there."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "More arguments of the chat template, as JSON: '{\"enable_thinking\": false}'."},
    )
    max_searches: int = field(
        default=4,
        metadata={
            "help": "Searches a trajectory may make. When they are spent, the policy is told so, and may answer. "
            "0: no tool."
        },
    )
    passages_per_query: int = field(
        default=3, metadata={"help": "Passages retrieved for each query (top_k is TRL's sampling parameter)."}
    )
    max_queries_per_search: int = field(default=4, metadata={"help": "Queries one call may hold; others are not run."})
    max_turn_length: int = field(default=512, metadata={"help": "Tokens of one turn of the policy."})
    max_observation_length: int = field(
        default=768,
        metadata={"help": "Tokens of one observation; its passages are cut one by one, all to the same limit."},
    )
    max_completion_length: int = field(
        default=3072,
        metadata={"help": "Tokens of a trajectory after its prompt: the policy's turns and what is retrieved."},
    )
    passage_template: str = field(
        default=PASSAGE_TEMPLATE,
        metadata={"help": "How a passage is shown to the policy, with {rank}, {title} and {text}."},
    )
    search_timeout_s: float = field(
        default=30.0,
        metadata={"help": "Seconds that one call of the retriever may take; time spent in the queue is not counted."},
    )

    def __post_init__(self) -> None:
        check_agent(self)

    @property
    def agent(self) -> AgentSettings:
        """These keys alone, out of a configuration that has more."""
        return AgentSettings(**{key.name: getattr(self, key.name) for key in dataclasses.fields(AgentSettings)})

    @property
    def limits(self) -> Limits:
        return Limits(self.max_completion_length, self.max_turn_length, self.max_observation_length)

    def as_json(self) -> dict[str, Any]:
        """What `trl_search.json` holds."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


def check_agent(settings: AgentSettings) -> None:
    """Refuses values that are out of range, and reads `chat_template_kwargs` where it is still JSON.

    Raises:
        UserError: names the key.
    """
    if settings.protocol not in protocol_names():
        raise unknown_name("protocol", settings.protocol, protocol_names())
    if isinstance(settings.chat_template_kwargs, str):
        settings.chat_template_kwargs = parse_object(
            settings.chat_template_kwargs, "chat_template_kwargs", '{"enable_thinking": false}'
        )
    if settings.search_timeout_s <= 0:
        raise UserError(f"search_timeout_s={settings.search_timeout_s} must be more than 0")
    for key in dataclasses.fields(AgentSettings):
        value, least = getattr(settings, key.name), 0 if key.name == "max_searches" else 1
        if isinstance(key.default, int) and (value is None or value < least):
            raise UserError(f"{key.name}={value} must be at least {least}")


def add_agent_options(parser: Any) -> None:
    """Adds an option to a command for each key of the agent. One that is not given leaves the key as in training.

    Args:
        parser (`argparse.ArgumentParser` or a group of one): The command's.
    """
    hints = get_type_hints(AgentSettings)
    group = parser.add_argument_group("how it is asked (default: as it was trained, if the model says so)")
    for key in dataclasses.fields(AgentSettings):
        kind = hints[key.name] if hints[key.name] in (int, float) else str
        text = key.metadata["help"] + (f" ({key.default})" if kind is not str or key.name == "protocol" else "")
        metavar = {int: "N", float: "SECONDS"}.get(kind, "JSON" if key.name == "chat_template_kwargs" else "TEXT")
        group.add_argument(f"--{key.name}", type=kind, metavar=metavar, help=text.replace("%", "%%"))


# The policy that ships reads the question alone, and has read no conversation longer than those of the quickstart.
TINY = AgentSettings(
    instruction="", max_searches=3, max_turn_length=96, max_observation_length=192, max_completion_length=512
)


def protocol_of(agent: AgentSettings, tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]]) -> Protocol:
    """What writes the agent's prompts and reads its turns.

    Args:
        tools (`Sequence[dict]`): Those of the environment that it acts in.
    """
    return load_protocol(
        agent.protocol,
        tokenizer,
        instruction=agent.instruction,
        system_prompt=agent.system_prompt,
        tools=tools,
        chat_template_kwargs=agent.chat_template_kwargs,
    )


def search_environment(
    retriever: Retriever, agent: AgentSettings, kind: type[SearchEnvironment] = SearchEnvironment
) -> SearchEnvironment:
    """The default world of the agent: the same in training, in a cold start, in evaluation and in a chat."""
    return kind(
        retriever,
        k=agent.passages_per_query,
        max_searches=agent.max_searches,
        max_queries=agent.max_queries_per_search,
        timeout_s=agent.search_timeout_s,
        passage_template=agent.passage_template,
    )


def trained_settings(model: str) -> AgentSettings:
    """How the model was trained to be asked, as far as that is known."""
    return TINY if model == "tiny" else read_settings(model) or AgentSettings()


def asked(trained: AgentSettings, options: Mapping[str, Any]) -> AgentSettings:
    """The settings of training, changed by those of a command's options that are the agent's and were given.

    Raises:
        UserError: for a value that is out of range.
    """
    keys = {key.name for key in dataclasses.fields(AgentSettings)}
    given = {name: value for name, value in options.items() if name in keys and value is not None}
    return dataclasses.replace(trained, **given)


def settings_of(values: Mapping[str, Any], source: str) -> AgentSettings:
    """The settings among the keys of a configuration; what is not there keeps its default.

    Raises:
        UserError: if a value has not the type of its key, naming `source`.
    """
    known = get_type_hints(AgentSettings)
    given = {name: values[name] for name in known if name in values}
    for name, value in given.items():
        if not isinstance(value, _types(known[name])) or isinstance(value, bool):
            raise UserError(f"{source}: {name} cannot be {value!r}: correct it there, or remove the file")
    try:
        return AgentSettings(**given)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def read_settings(model: str) -> AgentSettings | None:
    """What the model was trained with: from its folder, from the run that a checkpoint lies in, or from the hub;
    `None` where nothing is known.

    Example:
        >>> read_settings("runs/quickstart").instruction
        ''
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        found = _cached(model)
        return None if found is None else settings_of(read_object(Path(found), REMEDY), f"{model}/{SETTINGS_FILE}")
    if (folder / SETTINGS_FILE).is_file():
        return settings_of(read_object(folder / SETTINGS_FILE, REMEDY), str(folder / SETTINGS_FILE))
    if (path := find_run_file(model)) is None:
        return None
    config = read_object(path, REMEDY).get("config")
    if not isinstance(config, dict):
        raise UserError(f"{path} has no config: it is half-written; {REMEDY}")
    return settings_of(config, str(path))


def _types(hint: Any) -> tuple[type, ...]:
    """What `isinstance` takes for a field's type: `Mapping[str, Any] | None` is a mapping or none."""
    if hint is float:
        return (int, float)
    return tuple(get_origin(one) or one for one in get_args(hint) or (hint,))


def _cached(model: str) -> str | None:
    """The file of a model of the hub. A model that is not there, or no hub, is said where the weights are loaded."""
    from transformers.utils import cached_file

    from trl_search.policies.loading import model_source

    try:
        return cached_file(
            model_source(model),
            SETTINGS_FILE,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, UserError):
        return None
