"""`SearchGRPOConfig`: TRL's `GRPOConfig` plus the keys of a search agent. The keys are flat, as in TRL's YAML."""

from __future__ import annotations

from dataclasses import dataclass, fields

from trl import GRPOConfig

from trl_search.common.bounds import check_minima, check_positive, check_share
from trl_search.common.errors import UserError, unknown_name
from trl_search.config.agent import AgentSettings, check_agent
from trl_search.config.carry_over import check_carry_over, check_whole_groups
from trl_search.config.key_docs import key, with_documented_keys
from trl_search.config.recipe_values import checked_values, convert_numbers
from trl_search.config.run_file import absolute_folder
from trl_search.config.trl_keys import check_trls_keys
from trl_search.policies.vllm_address import server_address, server_addresses

TURN_CREDIT = ("none", "information_gain", "retrieval")  # `trainer/turn_credit.py`
# How the ratio of the trainer's to vLLM's probabilities becomes a weight in the loss (`trainer/loss/importance.py`).
IMPORTANCE_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask")
# The kernel for attention within each trajectory of a pack (`trainer/loss/attention.py`).
PACKED_ATTENTION = ("auto", "varlen", "flash_attention_2", "flex_attention", "sdpa", "padded")


@with_documented_keys
@dataclass
class SearchGRPOConfig(AgentSettings, GRPOConfig):  # type: ignore[misc]  # max_completion_length is never None
    r"""
    Configuration of [`SearchGRPOTrainer`]. It accepts all parameters of [`~trl.GRPOConfig`] and of [`AgentSettings`],
    and adds or changes these:

    Parameters:
        max_completion_length (`int`, *optional*, defaults to `3072`):
            Tokens after the prompt, including retrieved ones. (TRL's default, 512, is one turn of a search agent.)
        vllm_importance_sampling_mode (`str`, *optional*, defaults to `"token_truncate"`):
            TRL's default sums log-ratios over a sequence, which zeroes the loss of long trajectories.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "vllm_engine_options"]  # noqa: RUF012 (declared so by TRL)

    vllm_importance_sampling_mode: str = key(
        "token_truncate",
        "How the difference between vLLM's and the trainer's log-probs is corrected. TRL's default, sequence_mask, "
        "silently drops long trajectories. geometric_mask drops trajectories whose geometric mean ratio is outside "
        "of vllm_importance_sampling_clip_min and _max, which should then be near 1 (0.999 and 1.001).",
        choices=IMPORTANCE_MODES,
    )
    vllm_importance_sampling_clip_max: float = key(
        2.0, "Upper bound of a token's importance ratio between the trainer and vLLM."
    )
    vllm_server_base_url: list[str] | None = key(  # type: ignore[assignment]
        None,
        "Address of one or several vLLM servers. Each trajectory stays with one server, all servers get the weights, "
        "and if one is lost the others take over its trajectories.",
    )
    vllm_lora_sync: str = key(
        "merged",
        "What is sent to vLLM when a LoRA adapter is trained. merged: all weights, with the adapter merged. adapter: "
        "only the adapter, which vLLM applies during generation.",
        choices=["merged", "adapter"],
    )
    vllm_adapter_dir: str | None = key(
        None,
        "With vllm_lora_sync=adapter and a vLLM server: the folder for the adapter, which the server must see under "
        "the same path. Default: output_dir/vllm-adapter. Not used with colocate.",
    )
    vllm_engine_options: dict | str | None = key(
        None, 'Extra arguments of vllm.LLM for colocate, as JSON: \'{"dtype": "float32"}\'.'
    )
    eos_token: str | None = key(
        None,
        "The token that ends the assistant's turn, if it is not the tokenizer's: <|im_end|> for a base model with a "
        "ChatML template. It is saved with the model.",
    )
    skip_long_prompts: bool = key(
        False,
        "Leave out training questions whose prompt plus a full completion exceed the model's context. Otherwise such "
        "questions are an error at the start.",
    )
    llds_coef: float = key(
        0.0,
        "Weight of LLDS (arXiv:2512.04220; 0.1 in the paper): a penalty if the likelihood of an action with an "
        "advantage of at least 0 falls below that at sampling time. It needs several optimizer steps per batch, "
        "because with one the likelihood cannot have changed. 0: off.",
    )
    turn_credit: str = key(
        "none",
        "Per-turn credit, added to the advantage of a trajectory. information_gain: how much the turn's observation "
        "raises the policy's probability of the golden answer (IGPO, arXiv:2510.14967); retrieval: whether a golden "
        "answer occurs in it for the first time. Both need the column golden_answers.",
        choices=TURN_CREDIT,
    )
    turn_credit_coef: float = key(0.5, "Weight of turn_credit relative to the trajectory's advantage.")
    search_floor_steps: int = key(
        0,
        "In the first N steps, a trajectory without a search gets at most 0 from each reward. This keeps the policy "
        "searching when guessing pays at first, but also teaches it to search for what it knows. 0: off.",
    )
    refill_groups: int = key(
        0,
        "Replace groups without a gradient (all rewards equal, or retrieval failed) by groups of other questions "
        "before the loss, in at most this many rounds: DAPO's dynamic sampling (arXiv:2503.14476). 0: off.",
    )
    curriculum: str = key(
        "none",
        "pass_rate: draw questions less often if all or none of the trajectories of their last groups were right. "
        "Pass rates are saved with the checkpoints.",
        choices=["none", "pass_rate"],
    )
    carry_over: float = key(
        1.0,
        "Trajectories in flight, in batches. 1.5: a rollout starts half a batch more than it needs, ends when a "
        "batch of complete groups is done, and carries the unfinished ones over to the next rollout (docs/grpo.md). "
        "Useful if a few slow searches hold up the batch (rollout/bubble). 1: off.",
    )
    max_staleness: int = key(
        0,
        "With vllm_mode=server: generate while the trainer computes, and train on a group at most this many batches "
        "after it started. 0: off.",
    )
    max_failed_share: float = key(
        0.5,
        "Trajectories whose retrieval or environment failed are masked from the loss and counted; if more than this "
        "share of a batch fails, training stops with an error.",
    )
    mask_observations: bool = key(
        True, "Keep retrieved tokens out of the loss. False is only for the ablation and learns less."
    )
    packed_attention: str = key(
        "auto",
        "Attention kernel for log-probs over packed trajectories. auto: the first of varlen (PyTorch's own), "
        "flash_attention_2 and flex_attention that works here, else padded (rows of similar length, with padding). "
        "sdpa packs with a full attention mask: for tests.",
        choices=PACKED_ATTENTION,
    )
    max_packed_tokens: int = key(
        16384,
        "Tokens per pack. Packs bound the memory of a forward, so per_device_train_batch_size may be large. Without "
        "gradient_checkpointing, activations of only one pack are kept, and the forward of every pack of a "
        "micro-batch but the last runs twice. 0: as many as fit into the free memory of the GPU, estimated from the "
        "model's shape at the first training forward (16384 on a CPU).",
    )
    rollout_batch_size: int = key(
        64, "Trajectories that the transformers policy generates at once per process; others wait."
    )
    on_collapse: str = key(
        "warn",
        "What to do when an alarm (docs/monitoring.md) has lasted ten logs, or held-out EM has halved. warn: log a "
        "warning. stop: end the training and keep the best checkpoint. rollback: continue from the best checkpoint "
        "with half the learning rate, at most twice; needs evaluate_every.",
        choices=["warn", "stop", "rollback"],
    )
    log_trajectories: int = key(
        64,
        "Trajectories per step that are saved in output_dir/trajectories with their loss mask: whole groups, at "
        "least one. 0: none.",
    )
    trajectory_table_steps: int = key(
        10,
        "Steps between tables of trajectories in W&B and trackio (report_to), starting at the first step. 0: no "
        "tables.",
    )

    def __post_init__(self) -> None:
        ours = {name: getattr(self, name) for name in SearchGRPOConfig.__annotations__ if not name.startswith("_")}
        for name, value in checked_values(ours, [SearchGRPOConfig], "SearchGRPOConfig").items():
            setattr(self, name, value)
        convert_numbers(self)
        check_minima(self, per_device_train_batch_size=1, gradient_accumulation_steps=1, steps_per_generation=1)
        check_minima(self, num_generations=2)  # a group; TRL divides by it before it looks
        self._check_trls_values()
        self.output_dir = absolute_folder(self.output_dir)
        check_agent(self)
        check_trls_keys(self)
        check_carry_over(self)
        for one in fields(self):
            choices = one.metadata.get("choices") if one.name in ours else None
            if choices and getattr(self, one.name) not in choices:
                raise unknown_name(one.name, getattr(self, one.name), choices)
        if self.vllm_server_base_url is not None:
            self.vllm_server_base_url = server_addresses(self.vllm_server_base_url)
        elif self.use_vllm and self.vllm_mode == "server":
            server_address(f"http://{self.vllm_server_host}:{self.vllm_server_port}")
        if isinstance(self.vllm_engine_options, str):
            raise UserError(f"vllm_engine_options={self.vllm_engine_options!r} must be a JSON object")
        if self.vllm_importance_sampling_mode == "geometric_mask" and self.vllm_importance_sampling_clip_min is None:
            raise UserError(
                "vllm_importance_sampling_mode=geometric_mask needs both bounds near 1: set "
                "vllm_importance_sampling_clip_min (0.999) and vllm_importance_sampling_clip_max (1.001)"
            )
        check_minima(self, refill_groups=0, search_floor_steps=0, max_packed_tokens=0, rollout_batch_size=1)
        check_minima(self, log_trajectories=0, trajectory_table_steps=0, llds_coef=0)
        steps_per_batch = (self.steps_per_generation or 1) * self.num_iterations / self.gradient_accumulation_steps
        if self.llds_coef and steps_per_batch <= 1:
            raise UserError(
                f"llds_coef={self.llds_coef} has no effect with one optimizer step per batch, as the likelihood has "
                "not changed yet: set num_iterations or steps_per_generation higher, or leave it out"
            )
        if self.on_collapse == "rollback" and self.save_only_model:
            raise UserError(
                "on_collapse=rollback restores the optimizer and the learning rate from a checkpoint, but with "
                "save_only_model a checkpoint has neither: leave one of them out"
            )
        if self.on_collapse == "rollback" and self.sync_ref_model:
            raise UserError(
                "on_collapse=rollback cannot restore the reference model, which sync_ref_model changes and no "
                "checkpoint contains: leave one of them out"
            )
        check_share(max_failed_share=self.max_failed_share)
        if self.turn_credit != "none":
            if self.loss_type == "vespo":
                raise UserError(
                    "turn_credit does not work with loss_type=vespo, which weights whole trajectories: set another "
                    "loss_type"
                )
            if not self.max_searches:
                raise UserError(
                    f"turn_credit={self.turn_credit} credits searches, but max_searches=0 permits none: leave one out"
                )
            check_positive(turn_credit_coef=self.turn_credit_coef)
        if self.search_floor_steps and not self.max_searches:
            raise UserError(
                f"search_floor_steps={self.search_floor_steps} gives no reward without a search, but max_searches=0 "
                "permits none: leave one of them out"
            )
        if self.chooses_questions:
            check_whole_groups(self, f"{self.chooses_questions} replaces whole groups")

    def _check_trls_values(self) -> None:
        """Runs TRL's checks. Its message about incomplete groups names only a key that is rarely set."""
        try:
            GRPOConfig.__post_init__(self)
        except ValueError as error:
            batch = self.generation_batch_size or 0
            if batch % (self.num_generations or 1) == 0:
                raise
            raise UserError(
                f"a batch has {batch} trajectories (per_device_train_batch_size × steps_per_generation × processes), "
                f"which is not a multiple of num_generations={self.num_generations}: make it one"
            ) from error

    @property
    def chooses_questions(self) -> str:
        """The key and value that draw questions beyond those of TRL's sampler; empty if there are none."""
        if self.refill_groups:
            return f"refill_groups={self.refill_groups}"
        return "" if self.curriculum == "none" else f"curriculum={self.curriculum}"
