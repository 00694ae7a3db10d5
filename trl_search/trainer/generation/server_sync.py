"""Sends the weights from rank 0 to one or several vLLM servers, and verifies that they arrived (`weight_server.py`).

    named weights ─► buckets of 1 GiB ─► NCCL group of rank 0 and server 1's workers
                                     └─► NCCL group of rank 0 and server 2's workers

One pass over the weights serves all servers. Each server has its own NCCL group, so losing one does not affect the
others; a restarted server gets a new group and rejoins at the next sync.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence

import httpx
import torch

from trl_search.common.errors import UserError
from trl_search.policies.vllm_address import client_options
from trl_search.policies.vllm_server import ServerLost, server_start_time
from trl_search.policies.weight_checksums import EXTENSION, checksum, has_checksum
from trl_search.trainer.generation.vllm_client import ServerClient
from trl_search.trainer.generation.weight_server import LOST, WeightServer

logger = logging.getLogger(__name__)

BUCKET_BYTES = 2**30
# With several servers, one that is silent for this long is left out.
SEVERAL_PATIENCE_S = 5.0
# NCCL waits forever for a dead peer, so after this long the server's health is checked, and the process may end.
STUCK_S = 30.0

Weights = Iterable[tuple[str, torch.Tensor]]


class WeightServers:
    """The servers that rank 0 sends the weights to."""

    def __init__(
        self, urls: Sequence[str], *, group_port: int, device: torch.device, patience_s: float, version: str
    ) -> None:
        self._urls, self._next_port, self._device, self._version = list(urls), group_port, device, version
        self._first_patience_s = patience_s
        self._training = uuid.uuid4().hex
        self._patience_s = patience_s if len(urls) == 1 else SEVERAL_PATIENCE_S
        self.members: dict[str, WeightServer] = {}
        for url in urls:
            self.members[url] = self._join(url, server_start_time(url, patience_s))
        if not all(server.dtype for server in self.members.values()):
            logger.warning(
                "The vLLM server does not return checksums, so a failed weight sync is not detected: start it with "
                "--worker-extension-cls %s",
                EXTENSION,
            )

    @property
    def started_at(self) -> dict[str, float | None]:
        """The start times of the servers that have the weights."""
        return {url: server.started_at for url, server in self.members.items()}

    def send(self, weights: Weights) -> None:
        """Sends the weights to all servers. Of several servers, those that do not answer are left out until they do.

        Raises:
            UserError: if no server is left, one died during the sync, kept its cache, returned other checksums, or
                gets the weights of another training.
        """
        for server in self.members.values():
            server.require_claim(self._training)
        self._meet()
        try:
            sent = self._update(weights)
        except LOST as error:
            raise ServerLost(
                f"a vLLM server died while it received weights ({error})",
                "restart it, then resume from the last checkpoint",
            ) from error
        for url, server in list(self.members.items()):
            try:
                server.drop_cache()
                if server.dtype is not None:
                    server.require_weights(sent[server.dtype])
            except LOST as error:
                self._leave_out(url, error)
        if not self.members:
            raise ServerLost("no vLLM server is left", "restart them, then resume from the last checkpoint")

    def _update(self, weights: Weights) -> dict[torch.dtype, dict[str, torch.Tensor]]:
        """Sends the weights in one pass, and returns the checksums of the sent tensors in each server's type."""
        with contextlib.ExitStack() as updates:
            clients = [server.client for server in self.members.values()]
            for client in clients:
                updates.enter_context(client.weight_update())
            sent: dict[torch.dtype, dict[str, torch.Tensor]]
            sent = {server.dtype: {} for server in self.members.values() if server.dtype}
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
            except (UserError, *LOST) as error:
                problems.append(str(error))
                self._leave_out(url, error)
        if not self.members:
            raise UserError("; ".join(problems))

    def _leave_out(self, url: str, error: Exception) -> None:
        if self.members.pop(url, None):
            said = error.said if isinstance(error, ServerLost) else error
            logger.warning("The vLLM server at %s is left out until it answers again: %s", url, said)

    def _join(self, url: str, started_at: float | None) -> WeightServer:
        client = ServerClient(base_url=url, group_port=self._next_port, connection_timeout=self._first_patience_s)
        self._next_port += 1
        server = WeightServer(url, client, started_at, client.get_server_info())
        server.require_one_address(self.members.values())
        server.require_version(self._version)
        client.init_communicator(device=self._device)
        server.claim(self._training)
        return server


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


@contextlib.contextmanager
def _ending_the_process_if_stuck(url: str) -> Iterator[None]:
    """Ends the process if the server dies while it receives weights: no exception can reach rank 0 inside NCCL."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(STUCK_S):
            try:
                with httpx.Client(timeout=STUCK_S, **client_options(url)) as client:
                    client.get("/health")
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
