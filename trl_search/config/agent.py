"""The settings of an agent: protocol, instruction, budgets and environment.

A policy that was trained without an instruction answers worse with one, and the other way round. The settings are
therefore stored with the policy: in a run folder as `run.json`, in a published model as `trl_search.json`, which
`trl-search push` writes. Such a file is untrusted. It may name an environment that is registered on this machine; code
that it names by import path runs only if the user names the same path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from trl_search.common.bounds import check_minima, check_positive
from trl_search.common.errors import UserError, unknown_name
from trl_search.common.files import parse_object, read_object
from trl_search.common.registry import is_import_path
from trl_search.config.key_docs import key, with_documented_keys
from trl_search.config.lengths import check_lengths
from trl_search.config.recipe_values import checked_values
from trl_search.config.run_file import REMEDY, find_run_file
from trl_search.environment import ENVIRONMENTS, PASSAGE_TEMPLATE, Environment, SearchEnvironment, load_environment
from trl_search.environment.registry import SEARCH, name_of, options_of
from trl_search.protocols import Protocol, load_protocol, protocol_names
from trl_search.retrieval.base import Retriever
from trl_search.rollout import Limits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
SETTINGS_FILE = "trl_search.json"
# The budgets of a search environment: its parameter -> our key.
_BUDGETS = {
    "passages_per_query": "passages_per_query",
    "max_searches": "max_searches",
    "max_queries": "max_queries_per_search",
    "timeout_s": "search_timeout_s",
    "passage_template": "passage_template",
}


@with_documented_keys
@dataclass
class AgentSettings:
    """The keys that shape a conversation, each with its help.

    [`SearchGRPOConfig`] and the arguments of `trl-search sft` inherit them, and [`add_agent_options`] adds them as
    options to `trl-search eval` and `chat`. Treat an instance as immutable: change it with `dataclasses.replace`.

    Raises:
        UserError: for a value that is out of range.
    """

    protocol: str = key(
        "qwen_tools",
        "How tool calls and observations are written. qwen_tools: the chat template's own tool calling; qwen_inline: "
        "the observation is in the same assistant turn; search_r1: <search> and <information> tags, for base models.",
        choices=protocol_names(),
    )
    environment: str = key(
        SEARCH,
        "The environment of the policy: search, the name of an installed environment, or an import path such as "
        "my_package.world:World (docs/extending.md).",
    )
    environment_options: dict | str | None = key(
        None,
        "Options of the environment as JSON: '{\"max_calls\": 3}'. The search environment uses the keys below "
        "instead.",
    )
    instruction: str | None = key(
        None, "Text before each question. Default: the environment's, else the protocol's. '': none."
    )
    system_prompt: str | None = key(None, "The system message. Default: that of the chat template, if any.")
    chat_template_kwargs: dict | str | None = key(
        None, "Extra arguments of the chat template, as JSON: '{\"enable_thinking\": false}'."
    )
    max_searches: int = key(
        4, "Searches per trajectory. Once they are used up, the policy is told so and may answer. 0: no tool."
    )
    passages_per_query: int = key(3, "Passages retrieved per query (top_k is TRL's sampling parameter).")
    max_queries_per_search: int = key(4, "Queries per tool call; further ones are not run.")
    max_turn_length: int = key(512, "Maximum tokens of one turn of the policy.")
    max_observation_length: int = key(
        768, "Maximum tokens of one observation; its passages are truncated one by one, all to the same length."
    )
    max_completion_length: int = key(
        3072, "Maximum tokens of a trajectory after its prompt: the policy's turns and the observations."
    )
    passage_template: str = key(
        PASSAGE_TEMPLATE, "Format of a passage in an observation, with {rank}, {title} and {text}."
    )
    search_timeout_s: float = key(30.0, "Timeout of one retriever call in seconds, not counting time in the queue.")

    def __post_init__(self) -> None:
        check_agent(self)

    @property
    def agent(self) -> AgentSettings:
        """Only the agent's keys, from a configuration that has more."""
        return AgentSettings(**{key.name: getattr(self, key.name) for key in dataclasses.fields(AgentSettings)})

    @property
    def limits(self) -> Limits:
        return Limits(self.max_completion_length, self.max_turn_length, self.max_observation_length)

    def as_json(self) -> dict[str, Any]:
        """The content of `trl_search.json`."""
        return {"format": FORMAT, **self.described()}

    def described(self) -> dict[str, Any]:
        """The keys as files store them; the environment is left out if it is `search`."""
        values = dataclasses.asdict(self)
        if (self.environment, self.environment_options) == (SEARCH, None):
            del values["environment"], values["environment_options"]
        return values


def check_agent(settings: AgentSettings) -> None:
    """Checks the types and ranges of the values, and parses JSON strings. Imports no user code.

    Raises:
        UserError: for the first wrong value; the message names its key.
    """
    given = {key.name: getattr(settings, key.name) for key in dataclasses.fields(AgentSettings)}
    for name, value in checked_values(given, [AgentSettings], "the configuration").items():
        setattr(settings, name, value)
    if settings.protocol not in protocol_names():
        raise unknown_name("protocol", settings.protocol, protocol_names())
    if settings.environment not in ENVIRONMENTS and not is_import_path(settings.environment):
        raise ENVIRONMENTS.unknown(settings.environment)
    for name, example in (
        ("chat_template_kwargs", '{"enable_thinking": false}'),
        ("environment_options", '{"max_calls": 3}'),
    ):
        if isinstance(getattr(settings, name), str):
            setattr(settings, name, parse_object(getattr(settings, name), name, example))
    check_positive(search_timeout_s=settings.search_timeout_s)
    counts = [key.name for key in dataclasses.fields(AgentSettings) if isinstance(key.default, int)]
    check_minima(settings, **(dict.fromkeys(counts, 1) | {"max_searches": 0}))


