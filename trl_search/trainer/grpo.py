"""`SearchGRPOTrainer`: TRL's `GRPOTrainer` with rollouts that act in an environment.

TRL owns groups, advantages, the loss, checkpoints, logging and distribution. This file builds the trainer. The seams
between TRL and our rollout are in the files below; `tests/trainer/test_contract_trl.py` has one test per seam, which
fails if a new TRL moves it:

| seam of `GRPOTrainer`                | what we do there                                   | file                    |
|--------------------------------------|----------------------------------------------------|-------------------------|
| `_generate_and_score_completions`    | start a `Rollout` with the rows; record the scores | `rollouts.py`           |
| `_generate`                          | turns as chat messages, not decoded text; metrics  | `rollouts.py`           |
| `rollout_func` (`_rollout`)          | run the trajectories; return ids, masks, log-probs | `rollouts.py`           |
| `_calculate_rewards`                 | no reward for failed trajectories, nor a baseline  | `rollouts.py`           |
| `_prepare_inputs`                    | deal the rows of all ranks                         | `even_micro_batches.py` |
| `_compute_loss`,                     | run only the tokens of the loss;                   | `loss/seams.py`         |
| `_get_per_token_logps_and_entropies` | importance-sample vLLM's                           |                         |
| `training_step`, `_get_grad_norm`    | skip a step that is not finite                     | `finite.py`             |
| `evaluate`, `predict`, `log`         | name the metrics of each set, average them exactly | `evaluations.py`        |
| `_save_checkpoint`,                  | keep the place in the questions, pass rates, and   | `groups/`               |
| `_load_optimizer_and_scheduler`      | the questions of unfinished groups                 | `resumed_order.py`      |
| `train`                              | go back to the best checkpoint after a collapse    | `rollback.py`           |
| `create_model_card`                  | write our model card                               | here                    |
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOTrainer

from trl_search.common.garbage import sparing_what_is_loaded
from trl_search.config.agent import protocol_of
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.config.refused_keys import refuse_push
from trl_search.environment import Environment
from trl_search.environment.registry import described
from trl_search.policies.loading import check_vocabulary
from trl_search.policies.tiny import tiny_policy_path
from trl_search.records.publish.checkpoint_card import CheckpointCards
from trl_search.records.run_log import RunLog
from trl_search.records.trackers import TrackerTables
from trl_search.records.trajectory_log import TrajectoryLog
from trl_search.retrieval.base import Retriever
from trl_search.rewards import default_weight
from trl_search.rewards.signature import check_names
from trl_search.trainer.batch import Rollout
from trl_search.trainer.callbacks.alarms import CollapseAlarm
from trl_search.trainer.callbacks.progress import show_steps
from trl_search.trainer.evaluations import check_best_model
from trl_search.trainer.even_micro_batches import EvenMicroBatches
from trl_search.trainer.finite import FiniteSteps, avoid_cudnn_attention
from trl_search.trainer.generation.vllm_backend import making_ours
from trl_search.trainer.groups.question_choice import check_dataset, question_choice_of
from trl_search.trainer.groups.question_order import KeepsOrder
from trl_search.trainer.inputs import (
    RewardSpec,
    environment_of,
    refuse_what_rollouts_cannot_do,
    resolve_specs,
    tokenizer_of,
)
from trl_search.trainer.numbered_cpus import load_onto_numbered_cpus
from trl_search.trainer.prepared_datasets import train_dataset_of
from trl_search.trainer.prompts import check_reward_calls, first_prompt, with_prompts
from trl_search.trainer.rank_watch import ending_together
from trl_search.trainer.reference import KeepsReference, complete_reference
from trl_search.trainer.resume import LoadsTiedWeights, NamesDoneCheckpoint
from trl_search.trainer.rollback import RollsBack
from trl_search.trainer.rollouts import SearchRollouts
from trl_search.trainer.tag_rows import warn_of_untrained_tags
from trl_search.trainer.trainable import check_can_learn
from trl_search.trainer.turn_credit import refuse_turn_credit


class SearchGRPOTrainer(
    RollsBack, LoadsTiedWeights, KeepsReference, SearchRollouts, KeepsOrder, FiniteSteps, EvenMicroBatches, GRPOTrainer
):
    """
    Trains a policy with GRPO to search, read and answer.

    Without `retriever` and `environment` it is a plain [`~trl.GRPOTrainer`].

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, as for [`~trl.GRPOTrainer`], or `"tiny"`: the policy that ships with the package.
        reward_funcs (`str`, `Callable` or a list of both, *optional*):
            One or several of: names (`"em"`, `"f1"`, `"format"`, `"reflection"`, `"retrieval"`, or one of an installed
            package), callables with TRL's signature, and reward models as for [`~trl.GRPOTrainer`]. Defaults to `"em"`
            with a retriever or an environment. Weights come from `args.reward_weights`, else from each reward.
        args ([`SearchGRPOConfig`], *optional*):
            The configuration.
        train_dataset, eval_dataset ([`~datasets.Dataset`], *optional*):
            Rows with a `question` (or a conversational `prompt`) and the columns that the rewards read; `em`, `f1` and
            `retrieval` read `golden_answers`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer; loaded from the model's folder by default.
        retriever ([`Retriever`] or `str`, *optional*):
            The retriever of the environment: an instance, or a string for [`open_retriever`] (an index folder, the
            address of a server).
        environment ([`Environment`], *optional*):
            An instance of your own environment. By default `args.environment` is built, a [`SearchEnvironment`]. The
            budgets of an instance replace those of `args`.
        **kwargs:
            Further arguments of [`~trl.GRPOTrainer`]: `peft_config`, `callbacks`, `optimizers`, ...

    Raises:
        UserError: for missing columns, an empty dataset, an unsuitable model or chat template, or an object that is
            not an environment or not a retriever.

    Example:
        ```python
        from trl_search import SearchGRPOConfig, SearchGRPOTrainer, load_questions, load_retriever

        trainer = SearchGRPOTrainer(
            model="Qwen/Qwen2.5-3B-Instruct",
            args=SearchGRPOConfig(output_dir="runs/qwen3b", max_searches=4),
            train_dataset=load_questions("nq_hotpotqa"),
            retriever=load_retriever("bm25", index="indexes/wiki"),
            reward_funcs=["em", "format", "reflection"],
        )
        trainer.train()
        ```
    """

    _tag_names = ["trl", "grpo", "trl-search"]  # noqa: RUF012 (declared so by TRL)
    _name = "GRPO with search"
    args: SearchGRPOConfig
    model: PreTrainedModel
    # A class attribute, so that a partly constructed trainer acts as a plain GRPOTrainer.
    environment: Environment | None = None

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardSpec | Sequence[RewardSpec] | None = None,
        args: SearchGRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        retriever: Retriever | str | Path | None = None,
        environment: Environment | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = SearchGRPOConfig("search-grpo")
        if model == "tiny":
            model = tiny_policy_path()
        environment = self.environment = environment_of(args, retriever, environment)
        avoid_cudnn_attention()
        if reward_funcs is None and environment is not None:
            reward_funcs = "em"
        rewards = resolve_specs(reward_funcs or [], args) if reward_funcs or environment is not None else []
        if environment is not None:
            refuse_what_rollouts_cannot_do(args, model, environment, kwargs)
            processing_class = tokenizer_of(model, args, processing_class)
            check_vocabulary(model, processing_class)
            self.protocol = protocol_of(args.agent, processing_class, environment.tools, environment.instruction)
            check_names(rewards)
            train_dataset = train_dataset_of(train_dataset, self.protocol, rewards, args)
            eval_dataset = with_prompts(eval_dataset, self.protocol, rewards, "eval_dataset")
            if args.eval_strategy != "no":
                check_best_model(args, eval_dataset, rewards)
                check_reward_calls(rewards, eval_dataset, "eval_dataset")
        with making_ours(args) if environment is not None and args.use_vllm else contextlib.nullcontext():
            super().__init__(
                model=model,
                reward_funcs=rewards,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **kwargs,
            )
        if args.reward_weights is None:
            self.reward_weights[: len(rewards)] = torch.tensor([default_weight(reward) for reward in rewards])
        self.last_rollout = Rollout(rows=[])
        self._rollouts = Counter()
        if self.environment is not None:
            self.rollout_func = self._rollout
            complete_reference(self.model)
            self.check_room()
            self.run_log = RunLog(model=self.model.config._name_or_path, protocol=args.protocol)
            self.run_log.prompt = first_prompt(self.train_dataset, self.protocol)
            self.run_log.environment = described(self.environment)
            self.trajectory_log = TrajectoryLog(args, self._tokenizer, self.accelerator)
            # Before the trackers: the alarm adds to the logs that they report, and the run log names their run.
            self.collapse_alarm = CollapseAlarm(stop=args.on_collapse != "warn")
            self.callback_handler.callbacks[:0] = [self.collapse_alarm, self.run_log]
            show_steps(self)
            self.add_callback(NamesDoneCheckpoint())
            self.add_callback(TrackerTables(self.run_log, self.trajectory_log))
            self.checkpoint_cards = CheckpointCards(args.agent, self.protocol, self.environment.tools, self.run_log)
            self.add_callback(self.checkpoint_cards)
            self.prepare_loss()
            refuse_turn_credit(self)
            warn_of_untrained_tags(self.accelerator.unwrap_model(self.model), self.protocol)
        self.question_choice = question_choice_of(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as TRL does. If one rank dies, all ranks end and print the reason.

        Raises:
            UserError: if nothing could be learnt: too few questions, no reward with a weight, no trainable weight.
        """
        if self.environment is not None:
            if self.prepare_if_new("train_dataset"):
                self.question_choice = question_choice_of(self)
            check_dataset(self.args, self.train_dataset)
            check_can_learn(self)
        load_onto_numbered_cpus()
        with contextlib.ExitStack() as stack:
            stack.enter_context(ending_together(self.accelerator.process_index, self.accelerator.num_processes))
            if self.environment is not None:
                self.note_order()
            if self.use_vllm and self.vllm_mode == "colocate":
                stack.enter_context(sparing_what_is_loaded())
            return super().train(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes `README.md` into `output_dir`. Its name and tags come from the run."""
        if self.environment is None:
            super().create_model_card(*args, **kwargs)
        elif self.args.should_save:
            self.checkpoint_cards.write(Path(self.args.output_dir or "."), self.args, self.state, self.model)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, because it would upload the trajectories, too; `trl-search push` uploads the model."""
        refuse_push(self.environment is not None, self.args.output_dir)
        return super().push_to_hub(*args, **kwargs)
