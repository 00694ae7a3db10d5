"""The keys of `trl-search sft`, besides those of the agent and the questions: teacher, sampling and selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl_search.common.bounds import check_minima, check_not_negative, check_positive_share, check_share
from trl_search.common.errors import UserError
from trl_search.config.agent import AgentSettings
from trl_search.config.key_docs import key
from trl_search.config.task import QuestionArguments
from trl_search.data.scripted_players import PLAYERS, WEAK
from trl_search.environment.registry import SEARCH
from trl_search.environment.script import load_script


@dataclass
class ColdStartArguments(AgentSettings, QuestionArguments):
    """The source of the attempts, and the rules for keeping them."""

    max_failed_share: float = key(
        0.5, "If more than this share of the attempts fails, collecting stops with an error."
    )
    rollout_batch_size: int = key(64, "Attempts generated at once; a vLLM server takes several hundred.")

    teacher: str = key(
        "self",
        "Source of the attempts. self: the model that is trained. Another model with the same tokenizer: a name on "
        "the hub, a folder, or the address of a `vllm serve` (http://localhost:8000). scripts: scripted players, for "
        "any questions and without a model; they search for what the question names, then for what the passages "
        "mention, guided by gold passages if the rows name them, else by trying queries.",
    )
    script: str | None = key(
        None,
        "With teacher: scripts, the import path of your own script, used instead of the built-in players: "
        "my_agent:open_page. It can call the tools of any environment (docs/own-agent.md). With demonstrations, it "
        "plays the demonstrations.",
    )
    quality: str = key(
        ",".join(f"{name}={share}" for name, share in WEAK.items()),
        f"With teacher: scripts and questions: world, the mix of the players {', '.join(PLAYERS)}.",
    )
    demonstrations: int = key(
        0,
        "With a model as teacher: number of answered example questions before each prompt, played by scripted "
        "players. They are left out of the training data (context distillation).",
    )
    samples_per_question: int = key(4, "Attempts per question.")
    temperature: float = key(1.0, "Temperature of the attempts.")
    top_p: float = key(1.0, "Top-p of the attempts; unlike in GRPO, it may be below 1.")
    collection: str | None = key(
        None,
        "Folder of the attempts. Attempts are appended as they finish, and the next run reads them. Default: "
        "output_dir/collection.",
    )
    overwrite: bool = key(False, "Allow an output_dir that holds a finished model or checkpoints, and replace them.")
    collect_only: bool = key(False, "Only collect and select attempts; do not train.")

    min_f1: float | None = key(None, "Keep answers with at least this F1. Default: only exact matches.")
    well_formed: bool = key(True, "Keep only attempts in which every call and the answer are well-formed.")
    min_searches: int = key(1, "Keep only attempts with at least this many searches, or calls of another tool.")
    keep_per_question: int = key(2, "Keep at most this many attempts per question.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minima(self, samples_per_question=1, keep_per_question=1, rollout_batch_size=1)
        check_minima(self, max_train_questions=1, min_searches=0)
        check_not_negative(temperature=self.temperature)
        check_positive_share(top_p=self.top_p)
        if self.min_f1 is not None:
            check_positive_share(min_f1=self.min_f1)
        check_share(max_failed_share=self.max_failed_share)
        played = self.teacher_is_scripted or self.demonstrations > 0
        if self.script is not None:
            if not played:
                raise UserError(
                    f"script: {self.script} needs teacher: scripts or demonstrations: set one, or leave script out"
                )
            load_script(self.script)
        elif played and self.environment != SEARCH:
            raise UserError(
                f"the shipped scripted players only search, but the environment is {self.environment}: give your own "
                "script (script: my_agent:open_page; docs/own-agent.md), or use a model as the teacher and set "
                "demonstrations: 0"
            )
        elif self.teacher_is_scripted and self.questions != "world" and not self.max_searches:
            raise UserError("teacher: scripts shows how to search: set max_searches to at least 1")
        if self.demonstrations < 0 or (self.demonstrations and self.teacher_is_scripted):
            raise UserError(
                f"demonstrations={self.demonstrations} must be at least 0, and 0 with teacher: scripts: set it to 0, "
                "or use a model as the teacher"
            )
        if self.collect_only and self.plays_the_world:
            raise UserError("scripts of the embedded world are not collected: leave collect_only out")

    @property
    def plays_the_world(self) -> bool:
        """Whether the shipped scripts play the embedded world; their trajectories are not collected or selected."""
        return self.teacher_is_scripted and self.questions == "world" and self.script is None

    @property
    def plays_with_evidence(self) -> bool:
        """Whether the shipped scripts play other questions; they look for gold passages, if the rows name them."""
        return self.script is None and (self.teacher_is_scripted or self.demonstrations > 0)

    @property
    def teacher_is_scripted(self) -> bool:
        return self.teacher == "scripts"

    @property
    def teacher_is_served(self) -> bool:
        """Whether the teacher is a server, so that no model is loaded for it."""
        return self.teacher.startswith(("http://", "https://"))

    @staticmethod
    def settled(values: dict[str, Any]) -> dict[str, Any]:
        """With `collect_only`, turns off bf16 and fp16, which would require a GPU although nothing is trained."""
        return {**values, "bf16": False, "fp16": False} if values["collect_only"] else values