def add_agent_options(parser: Any) -> None:
    """Adds one option per key of the agent to a command. A key without its option keeps its value from training."""
    hints = get_type_hints(AgentSettings)
    group = parser.add_argument_group("settings of the agent (default: those of its training, if the model has them)")
    for field in dataclasses.fields(AgentSettings):
        kind = hints[field.name] if hints[field.name] in (int, float) else str
        text = field.metadata["help"] + (f" ({field.default})" if kind is not str or field.name == "protocol" else "")
        as_json = dict in get_args(hints[field.name])
        metavar = {int: "N", float: "SECONDS"}.get(kind, "JSON" if as_json else "TEXT")
        group.add_argument(f"--{field.name}", type=kind, metavar=metavar, help=text.replace("%", "%%"))


# The shipped tiny policy takes bare questions, and was trained on conversations no longer than the quickstart's.
TINY = AgentSettings(
    instruction="", max_searches=3, max_turn_length=96, max_observation_length=192, max_completion_length=512
)


def protocol_of(
    agent: AgentSettings,
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[dict[str, Any]],
    instruction: str | None = None,
) -> Protocol:
    """The protocol that writes the agent's prompts and parses its turns.

    Raises:
        UserError: if the shortest turn or observation does not fit into the agent's lengths.
    """
    protocol = load_protocol(
        agent.protocol,
        tokenizer,
        instruction=instruction if agent.instruction is None else agent.instruction,
        system_prompt=agent.system_prompt,
        tools=tools,
        chat_template_kwargs=agent.chat_template_kwargs,
    )
    check_lengths(agent, protocol)
    return protocol


def build_environment(agent: AgentSettings, retriever: Retriever | None) -> Environment:
    """The environment of the agent, for training, cold start, evaluation and chat.

    Raises:
        UserError: for an unknown environment or option, and for a retriever that is missing or not accepted.
    """
    assert not isinstance(agent.environment_options, str)  # `check_agent` has parsed it
    budgets = {name: getattr(agent, key) for name, key in _BUDGETS.items()}
    return load_environment(
        agent.environment, retriever=retriever, budgets=budgets, **(agent.environment_options or {})
    )


def settings_in(environment: Environment, agent: AgentSettings) -> AgentSettings:
    """The settings with the name, options and budgets of an existing environment.

    Example:
        >>> settings_in(SearchEnvironment(retriever, max_searches=2), AgentSettings()).max_searches
        2
    """
    own = {}
    if isinstance(environment, SearchEnvironment):
        own = {key: getattr(environment, name) for name, key in _BUDGETS.items()}
    others = {name: value for name, value in options_of(environment).items() if name not in _BUDGETS or not own}
    return dataclasses.replace(agent, environment=name_of(environment), environment_options=others or None, **own)


def trained_settings(model: str) -> AgentSettings:
    """The settings that the model was trained with; the defaults if they are unknown."""
    return TINY if model == "tiny" else read_settings(model) or AgentSettings()


def asked(trained: AgentSettings, options: Mapping[str, Any]) -> AgentSettings:
    """The settings of training, overridden by the agent's options that were given to a command.

    Raises:
        UserError: for a value that is out of range, and for an import path that only the model's file names.
    """
    keys = {key.name for key in dataclasses.fields(AgentSettings)}
    given = {name: value for name, value in options.items() if name in keys and value is not None}
    if given.get("environment", trained.environment) != trained.environment:
        given = {"environment_options": None, **given}  # the recorded options belong to the other environment
    settings = dataclasses.replace(trained, **given)
    if "environment" not in given:
        refuse_unnamed_code(settings)
    return settings


def refuse_unnamed_code(recorded: AgentSettings) -> None:
    """Refuses a model's settings that name an environment by import path: its publisher would choose what runs."""
    if recorded.environment not in ENVIRONMENTS:
        raise UserError(
            f"the model was trained in the environment {recorded.environment}, which is an import path, not a "
            f"registered name. If you trust that code, name it: --environment {recorded.environment}"
        )


def settings_of(values: Mapping[str, Any], source: str) -> AgentSettings:
    """The agent's settings from the keys of a configuration; missing keys keep their defaults.

    Raises:
        UserError: if a value has the wrong type; the message names `source`.
    """
    given = {key.name: values[key.name] for key in dataclasses.fields(AgentSettings) if key.name in values}
    try:
        return AgentSettings(**given)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def read_settings(model: str) -> AgentSettings | None:
    """The settings that the model was trained with, from its folder, from the run of a checkpoint, or from the hub;
    `None` if there are none.

    Raises:
        UserError: if the file is incomplete.

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
        raise UserError(f"{path} has no config, so it is incomplete: {REMEDY}")
    return settings_of(config, str(path))


def _cached(model: str) -> str | None:
    """The settings file of a model on the hub. If the model or the hub is missing, loading the weights reports it."""
    from transformers.utils import cached_file

    from trl_search.common.hub import only_cached
    from trl_search.policies.loading import model_source

    try:
        source = model_source(model)
    except UserError:
        return None
    local_files_only = only_cached(source)
    try:
        return cached_file(
            source,
            SETTINGS_FILE,
            local_files_only=local_files_only,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:
        return None
