"""How a trained agent wants to be asked: its protocol, its instruction, its budgets.

A policy that was trained on bare questions answers worse when it is given an instruction, and the other way round. So
what it was trained with travels with it: in the folder of a run as `run.json`, in a published model as
`trl_search.json`, which `trl-search push` writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from transformers import PreTrainedTokenizerBase

from trl_search.common.errors import UserError, unknown_name
from trl_search.common.files import read_object
from trl_search.environment import PASSAGE_TEMPLATE, SearchEnvironment
from trl_search.protocols import PROTOCOLS, Protocol, load_protocol
from trl_search.retrieval.base import Retriever
from trl_search.rollout import Limits

FORMAT = 1
SETTINGS_FILE = "trl_search.json"
REMEDY = "remove it, and say how to ask by options"
RUN_FILE = "run.json"


@dataclass(frozen=True)
class AgentSettings:
    """The keys of `SearchGRPOConfig` that shape a conversation, under their names there and with its defaults."""

    protocol: str = "qwen_tools"
    instruction: str | None = None
    system_prompt: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    max_searches: int = 4
    max_queries_per_search: int = 4
    passages_per_query: int = 3
    max_turn_length: int = 512
    max_observation_length: int = 768
    max_completion_length: int = 3072
    passage_template: str = PASSAGE_TEMPLATE
    search_timeout_s: float = 30.0

    @property
    def limits(self) -> Limits:
        return Limits(self.max_completion_length, self.max_turn_length, self.max_observation_length)

    def as_json(self) -> dict[str, Any]:
        """What `trl_search.json` holds."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


# The policy that ships reads the question alone, and has read no conversation longer than those of the quickstart.
TINY = AgentSettings(
    instruction="", max_searches=3, max_turn_length=96, max_observation_length=192, max_completion_length=512
)


def agent_of(config: Any) -> AgentSettings:
    """The settings among the attributes of a configuration, which has all of them."""
    return AgentSettings(**{key.name: getattr(config, key.name) for key in dataclasses.fields(AgentSettings)})


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
        top_k=agent.passages_per_query,
        max_searches=agent.max_searches,
        max_queries=agent.max_queries_per_search,
        timeout_s=agent.search_timeout_s,
        passage_template=agent.passage_template,
    )


def trained_settings(model: str) -> AgentSettings:
    """How the model was trained to be asked, as far as that is known."""
    return TINY if model == "tiny" else read_settings(model) or AgentSettings()


def asked(trained: AgentSettings, options: Mapping[str, Any]) -> AgentSettings:
    """The settings of training, but for what the options of a command say; `None` is an option that was not given.

    Raises:
        UserError: for a value that cannot be.
    """
    agent = dataclasses.replace(trained, **{name: value for name, value in options.items() if value is not None})
    if agent.protocol not in PROTOCOLS:
        raise unknown_name("protocol", agent.protocol, PROTOCOLS)
    for key in dataclasses.fields(AgentSettings):
        value, least = getattr(agent, key.name), 0 if key.name == "max_searches" else 1
        if isinstance(value, int) and value < least:
            raise UserError(f"--{key.name} must be at least {least}; got {value}")
    if agent.search_timeout_s <= 0:
        raise UserError(f"--search_timeout_s must be more than 0; got {agent.search_timeout_s}")
    return agent


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
    return AgentSettings(**given)


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
    for path in (folder / RUN_FILE, folder.resolve().parent / RUN_FILE):
        if path.is_file():
            config = read_object(path, REMEDY).get("config")
            if not isinstance(config, dict):
                raise UserError(f"{path} has no config: it is half-written; {REMEDY}")
            return settings_of(config, str(path))
    return None


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
    except OSError:
        return None
