"""One vLLM server that gets the weights: what is checked before it joins, and before and after each sync.

To verify, a server that runs with `--worker-extension-cls trl_search.policies.weight_checksums.WeightChecksums`
returns checksums of its tensors, which must equal those of the sent tensors exactly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import requests
import torch

from trl_search.common.errors import UserError
from trl_search.policies.vllm_metrics import ONE_ADDRESS, shares_engines
from trl_search.policies.vllm_versions import can_join
from trl_search.policies.weight_checksums import EXTENSION
from trl_search.trainer.generation.vllm_client import post

# The exceptions of TRL's client for a lost server. For an HTTP error it raises a bare Exception.
LOST = (requests.RequestException, ConnectionError)


@dataclass(frozen=True)
class WeightServer:
    """A server that joins an NCCL group with rank 0."""

    url: str
    client: Any
    started_at: float | None
    info: dict[str, Any]

    @property
    def instance(self) -> str | None:
        """vLLM's name for the process, whatever its address."""
        return self.info.get("instance_id")

    @property
    def engines(self) -> int:
        return int(self._parallel.get("data_parallel_size", 1))

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of its weights, if it returns checksums and stores the weights unquantized."""
        model = self.info.get("model_config", {})
        if self._parallel.get("worker_extension_cls") != EXTENSION or model.get("quantization"):
            return None
        return getattr(torch, str(model.get("dtype")).removeprefix("torch."), None)

    @property
    def _parallel(self) -> dict[str, Any]:
        return self.info.get("parallel_config", {})

    # Before it joins: otherwise rank 0 would wait in NCCL forever

    def require_one_address(self, others: Iterable[WeightServer]) -> None:
        """Raises `UserError` if the server has a second address, or engines that this address does not reach."""
        for other in others:
            # Both are compared, because some versions' names have only five letters.
            same = (self.instance, self.started_at) == (other.instance, other.started_at)
            if other.url != self.url and self.instance and same:
                raise UserError(f"{self.url} and {other.url} are the same vLLM server: give each server once")
        if shares_engines(self.info):
            raise UserError(
                f"the vLLM server at {self.url} shares its engines with other servers (external or hybrid load "
                f"balancing), but the weights must reach all engines through one address: {ONE_ADDRESS}"
            )

    def require_version(self, here: str) -> None:
        """Raises `UserError` if the server cannot join an NCCL group with vLLM's version in this process."""
        there = self.client._get(f"{self.url}/version")["version"]
        if not can_join(there, here):
            raise UserError(
                f"the vLLM server at {self.url} has version {there}, and this process {here}, between which vLLM "
                "changed how weights are sent: install the same version on both sides"
            )

    # Who sends its weights

    def claim(self, training: str) -> None:
        """Tells the server's workers the name of the training that sends their weights."""
        if self.dtype is not None:
            self._ask_workers("claim_weights", training)

    def require_claim(self, training: str) -> None:
        """Raises `UserError` if another training sends the weights.

        That training took the workers into its own NCCL group, so the next sync of this one would wait for them
        forever. A lost server passes, as does one that does not say who sends its weights.
        """
        if self.dtype is None:
            return
        with contextlib.suppress(*LOST):
            answer = self._ask_workers("weights_claimed_by")
            if answer.ok and answer.json()["results"][0] not in ("", training):
                raise UserError(
                    f"another training has begun to send its weights to the vLLM server at {self.url}: give each "
                    "training its own server, then resume this one from its last checkpoint"
                )

    # After a sync

    def drop_cache(self) -> None:
        """Drops the keys and values that were computed with older weights.

        While a request of another client runs (an evaluation, a chat), vLLM would keep them all and report success as
        HTTP status, unless it also drops those of the request, and computes them again.
        """
        answer = post(f"{self.url}/reset_prefix_cache", params={"reset_running_requests": "true"})
        _require_ok(answer, f"the vLLM server at {self.url} still has keys and values of older weights")

    def require_weights(self, sent: dict[str, torch.Tensor]) -> None:
        """Raises `UserError` unless all engines have tensors with the checksums `sent`."""
        rpc = {"method": "weight_checksums"}
        workers = self.client._post(f"{self.url}/collective_rpc", json=rpc)["results"]  # of the first engine
        found = {name: sum(worker.get(name, 0) for worker in workers) for name in workers[0]}
        wrong = [name for name, value in sent.items() if name in found and found[name] != int(value)]
        if wrong or not found.keys() & sent.keys():
            raise UserError(
                f"the vLLM server at {self.url} does not have the weights that it was sent ("
                f"{', '.join(wrong[:3]) or 'none of its tensors is among them'}): check that it serves the model that "
                "is trained, restart it, then resume from the last checkpoint"
            )
        if self.engines > 1:
            engines = f"{self.engines} engines of the vLLM server at {self.url}"
            answer = self._ask_workers("require_checksums", workers)
            _require_ok(answer, f"not all {engines} have the weights that they were sent")

    def _ask_workers(self, method: str, *args: Any) -> requests.Response:
        return post(f"{self.url}/collective_rpc", json={"method": method, "args": list(args)})


def _require_ok(answer: requests.Response, problem: str) -> None:
    if answer.status_code != requests.codes.ok:
        said = f"{answer.status_code}: {answer.text[:300]}"
        raise UserError(f"{problem} ({said}): restart it, then resume from the last checkpoint")
