"""`SearchGRPOConfig`: TRL's `GRPOConfig` and, beside it, what a search agent needs. Flat keys, as in TRL's YAML."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from trl import GRPOConfig

from trl_search.common.errors import UserError, unknown_name
from trl_search.config.agent import AgentSettings, check_agent
from trl_search.config.carry_over import check_carry_over
from trl_search.config.key_docs import with_documented_keys
from trl_search.config.recipe_values import checked_values

TURN_CREDIT = ("none", "information_gain", "retrieval")  # `trainer/turn_credit.py`
# How the ratio between the trainer and vLLM becomes a weight in the loss (`trainer/loss/importance.py`).
IMPORTANCE_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask")
# What computes attention within each trajectory of a pack (`trainer/loss/attention.py`).
PACKED_ATTENTION = ("auto", "varlen", "flash_attention_2", "flex_attention", "sdpa", "padded")


@with_documented_keys
@dataclass
class SearchGRPOConfig(AgentSettings, GRPOConfig):  # type: ignore[misc]  # narrower: max_completion_length is set
    r"""
    Configuration of [`SearchGRPOTrainer`]. All parameters of [`~trl.GRPOConfig`] and of [`AgentSettings`] apply; these
    are added or changed:

    Parameters:
        max_completion_length (`int`, *optional*, defaults to `3072`):
            Tokens after the prompt, with the retrieved ones. (TRL's own default, 512, is one turn of a search agent.)
        vllm_importance_sampling_mode (`str`, *optional*, defaults to `"token_truncate"`):
            TRL's default sums log-ratios over a sequence, which zeroes the loss of long trajectories.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "vllm_engine_options"]  # noqa: RUF012 (declared so by TRL)

    vllm_importance_sampling_mode: str = field(
        default="token_truncate",
        metadata={
            "help": "How the difference between vLLM's and the trainer's log-probs is corrected; TRL's own default, "
            "sequence_mask, silently drops long trajectories. geometric_mask drops trajectories whose mean ratio is "
            "outside of vllm_importance_sampling_clip_min and _max, which should then be near 1 (0.999 and 1.001).",
            "choices": list(IMPORTANCE_MODES),
        },
    )
    vllm_importance_sampling_clip_max: float = field(
        default=2.0, metadata={"help": "Highest importance ratio of a token between the trainer and vLLM."}
    )
    vllm_server_base_url: list[str] | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Addresses of vLLM servers, one or several. Each trajectory stays with one server, all get the "
            "weights, and when one is lost the others take over its trajectories."
        },
    )
    vllm_lora_sync: str = field(
        default="merged",
        metadata={
            "help": "What goes to vLLM when a LoRA adapter is trained. merged: all weights, the adapter merged into "
            "them. adapter: the adapter alone, which vLLM applies as it serves.",
            "choices": ["merged", "adapter"],
        },
    )
    vllm_adapter_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder through which the adapter reaches a vLLM server (vllm_lora_sync=adapter), which must see "
            "it under the same path. Default: output_dir/vllm-adapter. A colocated engine needs none."
        },
    )
    vllm_engine_options: dict | str | None = field(
        default=None, metadata={"help": 'More arguments of vllm.LLM for colocate, as JSON: \'{"dtype": "float32"}\'.'}
    )
    eos_token: str | None = field(
        default=None,
        metadata={
            "help": "The token that ends the assistant's turn, if the tokenizer names another: <|im_end|> for a base "
            "model with a ChatML template. It is saved with the model."
        },
    )
    skip_long_prompts: bool = field(
        default=False,
        metadata={
            "help": "Leave out training questions whose prompt and a full completion do not fit the model. Otherwise "
            "such a dataset is refused at the start."
        },
    )
    llds_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of LLDS (arXiv:2512.04220), a penalty where the likelihood of actions whose advantage is "
            "at least 0 falls below that at sampling time. The paper's value is 0.1. It needs several optimizer steps "
            "per batch: with one, nothing can have fallen yet. 0: none."
        },
    )
    turn_credit: str = field(
        default="none",
        metadata={
            "help": "Credit for single turns, added to the advantage of a trajectory. information_gain: what a turn's "
            "observation adds to the policy's probability of the golden answer (IGPO, arXiv:2510.14967); retrieval: "
            "whether a golden answer occurs in it for the first time. Both need the column golden_answers.",
            "choices": list(TURN_CREDIT),
        },
    )
    turn_credit_coef: float = field(
        default=0.5, metadata={"help": "Weight of turn_credit beside the trajectory's advantage."}
    )
    search_floor_steps: int = field(
        default=0,
        metadata={
            "help": "In the first N steps, a trajectory without a search earns at most 0 from each reward. It "
            "keeps searching alive where guessing pays at first, and teaches the policy to search even for what it "
            "knows. 0: none."
        },
    )
    refill_groups: int = field(
        default=0,
        metadata={
            "help": "Replace groups without a gradient (all rewards equal, or retrieval failed) by other questions "
            "before the loss, in at most this many rounds: DAPO's dynamic sampling (arXiv:2503.14476). 0: keep them."
        },
    )
    curriculum: str = field(
        default="none",
        metadata={
            "help": "pass_rate: draw questions less often that were solved by all or by none of the trajectories of "
            "their last groups. What is known of each question is kept with the checkpoints.",
            "choices": ["none", "pass_rate"],
        },
    )
    carry_over: float = field(
        default=1.0,
        metadata={
            "help": "Trajectories under way, in batches. 1.5: a rollout begins with half a batch more than it needs, "
            "ends when a batch of whole groups is done, and carries the unfinished ones over to the next "
            "(docs/grpo.md). It pays where a few slow searches hold the batch (rollout/bubble). 1: off."
        },
    )
    max_staleness: int = field(
        default=0,
        metadata={
            "help": "With vllm_mode=server: generate while the trainer computes, and train on a group at most this "
            "many batches after it began. 0: off."
        },
    )
    max_failed_share: float = field(
        default=0.5,
        metadata={
            "help": "Trajectories whose retrieval or environment failed are masked from the loss and counted; "
            "training stops with an error when more than this share of a batch has failed."
        },
    )
    mask_observations: bool = field(
        default=True,
        metadata={"help": "Keep retrieved tokens out of the loss. False only for the ablation, which learns less."},
    )
    packed_attention: str = field(
        default="auto",
        metadata={
            "help": "Which kernel log-probs are computed with, over trajectories packed without padding. auto: the "
            "first of varlen (PyTorch's own), flash_attention_2 and flex_attention that works here, else padded (rows "
            "of like length together). sdpa packs too, with one mask of all tokens by all: for tests.",
            "choices": list(PACKED_ATTENTION),
        },
    )
    max_packed_tokens: int = field(
        default=16384,
        metadata={
            "help": "Tokens of a pack; they bound the memory of a forward, and per_device_train_batch_size may be "
            "large. Without gradient_checkpointing the activations of one pack are kept at a time, and all packs of a "
            "micro-batch but the last run twice. 0: as many as the free memory of the GPU has room for, estimated "
            "from the model's shape at the first training forward (16384 on a CPU)."
        },
    )
    rollout_batch_size: int = field(
        default=64,
        metadata={"help": "Trajectories the transformers policy generates at once, in one process; others queue."},
    )
    on_collapse: str = field(
        default="warn",
        metadata={
            "help": "What happens when an alarm (docs/monitoring.md) has lasted ten logs, or held-out EM has halved. "
            "warn: it is told. stop: the training ends, and the best checkpoint is kept. rollback: it goes on from "
            "the best checkpoint with half the learning rate, twice at most; needs evaluate_every.",
            "choices": ["warn", "stop", "rollback"],
        },
    )
    log_trajectories: int = field(
        default=64,
        metadata={
            "help": "Trajectories of a step that are kept in output_dir/trajectories, with their loss mask: whole "
            "groups, at least one. 0: none."
        },
    )
    trajectory_table_steps: int = field(
        default=10,
        metadata={
            "help": "Steps from one table of trajectories to the next in W&B and trackio (report_to); the first step "
            "has one too. 0: no tables."
        },
    )

    def __post_init__(self) -> None:
        ours = {name: getattr(self, name) for name in SearchGRPOConfig.__annotations__ if not name.startswith("_")}
        for name, value in checked_values(ours, [SearchGRPOConfig], "SearchGRPOConfig").items():
            setattr(self, name, value)
        GRPOConfig.__post_init__(self)
        check_agent(self)
        check_carry_over(self)
        for key in fields(self):
            choices = key.metadata.get("choices") if key.name in ours else None
            if choices and getattr(self, key.name) not in choices:
                raise unknown_name(key.name, getattr(self, key.name), choices)
        if isinstance(self.vllm_engine_options, str):
            raise UserError(f"vllm_engine_options={self.vllm_engine_options!r} must be a JSON object")
        if self.vllm_importance_sampling_mode == "geometric_mask" and self.vllm_importance_sampling_clip_min is None:
            raise UserError(
                "vllm_importance_sampling_mode=geometric_mask needs both bounds near 1: set "
                "vllm_importance_sampling_clip_min (0.999) and vllm_importance_sampling_clip_max (1.001)"
            )
        if self.llds_coef < 0:
            raise UserError(f"llds_coef={self.llds_coef} must be at least 0")
        steps_per_batch = (self.steps_per_generation or 1) * self.num_iterations / self.gradient_accumulation_steps
        if self.llds_coef and steps_per_batch <= 1:
            raise UserError(
                f"llds_coef={self.llds_coef} has no effect with one optimizer step per batch, as nothing can have "
                "fallen yet: set num_iterations or steps_per_generation higher, or leave it out"
            )
        if self.on_collapse == "rollback" and self.save_only_model:
            raise UserError(
                "on_collapse=rollback goes back to the optimizer and the learning rate of a checkpoint, and with "
                "save_only_model it has none: leave one of them out"
            )
        if self.on_collapse == "rollback" and self.sync_ref_model:
            raise UserError(
                "on_collapse=rollback cannot take back what sync_ref_model has moved into the reference model, as no "
                "checkpoint holds that: leave one of them out"
            )
        if not 0 <= self.max_failed_share <= 1:
            raise UserError(f"max_failed_share={self.max_failed_share} is a share: give a number from 0 to 1")
        if self.turn_credit != "none":
            if self.loss_type == "vespo":
                raise UserError("turn_credit: loss_type=vespo weighs a trajectory as a whole; take another loss_type")
            if not self.max_searches:
                raise UserError(f"turn_credit={self.turn_credit} credits searches, and max_searches=0 permits none")
            if self.turn_credit_coef <= 0:
                raise UserError(f"turn_credit_coef={self.turn_credit_coef} must be more than 0")
        if self.search_floor_steps and not self.max_searches:
            raise UserError(
                f"search_floor_steps={self.search_floor_steps} rewards nothing without a search, and max_searches=0 "
                "permits none: leave one of them out"
            )
        rows = self.per_device_train_batch_size * (self.steps_per_generation or 1)
        if (self.refill_groups > 0 or self.curriculum != "none") and rows % (self.num_generations or 1):
            asked = f"refill_groups={self.refill_groups}" if self.refill_groups else f"curriculum={self.curriculum}"
            raise UserError(
                f"{asked} changes whole groups, and num_generations={self.num_generations} does not divide the {rows} "
                "trajectories of a process (per_device_train_batch_size × steps_per_generation): make it divide them"
            )
        counts = ("refill_groups", "search_floor_steps", "log_trajectories", "trajectory_table_steps")
        for name in (*counts, "max_packed_tokens", "rollout_batch_size"):
            least = int(name == "rollout_batch_size")
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
