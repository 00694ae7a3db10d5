"""`SearchGRPOConfig`: TRL's `GRPOConfig` and, beside it, what a search agent needs. Flat keys, as in TRL's YAML."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import GRPOConfig

from trl_search.environment import PASSAGE_TEMPLATE
from trl_search.protocols import PROTOCOLS
from trl_search.rollout import Limits


@dataclass
class SearchGRPOConfig(GRPOConfig):
    r"""
    Configuration of [`SearchGRPOTrainer`]. All parameters of [`~trl.GRPOConfig`] apply; these are added or changed:

    Parameters:
        protocol (`str`, *optional*, defaults to `"qwen_tools"`):
            How calls and replies are written: `qwen_tools`, `qwen_inline` or `search_r1`.
        max_completion_length (`int`, *optional*, defaults to `3072`):
            Tokens after the prompt, retrieved ones included (TRL's own default, 512, is one turn of a search agent).
        vllm_importance_sampling_mode (`str`, *optional*, defaults to `"token_truncate"`):
            TRL's default sums log-ratios over a sequence, which zeroes the loss of long trajectories.
    """

    max_completion_length: int = field(
        default=3072,
        metadata={"help": "Tokens of a trajectory after its prompt: the policy's turns and what is retrieved."},
    )
    vllm_importance_sampling_mode: str = field(
        default="token_truncate",
        metadata={
            "help": "How the difference between vLLM's and the trainer's log-probs is corrected; TRL's own default, "
            "sequence_mask, silently drops long trajectories."
        },
    )
    vllm_importance_sampling_clip_max: float = field(
        default=2.0, metadata={"help": "Highest importance ratio of a token between the trainer and vLLM."}
    )
    protocol: str = field(
        default="qwen_tools",
        metadata={
            "help": "How the policy calls the search tool and is answered. qwen_tools: the chat template's own tool "
            "calling; qwen_inline: the reply in the same assistant turn; search_r1: <search> and <information> tags, "
            "for base models.",
            "choices": list(PROTOCOLS),
        },
    )
    instruction: str | None = field(
        default=None, metadata={"help": "Text put before each question. Default: the protocol's own. '': none."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "The system message. Default: whatever the chat template puts there."}
    )
    max_searches: int = field(
        default=4,
        metadata={
            "help": "Searches a trajectory may make. When spent, the policy is told so, and may answer. 0: no tool."
        },
    )
    passages_per_query: int = field(
        default=3, metadata={"help": "Passages retrieved for each query (top_k is TRL's sampling parameter)."}
    )
    max_queries_per_search: int = field(default=4, metadata={"help": "Queries one call may hold; others are not run."})
    max_turn_length: int = field(default=512, metadata={"help": "Tokens of one turn of the policy."})
    max_observation_length: int = field(
        default=768,
        metadata={"help": "Tokens of one observation; its passages are cut one by one, all to the same limit."},
    )
    passage_template: str = field(
        default=PASSAGE_TEMPLATE,
        metadata={"help": "How a passage is shown to the policy, with {rank}, {title} and {text}."},
    )
    search_timeout_s: float = field(default=30.0, metadata={"help": "Seconds after which a search counts as failed."})
    max_failed_share: float = field(
        default=0.5,
        metadata={
            "help": "Trajectories whose retrieval failed are masked from the loss and counted; training stops with an "
            "error when more than this share of a batch has failed."
        },
    )
    mask_observations: bool = field(
        default=True,
        metadata={"help": "Keep retrieved tokens out of the loss. False only for the ablation: it collapses."},
    )
    rollout_batch_size: int = field(
        default=64,
        metadata={"help": "Trajectories the transformers policy generates at once, in one process; others queue."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol={self.protocol!r} does not exist; there are {', '.join(PROTOCOLS)}")
        if not 0 <= self.max_failed_share <= 1:
            raise ValueError(f"max_failed_share={self.max_failed_share} is a share: give a number from 0 to 1")
        if self.search_timeout_s <= 0:
            raise ValueError(f"search_timeout_s={self.search_timeout_s} must be more than 0")
        if self.max_searches < 0:
            raise ValueError(f"max_searches={self.max_searches} must be at least 0")
        for name in (
            "passages_per_query",
            "max_queries_per_search",
            "max_turn_length",
            "max_observation_length",
            "rollout_batch_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def limits(self) -> Limits:
        return Limits(self.max_completion_length, self.max_turn_length, self.max_observation_length)
