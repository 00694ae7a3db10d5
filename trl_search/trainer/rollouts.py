"""`SearchRollouts`: the seams of TRL's `GRPOTrainer` that generate and score a batch; `grpo.py` lists all seams.

A `Rollout` (`batch.py`) carries the batch from seam to seam. The loss mask starts as `Trajectory.mask`; TRL's loss,
KL, entropy, ratios, clip metrics and token count all use it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from trl_search.policies.base import Policy
from trl_search.policies.metered import MeteredPolicy
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.records.publish.checkpoint_card import CheckpointCards
from trl_search.records.trajectory_log import Scored, TrajectoryLog
from trl_search.rollout import rollout
from trl_search.trainer.batch import (
    Rollout,
    check_failures,
    check_unchanged,
    rollout_metrics,
    sampling_of,
)
from trl_search.trainer.evaluations import Evaluates
from trl_search.trainer.groups.carry_over import CarriesOver
from trl_search.trainer.groups.group_rewards import adjust_rewards, exceptions, rewards_of
from trl_search.trainer.groups.question_choice import ChoosesQuestions
from trl_search.trainer.groups.refill import Refill
from trl_search.trainer.journal import open_journal
from trl_search.trainer.loss.mask import loss_mask, loss_mask_of, sampling_logprobs
from trl_search.trainer.loss.seams import SearchLoss
from trl_search.trainer.loss.without_gradient import drop_rounding
from trl_search.trainer.prompts import encode_prompts, longest_context
from trl_search.trainer.replaced import replaced
from trl_search.trainer.turn_credit import credited_advantages
from trl_search.types import Sampling


class SearchRollouts(CarriesOver, ChoosesQuestions, Evaluates, SearchLoss):
    """A `GRPOTrainer` whose batches are rollouts in an environment. Without one, TRL generates and scores."""

    trajectory_log: TrajectoryLog
    checkpoint_cards: CheckpointCards
    _rollouts: Counter[tuple[str, int]]  # generations per mode and optimizer step

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

        Raises:
            UserError: if the model has too few positions for the longest prompt and a full completion.
        """
        self.release_engine()
        context_length = longest_context(prompt_ids, self.model, self.args)
        if self.use_vllm:
            engine: Any = self.vllm_generation
            if self.state.global_step != self._last_loaded_step:  # before a rollout, TRL has already synced
                engine.sync_weights()
                self._last_loaded_step = self.state.global_step
            with engine.policy(context_length) as policy:
                yield policy
            return
        args: Any = self.args
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
        ):
            yield TransformersPolicy(model, self.protocol.tokenizer, max_sequences=args.rollout_batch_size)

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
        self._log_completion_extra("stop_reason", [str(trajectory.stop_reason) for trajectory in trajectories])
        self._log_completion_extra("searches", [trajectory.searches for trajectory in trajectories])


class UnreadTokenizer:
    """Keeps TRL from decoding and parsing completions.

    TRL would decode each trajectory, observations included, into one string. The string is not used, takes a second
    in a step of 700k tokens, and may not parse.
    """

    response_template = response_schema = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def batch_decode(self, sequences: Sequence[Any], **options: Any) -> list[str]:
        return [""] * len(sequences)
