"""The facts for a model card, read from the files of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_search.common.files import read_object
from trl_search.config.agent import AgentSettings, protocol_of, read_settings
from trl_search.config.run_file import find_run_file
from trl_search.environment import SearchEnvironment
from trl_search.environment.registry import SEARCH
from trl_search.policies.adapters import read_adapter
from trl_search.policies.loading import load_tokenizer
from trl_search.protocols import Protocol
from trl_search.protocols.instructions import tool_names
from trl_search.records.folder import SFT, section
from trl_search.records.publish.results import Result, evaluation_results, refuse_another_model, training_results
from trl_search.records.publish.upload import CURVES, on_hub
from trl_search.records.rollbacks import rollbacks_of


@dataclass(frozen=True)
class CardFacts:
    """The facts for a model card."""

    repo_id: str  # the repository, `owner/name`, or a folder
    settings: AgentSettings | None  # the agent settings of the training, if they are recorded
    protocol: Protocol  # the agent's protocol, with its tokenizer
    base_model: str | None = None  # the name of the model that training began with
    adapter: Mapping[str, Any] | None = None  # `adapter_config.json`, if an adapter is published
    info: Mapping[str, Any] = field(default_factory=dict)  # `run.json`; empty if there is none
    results: Sequence[Result] = ()  # the lines of the results table
    license: str | None = None  # the licence of the weights, by the hub's id
    curves: bool = False  # whether `curves.png` is published with the card
    tools: tuple[str, ...] = ("search",)  # the names of the tools that the agent calls
    rollbacks: Sequence[Mapping[str, Any]] = ()  # the rollbacks of the training after a collapse

    @property
    def task(self) -> Mapping[str, Any]:
        return section(self.info, "task")

    @property
    def config(self) -> Mapping[str, Any]:
        return section(self.info, "config")

    @property
    def is_cold_start(self) -> bool:
        """Whether the model was trained by `trl-search sft` only."""
        return self.info.get("method") == SFT

    @property
    def versions(self) -> Mapping[str, str]:
        return section(self.info, "versions")

    @property
    def hub_base(self) -> str | None:
        """The name of the base model on the hub, if it is there."""
        return self.base_model if self.base_model and on_hub(self.base_model) else None

    @property
    def in_world(self) -> bool:
        """Whether the agent was trained in the embedded world."""
        return self.task.get("questions") == "world"

    @property
    def is_search_agent(self) -> bool:
        """Whether search is the agent's only tool, so that the example conversation and the snippet apply."""
        searches = self.settings is None or self.settings.environment == SEARCH
        return searches and set(self.tools) <= {"search"}


def read_facts(
    folder: Path,
    repo_id: str,
    evaluations: Sequence[Path] = (),
    *,
    base_model: str | None = None,
    license: str | None = None,
) -> CardFacts:
    """Reads the facts from the folder of a run or of a checkpoint, and from evaluations of `trl-search eval`."""
    run_file = find_run_file(str(folder))
    run_folder = folder if run_file is None else run_file.parent
    remedy = "move it away; the card then says less about the training"
    info = {} if run_file is None else read_object(run_file, remedy)
    settings = read_settings(str(folder))
    asked = settings or AgentSettings()
    recorded = section(info, "environment")
    tools = recorded.get("tools", SearchEnvironment.tools if asked.max_searches else ())
    results = training_results(run_folder, section(info, "task"), folder)
    for evaluation in evaluations:
        results += evaluation_results(evaluation)
        refuse_another_model(evaluation, folder, repo_id)
    adapter = read_adapter(folder)
    return CardFacts(
        repo_id=repo_id,
        settings=settings,
        protocol=protocol_of(asked, load_tokenizer(str(folder)), tools, recorded.get("instruction")),
        base_model=base_model or base_of(info, adapter),
        adapter=adapter,
        info=info,
        results=results,
        license=license,
        curves=(folder / CURVES).is_file(),
        tools=tuple(tool_names(tools)),
        rollbacks=rollbacks_of(run_folder),
    )


def base_of(info: Mapping[str, Any], adapter: Mapping[str, Any] | None) -> str | None:
    """The model that training began with. The folder that a warm start writes is not a base model."""
    recorded = section(info, "task").get("base_model")
    return recorded or (adapter or {}).get("base_model_name_or_path") or info.get("model")
