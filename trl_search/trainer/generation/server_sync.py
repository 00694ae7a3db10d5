"""Sends the weights from rank 0 to one or several vLLM servers, and verifies that they arrived.

    named weights ─► buckets of 1 GiB ─► NCCL group of rank 0 and server 1's workers
                                     └─► NCCL group of rank 0 and server 2's workers

One pass over the weights serves all servers. Each server has its own NCCL group, so losing one does not affect the
others; a restarted server gets a new group and rejoins at the next sync.

To verify, a server that runs with `--worker-extension-cls trl_search.policies.weight_checksums.WeightChecksums`
returns checksums of its tensors, which must equal those of the sent tensors exactly.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import requests
import torch
from packaging.version import InvalidVersion, Version

from trl_search.common.errors import UserError
from trl_search.common.tls import tls_context
from trl_search.policies.vllm_metrics import ONE_ADDRESS, shares_engines
from trl_search.policies.vllm_server import ServerLost, server_start_time
from trl_search.policies.weight_checksums import EXTENSION, checksum, has_checksum
from trl_search.trainer.generation.vllm_client import ServerClient, post

logger = logging.getLogger(__name__)

BUCKET_BYTES = 2**30
# With several servers, one that is silent for this long is left out.
SEVERAL_PATIENCE_S = 5.0
# NCCL waits forever for a dead peer, so after this long the server's health is checked, and the process may end.
STUCK_S = 30.0
# The exceptions of TRL's client for a lost server. For an HTTP error it raises a bare Exception.
_LOST = (requests.RequestException, ConnectionError)

# The first version with this form of the request to join an NCCL group (vllm-project/vllm#50902).
_OTHER_GROUPS = Version("0.28.0")

Weights = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Member:
    """A server in an NCCL group with rank 0. `started_at` is the start time of its process."""

    client: Any  # ServerClient
    started_at: float | None
    # The type of its weights, if it returns checksums.
    dtype: torch.dtype | None
    engines: int
    instance: str | None  # vLLM's name for the process, whatever its address


class WeightServers:
    """The servers that rank 0 sends the weights to.

    Args:
        urls (`Sequence[str]`): Their addresses.
        group_port (`int`): The first port of this host that NCCL groups may use.
        device (`torch.device`): The GPU of rank 0.
        patience_s (`float`): How long to wait for a server that does not answer, if it is the only one.
        version (`str`): The version of vLLM in this process, whose code sends the weights.
    """

    def __init__(
        self, urls: Sequence[str], *, group_port: int, device: torch.device, patience_s: float, version: str
    ) -> None:
        self._urls, self._next_port, self._device, self._version = list(urls), group_port, device, version
        self._first_patience_s = patience_s
        self._training = uuid.uuid4().hex
        self._patience_s = patience_s if len(urls) == 1 else SEVERAL_PATIENCE_S
        self.members: dict[str, Member] = {}
        for url in urls:
            self.members[url] = self._join(url, server_start_time(url, patience_s))
        if not all(member.dtype for member in self.members.values()):
            logger.warning(
                "The vLLM server does not return checksums, so a failed weight sync is not detected: start it with "
                "--worker-extension-cls %s",
                EXTENSION,
            )

    @property
    def started_at(self) -> dict[str, float | None]:
        """The start times of the servers that have the weights."""
        return {url: member.started_at for url, member in self.members.items()}

    def send(self, weights: Weights) -> None:
        """Sends the weights to all servers. Of several servers, those that do not answer are left out until they do.

        Raises:
            UserError: if no server is left, one died during the sync, kept its cache, returned other checksums, or
                gets the weights of another training.
        """
        for url, member in self.members.items():
            self._refuse_another_training(url, member)
        self._meet()
        try:
            sent = self._update(weights)
        except _LOST as error:
            raise ServerLost(
                f"a vLLM server died while it received weights ({error})",
                "restart it, then resume from the last checkpoint",
            ) from error
        for url, member in list(self.members.items()):
            try:
                self._drop_cache(url)
                if member.dtype is not None:
                    self._compare(url, member, sent[member.dtype])
            except _LOST as error:
                self._leave_out(url, error)
        if not self.members:
            raise ServerLost("no vLLM server is left", "restart them, then resume from the last checkpoint")

    def _update(self, weights: Weights) -> dict[torch.dtype, dict[str, torch.Tensor]]:
        """Sends the weights in one pass, and returns the checksums of the sent tensors in each server's type."""
        with contextlib.ExitStack() as updates:
            clients = [member.client for member in self.members.values()]
            for client in clients:
                updates.enter_context(client.weight_update())
            sent: dict[torch.dtype, dict[str, torch.Tensor]]
            sent = {member.dtype: {} for member in self.members.values() if member.dtype}
            for bucket in buckets(weights):
                metadata = [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in bucket]
                # vLLM packs and sends on streams of its own, which do not wait for the copies on the current one.
                if self._device.type != "cpu":
                    torch.accelerator.synchronize(self._device)
                for url, client in zip(self.members, clients, strict=True):
                    with _ending_the_process_if_stuck(url):
                        client.update_named_params(metadata, iter(bucket))
                for name, tensor in bucket:
                    if has_checksum(name):
                        for dtype, sums in sent.items():
                            sums[name] = checksum(tensor, dtype)
        return sent

    def _meet(self) -> None:
        """Leaves out servers that do not answer, and lets restarted ones rejoin."""
        problems = []
        for url in self._urls:
            try:
                started_at = server_start_time(url, self._patience_s)
                if url in self.members and self.members[url].started_at == started_at:
                    continue
                logger.warning("The vLLM server at %s was restarted; it gets the weights again.", url)
                self.members[url] = self._join(url, started_at)
            except (UserError, *_LOST) as error:
                problems.append(str(error))
                self._leave_out(url, error)
        if not self.members:
            raise UserError("; ".join(problems))

    def _leave_out(self, url: str, error: Exception) -> None:
        if self.members.pop(url, None):
            said = error.said if isinstance(error, ServerLost) else error
            logger.warning("The vLLM server at %s is left out until it answers again: %s", url, said)

    def _join(self, url: str, started_at: float | None) -> Member:
        client = ServerClient(base_url=url, group_port=self._next_port, connection_timeout=self._first_patience_s)
        self._next_port += 1
        info = client.get_server_info()
        parallel, instance = info.get("parallel_config", {}), info.get("instance_id")
        for other, member in self.members.items():
            # Both are compared, because some versions' names have only five letters.
            if other != url and instance and (instance, started_at) == (member.instance, member.started_at):
                raise UserError(f"{url} and {other} are the same vLLM server: give each server once")
        if shares_engines(info):
            raise UserError(
                f"the vLLM server at {url} shares its engines with other servers (external or hybrid load balancing), "
                f"but the weights must reach all engines through one address: {ONE_ADDRESS}"
            )
        check_versions(url, client._get(f"{url}/version")["version"], self._version)
        client.init_communicator(device=self._device)
        engines = int(parallel.get("data_parallel_size", 1))
        dtype = _checked_dtype(info)
        if dtype is not None:
            post(f"{url}/collective_rpc", json={"method": "claim_weights", "args": [self._training]})
        return Member(client, started_at, dtype, engines, instance)

    def _refuse_another_training(self, url: str, member: Member) -> None:
        """A training that joins takes the server's workers into its own NCCL group, and the next sync of this one
        would wait for them forever. A lost server is left to `_meet`; one that does not say it cannot be checked."""
        if member.dtype is None:
            return
        with contextlib.suppress(*_LOST):
            answer = post(f"{url}/collective_rpc", json={"method": "weights_claimed_by"})
            if answer.ok and answer.json()["results"][0] not in ("", self._training):
                raise UserError(
                    f"another training has begun to send its weights to the vLLM server at {url}: give each training "
                    "its own server, then resume this one from its last checkpoint"
                )

    def _drop_cache(self, url: str) -> None:
        """Drops the keys and values that were computed with older weights.

        While a request of another client runs (an evaluation, a chat), vLLM would keep them all and report success as
        HTTP status, unless it also drops those of the request, and computes them again.
        """
        answer = post(f"{url}/reset_prefix_cache", params={"reset_running_requests": "true"})
        _require_ok(answer, f"the vLLM server at {url} still has keys and values of older weights")

    def _compare(self, url: str, member: Member, sent: dict[str, torch.Tensor]) -> None:
        rpc = f"{url}/collective_rpc"
        workers = member.client._post(rpc, json={"method": "weight_checksums"})["results"]  # of the first engine
        found = {name: sum(worker.get(name, 0) for worker in workers) for name in workers[0]}
        wrong = [name for name, value in sent.items() if name in found and found[name] != int(value)]
        if wrong or not found.keys() & sent.keys():
            raise UserError(
                f"the vLLM server at {url} does not have the weights that it was sent ("
                f"{', '.join(wrong[:3]) or 'none of its tensors is among them'}): check that it serves the model that "
                "is trained, restart it, then resume from the last checkpoint"
            )
        if member.engines > 1:
            engines = f"{member.engines} engines of the vLLM server at {url}"
            answer = post(rpc, json={"method": "require_checksums", "args": [workers]})
            _require_ok(answer, f"not all {engines} have the weights that they were sent")


