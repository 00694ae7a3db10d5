"""Writes our model card beside the weights, because the cards of TRL and PEFT say nothing about the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_search.config.agent import AgentSettings
from trl_search.config.run_file import shown_path
from trl_search.protocols import Protocol
from trl_search.protocols.instructions import tool_names
from trl_search.records.publish.card_facts import CardFacts, base_of
from trl_search.records.publish.model_card import write_card
from trl_search.records.publish.results import Result, dataset_names, training_results
from trl_search.records.publish.upload import CARD, CURVES
from trl_search.records.run_log import RunLog


class CheckpointCards(TrainerCallback):
    """The callback that writes `README.md` into every checkpoint."""

    def __init__(
        self, agent: AgentSettings, protocol: Protocol, tools: Sequence[Mapping[str, Any]], run_log: RunLog
    ) -> None:
        self.agent, self.protocol, self.run_log = agent, protocol, run_log
        self.tools = tuple(tool_names(tools))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if args.should_save:
            folder = Path(args.output_dir or ".", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            self.write(folder, args, state, model)

    def write(self, folder: Path, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """Writes the card into the folder of a checkpoint, or of the run."""
        info, peft = self.run_log.info, getattr(model, "peft_config", None)
        task, adapter = info.get("task") or {}, next(iter(peft.values())).to_dict() if peft else None
        facts = CardFacts(
            repo_id=args.hub_model_id or shown_path(folder),
            settings=self.agent,
            protocol=self.protocol,
            base_model=base_of(info, adapter),
            adapter=adapter,
            info=info,
            results=[
                *training_results(Path(args.output_dir or "."), task, folder),
                *_measured_now(state.log_history, task),
            ],
            curves=(folder / CURVES).is_file(),
            tools=self.tools,
        )
        (folder / CARD).write_text(str(write_card(facts)), encoding="utf-8")


def _measured_now(history: Sequence[Mapping[str, Any]], task: Mapping[str, Any]) -> list[Result]:
    """The evaluation at the last logged step, if there was one."""
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
