"""How a trained agent wants to be asked: its protocol, its instruction, its budgets.

A policy that was trained on bare questions answers worse when it is given an instruction, and the other way round. So
what it was trained with travels with it: in the folder of a run as `run.json`, in a published model as
`trl_search.json`, which `trl-search push` writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_search.environment import PASSAGE_TEMPLATE
from trl_search.errors import UserError
from trl_search.json_objects import read_object
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


def settings_of(values: Mapping[str, Any], source: str) -> AgentSettings:
    """The settings among the keys of a configuration; what is not there keeps its default.

    Raises:
        UserError: if a value has not the type of its key, naming `source`.
    """
    known = {field.name: field.default for field in dataclasses.fields(AgentSettings)}
    given = {name: values[name] for name in known if name in values}
    for name, value in given.items():
        default = known[name]
        wanted: Any = str | None if default is None else (int, float) if isinstance(default, float) else type(default)
        if name == "chat_template_kwargs":
            wanted = Mapping | None
        if not isinstance(value, wanted) or isinstance(value, bool):
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