def buckets(weights: Weights, size: int = BUCKET_BYTES) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Groups the weights into lists of about `size` bytes, as copies, because gathered tensors are soon released."""
    bucket: list[tuple[str, torch.Tensor]] = []
    taken = 0
    for name, tensor in weights:
        bucket.append((name, tensor.clone()))
        taken += tensor.nbytes
        if taken >= size:
            yield bucket
            bucket, taken = [], 0
    if bucket:
        yield bucket


def check_versions(url: str, there: str, here: str) -> None:
    """Raises `UserError` if the server cannot join an NCCL group with this process, which would wait for it."""
    with contextlib.suppress(InvalidVersion):
        if (Version(there) < _OTHER_GROUPS) != (Version(here) < _OTHER_GROUPS):
            raise UserError(
                f"the vLLM server at {url} has version {there}, and this process {here}, but vLLM sends weights in "
                f"another way since {_OTHER_GROUPS}: install the same version on both sides"
            )


def _require_ok(answer: requests.Response, problem: str) -> None:
    if answer.status_code != requests.codes.ok:
        said = f"{answer.status_code}: {answer.text[:300]}"
        raise UserError(f"{problem} ({said}): restart it, then resume from the last checkpoint")


def _checked_dtype(info: dict[str, Any]) -> torch.dtype | None:
    """The type of a server's weights, if it returns checksums and stores the weights unquantized."""
    extension = info.get("parallel_config", {}).get("worker_extension_cls")
    model = info.get("model_config", {})
    dtype = getattr(torch, str(model.get("dtype")).removeprefix("torch."), None)
    return dtype if extension == EXTENSION and not model.get("quantization") else None


@contextlib.contextmanager
def _ending_the_process_if_stuck(url: str) -> Iterator[None]:
    """Ends the process if the server dies while it receives weights: no exception can reach rank 0 inside NCCL."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(STUCK_S):
            try:
                httpx.get(f"{url}/health", timeout=STUCK_S, verify=tls_context(), trust_env=False)
            except httpx.HTTPError as error:
                print(
                    f"the vLLM server at {url} died while it received weights ({error}): restart it, then resume from "
                    "the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)

    threading.Thread(target=watch, name="weights-watch", daemon=True).start()
    try:
        yield
    finally:
        done.set()
