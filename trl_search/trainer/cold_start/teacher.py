"""The teacher of a cold start, which plays the attempts.

teacher: self, a name, a folder    a model in this process; with `demonstrations`, it sees played questions first
teacher: http://...                a model on a vLLM server
teacher: scripts                   scripted players, which know the golden answers, or a user's script (`script`)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from trl_search.common.errors import UserError
from trl_search.config.task import Task
from trl_search.data.evidence import check_corpus
from trl_search.data.question_players import QuestionPlayers
from trl_search.data.user_script import UserScript
from trl_search.environment import Environment
from trl_search.evaluation.settings import describe_model
from trl_search.policies.base import Policy
from trl_search.policies.loading import base_name, load_base, load_tokenizer
from trl_search.policies.server_tokenizer import PROBE, server_ids
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.policies.vllm_server import VLLMServerPolicy
from trl_search.protocols import Protocol
from trl_search.trainer.cold_start.arguments import ColdStartArguments
from trl_search.trainer.cold_start.demonstrations import Demonstration, demonstrating, play_demonstrations
from trl_search.trainer.sft import SearchSFTConfig
from trl_search.types import Passage

logger = logging.getLogger(__name__)

_CHECKED_PASSAGES = 10  # per query, in which gold passages are looked for


class Teacher:
    """Plays the attempts of a collection."""

    def __init__(
        self,
        arguments: ColdStartArguments,
        config: SearchSFTConfig,
        model_config: ModelConfig,
        protocol: Protocol,
        environment: Environment,
        task: Task,
    ) -> None:
        self.arguments, self.config, self.model_config = arguments, config, model_config
        self.protocol, self.environment = protocol, environment
        self.rows: list[Any] = list(task.train)
        self.name = base_name(model_config) if arguments.teacher == "self" else arguments.teacher
        self._retriever = task.retriever
        self._demonstrations: list[Demonstration] = []
        self._players: QuestionPlayers | UserScript
        if arguments.script is not None:
            self._players = UserScript(arguments.script, environment, protocol)
        else:
            self._players = QuestionPlayers(
                lambda queries: self._find(queries, arguments.passages_per_query),
                protocol,
                max_searches=arguments.max_searches,
            )

    def described(self) -> dict[str, Any]:
        """Identifies the teacher in the settings of a collection, a folder by its content."""
        arguments, played = self.arguments, self._players
        is_folder = not arguments.teacher_is_scripted and Path(self.name).expanduser().is_dir()
        return {
            "teacher": describe_model(self.name) if is_folder else self.name,
            **({"demonstrations": arguments.demonstrations} if arguments.demonstrations else {}),
            **(played.described() if isinstance(played, UserScript) else {}),
        }

    def policy(self) -> Policy | None:
        """The model that plays, ready to generate; `None` if scripts play.

        Raises:
            UserError: if the gold passages are of another corpus, no demonstration could be played, or the model has
                another tokenizer than the trained one.
        """
        if self.arguments.plays_with_evidence:
            check_corpus(self.rows, lambda queries: self._find(queries, _CHECKED_PASSAGES))
            _tell_of_evidence(self.rows)
        if self.arguments.teacher_is_scripted:
            return None
        if self.arguments.demonstrations:
            limits, seed = self.arguments.agent.limits, self.config.seed
            self._demonstrations = play_demonstrations(
                self.rows, self._players, self.environment, self.protocol, limits, seed=seed
            )
        tokenizer = self.protocol.tokenizer
        if self.arguments.teacher_is_served:
            check_server_tokenizer(self.name, tokenizer)
            return VLLMServerPolicy(self.name)
        theirs = load_tokenizer(self.name, trust_remote_code=self.config.trust_remote_code)
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"the tokenizer of {self.name} differs from that of the model that is trained: use a teacher of the "
                "same family"
            )
        model = load_base(self.name, self.model_config, self.config).to(self.config.device)  # type: ignore[arg-type]
        return TransformersPolicy(model, tokenizer, max_sequences=self.arguments.rollout_batch_size)

    def player(self, policy: Policy | None, row: Mapping[str, Any], seed: int) -> Policy:
        """The policy of one attempt: a script for the row, or the model, with demonstrations if there are any."""
        if policy is None:
            return self._players.for_row(row, seed)
        if not self._demonstrations:
            return policy
        return demonstrating(policy, row, seed, pool=self._demonstrations, count=self.arguments.demonstrations)

    def _find(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        assert self._retriever is not None  # only scripted players call this, in a search environment
        return self._retriever.search(queries, k)


def _tell_of_evidence(rows: Sequence[Mapping[str, Any]]) -> None:
    without = sum(not row.get("gold_ids") and not row.get("gold_titles") for row in rows)
    if without:
        logger.warning(
            "%s of %s questions have no gold passages: players try queries until one finds a golden answer, and skip "
            "yes/no questions",
            f"{without:,}",
            f"{len(rows):,}",
        )


def check_server_tokenizer(url: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `UserError` if the server's tokenizer encodes the probe differently."""
    try:
        ids = server_ids(url)
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise UserError(
            f"no vLLM server answers at {url}/tokenize ({error}): start one first (`vllm serve`)"
        ) from error
    if ids != tokenizer.encode(PROBE, add_special_tokens=False):
        raise UserError(
            f"the tokenizer of the server at {url} differs from that of the model that is trained: serve a teacher of "
            "the same family"
        )
