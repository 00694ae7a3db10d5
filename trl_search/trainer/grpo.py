"""`SearchGRPOTrainer`: TRL's `GRPOTrainer` whose rollouts talk to a world.

TRL owns groups, advantages, the loss, checkpoints, logging and distribution. This file holds the seams between it and
our rollout, and nothing else; `tests/trainer/test_contract_trl.py` pins each, so that a new TRL breaks a named test:

| seam of `GRPOTrainer`             | what we do there                                                              |
|-----------------------------------|-------------------------------------------------------------------------------|
| `rollout_func`                    | run the trajectories; give ids, logprobs and `env_mask`                       |
| `_generate_and_score_completions` | keep the dataset rows, which `rollout_func` never sees; record trajectories   |
| `_generate`                       | put the turns as chat messages where TRL put one decoded string; log          |
| `_calculate_rewards`              | rows whose retrieval failed get no reward, so they enter no baseline          |
| `_compute_loss`                   | keep the loss mask, which `_get_per_token_logps_and_entropies` never sees     |
| `_get_per_token_logps_and_entropies` | run real tokens only, and score those of the loss (`logprobs.py`)           |

Where the mask is: `Trajectory.mask` goes out as `env_mask`, TRL turns it into `tool_mask`, and its loss, KL, entropy,
ratios, clip metrics and token count all run over `completion_mask * tool_mask`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from trl_search.common.errors import UserError
from trl_search.config.agent import protocol_of, search_environment
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.environment import Environment
from trl_search.policies.base import Policy
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.records.run_log import RunLog
from trl_search.records.trackers import TrackerTables
from trl_search.records.trajectory_log import Scored, TrajectoryLog
from trl_search.records.trajectory_metrics import merge_retrieval_metrics, trajectory_metrics
from trl_search.retrieval.base import Retriever
from trl_search.rewards import default_weight
from trl_search.rollout import rollout
from trl_search.trainer.callbacks.alarms import CollapseAlarm
from trl_search.trainer.inputs import (
    RewardSpec,
    load_tokenizer,
    refuse_what_rollouts_cannot_do,
    resolve_specs,
    with_prompts,
)
from trl_search.trainer.loss.logprobs import make_logprobs
from trl_search.trainer.weight_sync import SearchVLLM, making_ours
from trl_search.types import Sampling, StopReason, Trajectory


class SearchGRPOTrainer(GRPOTrainer):
    """
    Trains a policy with GRPO to search, read and answer.

    Without `retriever` and `environment` it is a plain [`~trl.GRPOTrainer`].

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, as for [`~trl.GRPOTrainer`].
        reward_funcs (`str`, `Callable` or a list of both, *optional*):
            Names (`"em"`, `"f1"`, `"format"`, `"reflection"`, `"retrieval"`, or one an installed package adds),
            callables in TRL's signature, reward models as for [`~trl.GRPOTrainer`], or several of them. Defaults to
            `"em"` where there is a retriever or an environment. Weights come from `args.reward_weights`, else from
            each reward.
        args ([`SearchGRPOConfig`], *optional*):
            The configuration.
        train_dataset, eval_dataset ([`~datasets.Dataset`], *optional*):
            Rows with a `question` (or a conversational `prompt`) and the columns that the rewards read; `em`, `f1` and
            `retrieval` read `golden_answers`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer; loaded from the model's folder by default.
        retriever ([`Retriever`], *optional*):
            What the default [`SearchEnvironment`] searches.
        environment ([`Environment`], *optional*):
            A world of your own, in place of `SearchEnvironment(retriever)`.
        **kwargs:
            Everything else goes to [`~trl.GRPOTrainer`]: `peft_config`, `callbacks`, `optimizers`, ...

    Raises:
        UserError: for missing columns, an empty dataset, a model or a template that cannot do what is asked.

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

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardSpec | Sequence[RewardSpec] | None = None,
        args: SearchGRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        retriever: Retriever | None = None,
        environment: Environment | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = SearchGRPOConfig("search-grpo")
        if (retriever is not None or environment is not None) and not isinstance(args, SearchGRPOConfig):
            raise UserError(f"args must be a SearchGRPOConfig, and it is a {type(args).__name__}")
        if retriever is not None and environment is not None:
            raise UserError("give a retriever or an environment, not both: SearchEnvironment(retriever) is one")
        if environment is None and retriever is not None:
            environment = search_environment(retriever, args.agent)
        self.environment = environment
        if reward_funcs is None and environment is not None:
            reward_funcs = "em"
        rewards = [] if reward_funcs is None else resolve_specs(reward_funcs)
        if environment is not None:
            refuse_what_rollouts_cannot_do(args, kwargs)
            processing_class = processing_class or load_tokenizer(model, args)
            self.protocol = protocol_of(args.agent, processing_class, environment.tools)
            train_dataset = with_prompts(train_dataset, self.protocol, rewards, "train_dataset")
            if isinstance(eval_dataset, dict):
                eval_dataset = {
                    name: with_prompts(dataset, self.protocol, rewards, f"eval_dataset[{name!r}]")
                    for name, dataset in eval_dataset.items()
                }
            else:
                eval_dataset = with_prompts(eval_dataset, self.protocol, rewards, "eval_dataset")
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
        if self.environment is not None and self.is_fsdp_enabled:
            raise UserError("under FSDP the ranks' rollouts would wait for each other: use DDP or DeepSpeed ZeRO")
        self._rows: list[dict[str, Any]] = []
        self._trajectories: list[Trajectory] = []
        self._rollouts: Counter[tuple[str, int]] = Counter()
        if self.environment is not None:
            self.rollout_func = self._rollout
            # First of all: it writes into the logs that the others report.
            self.callback_handler.callbacks.insert(0, CollapseAlarm(stop=args.stop_on_collapse))
            self.run_log = RunLog(model=self.model.config._name_or_path, protocol=args.protocol)
            self.trajectory_log = TrajectoryLog(args, self._tokenizer, self.accelerator)
            self.add_callback(self.run_log)
            self.add_callback(TrackerTables(self.run_log, self.trajectory_log))
        self._loss_mask_BC: torch.Tensor | None = None
        self._logprobs = None
        if self.environment is not None:
            self._logprobs = make_logprobs([self.model, self.ref_model], args, self.accelerator)

    # The seams, in the order in which TRL passes through them

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        try:
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        finally:
            self._loss_mask_BC = None  # set by `_rollout`, for the log-probs of the old and the reference policy
        if self.environment is not None and self.model.training:
            scored = Scored(output, self._rewards_RF, self.reward_weights, self.reward_func_names)
            self.trajectory_log.add(self.state.global_step + 1, inputs, self._trajectories, scored)
        return output

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        if self.environment is None:
            return super()._generate(prompts)
        tokenizer = self.processing_class, self._tokenizer
        self.processing_class = self._tokenizer = _Unread(self._tokenizer)  # type: ignore[assignment]
        try:
            output: tuple[Any, ...] = super()._generate(prompts)
        finally:
            self.processing_class, self._tokenizer = tokenizer
        self._log_trajectories(self._trajectories)
        return (*output[:3], [trajectory.messages for trajectory in self._trajectories], *output[4:])

    def _rollout(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        """TRL's `rollout_func`: one trajectory for each prompt, in order; prompts come already repeated for groups."""
        assert self.environment is not None
        encoded = self._encode(prompts)
        mode = "train" if self.model.training else "eval"
        with self._generation_policy(self._check_lengths(encoded)) as policy:
            self._trajectories = rollout(
                encoded,
                self._rows,
                policy=policy,
                environment=self.environment,
                protocol=self.protocol,
                limits=self.args.agent.limits,
                sampling=self._sampling(mode),
                description=f"Rollout, {mode} step {self.state.global_step}",
            )
        self._check_failures(self._trajectories)
        masks = [self._loss_mask(trajectory) for trajectory in self._trajectories]
        self._loss_mask_BC = pad_sequence([torch.tensor(mask) for mask in masks], batch_first=True)
        return {
            "prompt_ids": [list(ids) for ids in encoded],
            "completion_ids": [trajectory.ids for trajectory in self._trajectories],
            "logprobs": [self._sampling_logprobs(trajectory) for trajectory in self._trajectories],
            "env_mask": masks,
        }

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids: list[list[int]]
    ) -> torch.Tensor:
        rewards: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        if self.environment is not None:
            failed = torch.tensor([trajectory.failed for trajectory in self._trajectories], device=rewards.device)
            rewards[self.accelerator.gather(failed)] = torch.nan
            self._rewards_RF = rewards
        return rewards

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if self._logprobs is None or compute_aux_loss or any(value is not None for value in multimodal.values()):
            # The load-balancing loss of a mixture of experts is a mean over all tokens: TRL's forward has them all.
            options = {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss}
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **options, **multimodal
            )
        with self.accelerator.autocast():
            batch = (input_ids, attention_mask, logits_to_keep, self._loss_mask_BC)
            again = self.model.is_gradient_checkpointing
            logps, entropies = self._logprobs(model, *batch, batch_size=batch_size, gradient_checkpointing=again)
        return logps, entropies if compute_entropy else None, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self._loss_mask_BC = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        try:
            loss: torch.Tensor = super()._compute_loss(model, inputs)
        finally:
            self._loss_mask_BC = None
        return loss

    # What the seams are made of

    def _loss_mask(self, trajectory: Trajectory) -> list[int]:
        # One whose last observation found no room ends in a sampled EOS: to TRL it would look finished.
        cut = self.args.mask_truncated_completions and trajectory.stop_reason is StopReason.TOKEN_BUDGET
        if trajectory.failed or cut:
            return [0] * len(trajectory.ids)
        return trajectory.mask if self.args.mask_observations else [1] * len(trajectory.ids)

    def _sampling_logprobs(self, trajectory: Trajectory) -> list[float]:
        if self.args.mask_observations:
            return trajectory.logprobs
        # In the loss without having been sampled: TRL weighs a NaN with 1, and the 0 that stands there with p(token).
        pairs = zip(trajectory.logprobs, trajectory.mask, strict=True)
        return [logprob if sampled else math.nan for logprob, sampled in pairs]

    @contextlib.contextmanager
    def _generation_policy(self, context_length: int) -> Iterator[Policy]:
        """What generates: vLLM, or the model itself. `context_length` is what the longest trajectory may take."""
        if self.use_vllm:
            assert isinstance(self.vllm_generation, SearchVLLM)
            with self.vllm_generation.policy(context_length) as policy:
                yield policy
            return
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,  # type: ignore[arg-type]
            ) as model,
            torch.no_grad(),
        ):
            yield TransformersPolicy(model, self._tokenizer, max_sequences=self.args.rollout_batch_size)

    def _sampling(self, mode: str) -> Sampling:
        # Every rank and every generation draws its own numbers, the same ones when the run is repeated or resumed. So
        # they are counted from the start of their optimizer step: TRL's own `_step` starts at 0 after a resume.
        step = self.state.global_step
        self._rollouts[mode, step] += 1
        seed = f"{self.args.seed}/{mode}/{step}/{self._rollouts[mode, step]}/{self.accelerator.process_index}"
        return Sampling(
            temperature=self.args.temperature,
            top_p=self.args.top_p,
            top_k=self.args.top_k or 0,
            min_p=self.args.min_p or 0.0,
            seed=int.from_bytes(seed.encode(), "big"),
        )

    def _encode(self, prompts: list[Any]) -> list[tuple[int, ...]]:
        """The ids of each prompt; a group's is rendered once."""
        rendered: dict[str, tuple[int, ...]] = {}
        keys = [json.dumps(prompt, sort_keys=True) for prompt in prompts]
        for key, prompt in zip(keys, prompts, strict=True):
            if key not in rendered:
                rendered[key] = self.protocol.prompt_ids(prompt)
        return [rendered[key] for key in keys]

    def _check_lengths(self, encoded: list[tuple[int, ...]]) -> int:
        """Tokens that the longest prompt and a full completion take, which the model must have positions for."""
        longest = max(map(len, encoded))
        needed = longest + self.args.max_completion_length
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and needed > room:
            raise UserError(
                f"a prompt of {longest} tokens and max_completion_length={self.args.max_completion_length} need "
                f"{needed} positions, and the model has {room}: lower max_completion_length"
            )
        return needed

    def _check_failures(self, trajectories: list[Trajectory]) -> None:
        # Gathered, so that every rank stops at the same step.
        errors = gather_object([trajectory.error if trajectory.failed else None for trajectory in trajectories])
        failed = [error for error in errors if error is not None]
        if len(failed) > self.args.max_failed_share * len(errors):
            raise RuntimeError(
                f"retrieval failed for {len(failed)} of {len(errors)} trajectories, more than "
                f"max_failed_share={self.args.max_failed_share}; the first error: {failed[0]}"
            )

    def _log_trajectories(self, trajectories: list[Trajectory]) -> None:
        mode = "train" if self.model.training else "eval"
        rows = [trajectory_metrics(trajectory) for trajectory in trajectories]
        local = torch.tensor([list(row.values()) for row in rows], device=self.accelerator.device)  # (B, metrics)
        means = self.accelerator.gather(local).mean(dim=0).tolist()
        for name, mean in zip(rows[0], means, strict=True):
            self._metrics[mode][name].append(mean)
        assert self.environment is not None
        for name, value in merge_retrieval_metrics(gather_object([self.environment.take_metrics()])).items():
            self._metrics[mode][name].append(value)
        self._log_completion_extra("stop_reason", [t.stop_reason.value if t.stop_reason else "" for t in trajectories])
        self._log_completion_extra("searches", [trajectory.searches for trajectory in trajectories])


class _Unread:
    """A tokenizer with which TRL neither decodes nor parses what was generated.

    It would read a trajectory as one string, the policy's words and the world's, which is not used, takes a second of
    a step with 700k tokens, and may not parse.
    """

    response_template = response_schema = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def batch_decode(self, sequences: Sequence[Any], **options: Any) -> list[str]:
        return [""] * len(sequences)
