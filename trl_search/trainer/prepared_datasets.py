"""The datasets of a trainer: prepared in the constructor, and again if they are set afterwards.

trainer.train_dataset = harder_questions
trainer.train()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, Trainer

from trl_search.config.carry_over import carries_over
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.protocols import Protocol
from trl_search.trainer.groups.carry_over import refuse_streams
from trl_search.trainer.prompts import check_reward_calls, with_prompts, with_room


def train_dataset_of(dataset: Any, protocol: Protocol, rewards: Sequence[Any], args: SearchGRPOConfig) -> Any:
    """The training dataset with prompts, after the checks that need no model.

    Raises:
        UserError: for a dataset, or a row, that cannot be trained on.
    """
    prepared = with_prompts(dataset, protocol, rewards, "train_dataset")
    if carries_over(args):
        refuse_streams(prepared)
    check_reward_calls(rewards, prepared, "train_dataset")
    return prepared


class PreparesDatasets(Trainer):
    """A mixin that prepares datasets which are set after the constructor. List it before TRL's trainer."""

    protocol: Protocol
    args: SearchGRPOConfig
    reward_funcs: list[Any]
    model: PreTrainedModel
    train_dataset: Any
    eval_dataset: Any
    _prepared: dict[str, Any]  # the datasets of the trainer, by name

    def check_room(self) -> None:
        """Checks that the prompts of the constructor's datasets leave room for a completion."""
        self._prepared = {}
        for name in ("train_dataset", "eval_dataset"):
            self._keep(name, getattr(self, name))

    def prepare_if_new(self, name: str) -> bool:
        """Prepares a dataset as the constructor does, if it was set afterwards. Returns whether it was."""
        dataset = getattr(self, name)
        if dataset is self._prepared[name]:
            return False
        if name == "train_dataset":
            dataset = train_dataset_of(dataset, self.protocol, self.reward_funcs, self.args)
        else:
            dataset = with_prompts(dataset, self.protocol, self.reward_funcs, name)
            # With dataloader_persistent_workers, transformers would evaluate the one before.
            getattr(self, "_eval_dataloaders", {}).clear()
        self._keep(name, dataset)
        return True

    def _keep(self, name: str, dataset: Any) -> None:
        skip = name == "train_dataset" and self.args.skip_long_prompts
        self._prepared[name] = with_room(dataset, name, self.protocol, self.model, self.args, skip=skip)
        setattr(self, name, self._prepared[name])
