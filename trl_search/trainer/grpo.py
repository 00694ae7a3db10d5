"""`SearchGRPOTrainer`: TRL's `GRPOTrainer` with rollouts that act in an environment.

TRL owns groups, advantages, the loss, checkpoints, logging and distribution. This file contains only the seams between
TRL and our rollout. `tests/trainer/test_contract_trl.py` has one test per seam, which fails if a new TRL moves it:

| seam of `GRPOTrainer`                | what we do there                                                             |
|--------------------------------------|------------------------------------------------------------------------------|
| `_generate_and_score_completions`    | start a `Rollout` with the dataset's rows; record the scored trajectories    |
| `_generate`                          | replace TRL's decoded strings with the turns as chat messages; log metrics   |
| `rollout_func` (`_rollout`)          | run the trajectories, refill (`groups/`); return ids, log-probs and masks    |
| `_calculate_rewards`                 | give no reward to failed trajectories, so that no baseline counts them       |
| `evaluate`, `predict`, `log`         | name the metrics of each set, average them exactly (`evaluations.py`)        |
| `_prepare_inputs`                    | deal the rows of all ranks (`even_micro_batches.py`)                         |
| `_compute_loss`,                     | run only the tokens of the loss; importance-sample vLLM's: `SearchLoss`      |
| `_get_per_token_logps_and_entropies` | (`loss/seams.py`)                                                            |
| `create_model_card`                  | write our model card                                                         |

A `Rollout` (`batch.py`) carries a generation batch from seam to seam. The loss mask starts as `Trajectory.mask`; TRL's
loss, KL, entropy, ratios, clip metrics and token count all use it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOTrainer

from trl_search.common.garbage import sparing_what_is_loaded
from trl_search.config.agent import protocol_of
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.environment import Environment
from trl_search.environment.registry import described
from trl_search.policies.base import Policy
from trl_search.policies.loading import check_vocabulary
from trl_search.policies.metered import MeteredPolicy
from trl_search.policies.tiny import tiny_policy_path
from trl_search.records.publish.checkpoint_card import CheckpointCards
from trl_search.records.run_log import RunLog
from trl_search.records.trackers import TrackerTables
from trl_search.records.trajectory_log import Scored, TrajectoryLog
from trl_search.retrieval.base import Retriever
from trl_search.rewards import default_weight
from trl_search.rewards.signature import check_names
from trl_search.rollout import rollout
from trl_search.trainer.batch import (
    Rollout,
    check_failures,
    check_unchanged,
    encode_prompts,
    longest_context,
    rollout_metrics,
    sampling_of,
)
from trl_search.trainer.callbacks.alarms import CollapseAlarm
from trl_search.trainer.callbacks.progress import show_steps
from trl_search.trainer.evaluations import Evaluates, check_best_model
from trl_search.trainer.even_micro_batches import EvenMicroBatches
from trl_search.trainer.finite import FiniteSteps, avoid_cudnn_attention
from trl_search.trainer.generation.policy import policy_of
from trl_search.trainer.generation.vllm_backend import making_ours
from trl_search.trainer.groups.carry_over import CarriesOver
from trl_search.trainer.groups.group_rewards import adjust_rewards, exceptions, rewards_of
from trl_search.trainer.groups.question_choice import (
    ChoosesQuestions,
    check_dataset,
    check_ranks_agree,
    question_choice_of,
)
from trl_search.trainer.groups.refill import Refill
from trl_search.trainer.inputs import (
    RewardSpec,
    environment_of,
    refuse_push,
    refuse_what_rollouts_cannot_do,
    resolve_specs,
    tokenizer_of,
)
from trl_search.trainer.journal import open_journal
from trl_search.trainer.loss.mask import loss_mask, loss_mask_of, sampling_logprobs
from trl_search.trainer.loss.seams import SearchLoss
from trl_search.trainer.loss.without_gradient import drop_rounding
from trl_search.trainer.numbered_cpus import load_onto_numbered_cpus
from trl_search.trainer.prepared_datasets import train_dataset_of
from trl_search.trainer.prompts import check_reward_calls, first_prompt, with_prompts
from trl_search.trainer.rank_watch import ending_together
from trl_search.trainer.reference import complete_reference
from trl_search.trainer.replaced import replaced
from trl_search.trainer.rollback import RollsBack
from trl_search.trainer.tag_rows import warn_of_untrained_tags
from trl_search.trainer.trainable import check_can_learn
from trl_search.trainer.turn_credit import credited_advantages, refuse_turn_credit
from trl_search.trainer.unread_tokenizer import UnreadTokenizer
from trl_search.types import Sampling


class SearchGRPOTrainer(
    RollsBack, CarriesOver, ChoosesQuestions, FiniteSteps, Evaluates, EvenMicroBatches, SearchLoss, GRPOTrainer
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
        self._rollouts: Counter[tuple[str, int]] = Counter()
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
                check_ranks_agree(self.args, self.train_dataset, self.accelerator)
            if self.use_vllm and self.vllm_mode == "colocate":
                stack.enter_context(sparing_what_is_loaded())
            return super().train(*args, **kwargs)

    # The seams, in the order in which TRL calls them

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.last_rollout = Rollout(rows=inputs)
        if self.environment is not None and not self.model.training:
            batch.counted_rows = self.rows_to_count(len(inputs) * self.accelerator.num_processes)
        self.choose_questions(batch)
        theirs = self.vllm_importance_sampling_correction and self.environment is None
        # TRL's importance correction needs an extra forward pass; `SearchLoss` corrects in the loss instead.
        with replaced(self, "vllm_importance_sampling_correction", theirs):
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.environment is None:
            return output
        assert batch.rewards_RF is not None
        if not self.model.training:
            self.count_rewards(batch.rewards_RF)
        else:
            drop_rounding(output["advantages"], batch.rewards_RF, self)
            weights_F, names = self.reward_weights, self.reward_func_names
            scored = Scored(loss_mask_of(output), output["advantages"], batch.rewards_RF, weights_F, names)
            step = self.state.global_step + 1
            self.trajectory_log.add(step, batch.rows, batch.trajectories, scored, batch.replaced_trajectories)
            if self.args.turn_credit != "none":
                output["advantages"] = credited_advantages(self, batch.rows, output)
            self.add_to_log(batch.laps.seconds)
        return output

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        if self.environment is None:
            return super()._generate(prompts)
        self.release_engine()  # because TRL syncs the weights first
        unread = UnreadTokenizer(self._tokenizer)
        with replaced(self, "processing_class", unread), replaced(self, "_tokenizer", unread):
            output: tuple[Any, ...] = super()._generate(prompts)
        prompts[:] = [row["prompt"] for row in self.last_rollout.rows]  # TRL reads this list afterwards
        self._log_rollout()
        return (*output[:3], [trajectory.messages for trajectory in self.last_rollout.trajectories], *output[4:])

    def _rollout(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        """TRL's `rollout_func`: one trajectory per prompt, in order. The prompts are already repeated for groups."""
        assert self.environment is not None
        batch = self.last_rollout
        batch.laps.end("time/weights_s")
        self.probe_logprobs()
        batch.prompt_ids = encode_prompts(prompts, self.protocol)
        mode = "train" if self.model.training else "eval"
        sampling = self._sampling(mode)
        if mode == "train" and self.carries_over:
            self.carry_over_rollout(batch, sampling)
            return self._settled(batch)
        with self.generation_policy(batch.possible_prompts) as policy, open_journal(self, sampling) as journal:
            refill = self.refill_of(batch, journal.finished)
            metered = MeteredPolicy(policy, slots=len(prompts))
            batch.trajectories = rollout(
                batch.prompt_ids,
                batch.rows,
                policy=metered,
                environment=self.environment,
                protocol=self.protocol,
                limits=self.args.agent.limits,
                sampling=sampling,
                progress=f"Rollout, {mode} step {self.state.global_step}",
                finished=journal.finished,
                on_finish=journal.add,
                more=refill.more if refill else None,
            )
        batch.metrics["rollout/bubble"] = metered.bubble
        return self._settled(batch, refill)

    def _settled(self, batch: Rollout, refill: Refill | None = None) -> dict[str, list[Any]]:
        """The result for TRL, once all trajectories of the batch have ended."""
        self.settle_questions(batch, refill)
        check_failures(
            [*batch.trajectories, *(one.trajectory for one in batch.replaced_trajectories)], self.args.max_failed_share
        )
        batch.laps.end("time/rollout_s")
        batch.loss_masks = [loss_mask(trajectory, self.args) for trajectory in batch.trajectories]
        batch.logprobs = [sampling_logprobs(trajectory, self.args) for trajectory in batch.trajectories]
        return batch.for_trl()

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids: list[list[int]]
    ) -> torch.Tensor:
        batch = self.last_rollout
        batch.laps.end("time/logprobs_s")
        if batch.groups:  # refill has already called the reward functions
            rewards_RF = rewards_of(self, batch.groups)
        else:
            rewards_RF = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
            if self.environment is not None:
                own_B2 = exceptions(batch.trajectories).to(rewards_RF.device)
                adjust_rewards(rewards_RF, self.accelerator.gather(own_B2), self)
                if batch.counted_rows is not None:
                    rewards_RF[batch.counted_rows :] = torch.nan
        batch.rewards_RF = rewards_RF
        batch.laps.end("time/rewards_s")
        return rewards_RF

    # For callbacks and evaluations

    @contextlib.contextmanager
    def generation_policy(self, prompt_ids: Sequence[Sequence[int]]) -> Iterator[Policy]:
        """The engine with the weights of this step: vLLM, or the model itself. All ranks must enter together.

        Args:
            prompt_ids (`Sequence[Sequence[int]]`): The prompts to be rolled out.

        Raises:
            UserError: if the model has too few positions for the longest prompt and a full completion.
        """
        self.release_engine()
        with policy_of(self, longest_context(prompt_ids, self.model, self.args)) as policy:
            yield policy

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

    def add_to_log(self, metrics: Mapping[str, float]) -> None:
        """Adds metrics to the next training log. TRL averages the values of several calls."""
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)

    # Helpers of the seams

    def _sampling(self, mode: str) -> Sampling:
        # Generations are counted per optimizer step, because TRL's count, `_step`, restarts at 0 after a resume.
        step = self.state.global_step
        self._rollouts[mode, step] += 1
        if mode == "train":
            check_unchanged(self.args, self.checkpoint_cards.agent, self.temperature, self.environment)
        return sampling_of(self.args, f"{mode}/{step}/{self._rollouts[mode, step]}/{self.accelerator.process_index}")

    def _log_rollout(self) -> None:
        assert self.environment is not None
        mode = "train" if self.model.training else "eval"
        trajectories = self.last_rollout.trajectories
        for name, value in rollout_metrics(self.last_rollout, self.acting_environment, self.accelerator).items():
            self._metrics[mode][name].append(value)
        self._log_completion_extra("stop_reason", [t.stop_reason.value if t.stop_reason else "" for t in trajectories])
        self._log_completion_extra("searches", [trajectory.searches for trajectory in trajectories])
