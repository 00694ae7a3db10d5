"""The card that a training writes beside its weights. TRL and PEFT would write cards that know nothing of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_search.config.agent import AgentSettings
from trl_search.protocols import Protocol
from trl_search.records.publish.commit import CARD, CURVES
from trl_search.records.publish.facts import CardFacts, base_of
from trl_search.records.publish.model_card import write_card
from trl_search.records.publish.results import Result, dataset_names, training_results


def save_card(
    folder: Path,
    *,
    run_folder: Path,
    repo_id: str,
    agent: AgentSettings,
    protocol: Protocol,
    tools: Sequence[Mapping[str, Any]],
    info: Mapping[str, Any],
    adapter: Mapping[str, Any] | None,
    history: Sequence[Mapping[str, Any]],
) -> Path:
    """
    Writes `README.md` into the folder of a checkpoint, or of the run.

    Args:
        run_folder (`Path`): The folder of the run, whose `results.json` may hold evaluations.
        repo_id (`str`): What the snippet on the card loads: `owner/name`, or a folder.
        agent (`AgentSettings`), protocol (`Protocol`): How the agent is asked.
        tools (`Sequence[dict]`): The tools of the environment.
        info (`dict`): `run.json`.
        adapter (`dict`, *optional*): The configuration of the LoRA adapter that is trained.
        history (`Sequence[dict]`): The logged rows so far. An evaluation at the last step is on the card.
    """
    task = info.get("task") or {}
    facts = CardFacts(
        repo_id=repo_id,
        settings=agent,
        protocol=protocol,
        base_model=base_of(info, adapter),
        adapter=adapter,
        info=info,
        results=[*training_results(run_folder, task, folder), *_measured_here(history, task)],
        curves=(folder / CURVES).is_file(),
        tools=tuple(str(tool.get("function", tool).get("name")) for tool in tools),
    )
    path = folder / CARD
    path.write_text(str(write_card(facts)), encoding="utf-8")
    return path


def _measured_here(history: Sequence[Mapping[str, Any]], task: Mapping[str, Any]) -> list[Result]:
    last = history[-1] if history else {}
    if last.get("eval/em") is None:
        return []
    sets = task.get("held_out_questions")
    asked = sum(sets.values()) if isinstance(sets, dict) else 0
    return [
        Result(
            policy=f"search, step {last.get('step')}",
            dataset=dataset_names(task),
            questions=asked,
            em=last["eval/em"],
            f1=last.get("eval/f1"),
            searches=last.get("eval/searches"),
            final=True,
        )
    ]
