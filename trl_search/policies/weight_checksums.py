"""Checksums of a vLLM server's weights, to verify a weight sync. vLLM imports this file into its workers:

    vllm serve MODEL --worker-extension-cls trl_search.policies.weight_checksums.WeightChecksums ...

A checksum is the sum of a tensor's bit patterns: one changed element changes it, and with tensor parallelism the sums
of the shards add up to that of the whole. Only matrices that vLLM keeps under their own names are compared, because it
fuses q, k and v, and gate and up.

The worker also says when it started, and which training sends its weights.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

EXTENSION = "trl_search.policies.weight_checksums.WeightChecksums"
_SUMMED = ("o_proj.weight", "down_proj.weight")
_STARTED_AT = time.time()  # of this worker
_training = ""  # see `claim_weights`


class WeightChecksums:
    """The methods that `--worker-extension-cls` adds to vLLM's worker; `/collective_rpc` calls them by name."""

    model_runner: Any
    rank: int  # of this worker in its engine

    def started_at(self) -> float:
        """When this worker started. A server with several API servers does not report its start time at `/metrics`."""
        return _STARTED_AT

    def claim_weights(self, training: str) -> None:
        """From now on, the training with this name sends the weights."""
        global _training
        _training = training

    def weights_claimed_by(self) -> str:
        """The training that sends the weights; empty if none does, as after a restart."""
        return _training

    def weight_checksums(self) -> dict[str, int]:
        """The checksums of this worker's share of the weights, by the name of the tensor."""
        named = self.model_runner.model.named_parameters()
        return {name: int(checksum(tensor, tensor.dtype)) for name, tensor in named if has_checksum(name)}

    def require_checksums(self, by_rank: list[dict[str, int]]) -> None:
        """Raises `RuntimeError` unless this worker's checksums are those of its rank.

        Of several engines (`--data-parallel-size`), `/collective_rpc` returns only the results of the first, but fails
        if any of them raises.
        """
        if self.weight_checksums() != by_rank[self.rank]:
            raise RuntimeError("the engines of this server have different weights")


def has_checksum(name: str) -> bool:
    """Whether the tensor with this name is compared."""
    return name.endswith(_SUMMED)


def checksum(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum of the bit patterns of `tensor` as `dtype`, an int64 on the tensor's device."""
    import torch

    whole = tensor.detach().to(dtype).contiguous()
    bits = {2: torch.int16, 4: torch.int32}[whole.element_size()]
    return whole.view(bits).sum(dtype=torch.int64)
