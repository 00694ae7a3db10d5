"""Writes the finished trajectories of the current batch to disk, so that a killed run need not repeat them.

    output_dir/journal/rank0.jsonl
        {"batch": "3f1c…", "format": 2}             a digest of weights, prompts, settings, seed
        {"index": 17, "trajectory": "gASVAgEA…"}    one line per trajectory, as each one ends

A run that resumes from a checkpoint reads the finished trajectories from the journal and rolls out only the others. It
ignores the journal if the digest differs, so a run that was killed several steps after its checkpoint repeats those
steps. The journal does not keep failed trajectories, nor those that cannot be restored exactly, such as ones with
passages of a user's class.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import logging
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

import trl_search.types
from trl_search.policies.weight_checksums import checksum
from trl_search.types import Sampling, Trajectory

logger = logging.getLogger(__name__)

FOLDER, FORMAT = "journal", 2


class Journal:
    """The journal of one batch on one rank.

    Args:
        path (`Path`, *optional*): The file, which replaces that of an earlier batch. None: nothing is kept.
        batch (`str`): A digest of everything that shapes the batch ([`batch_digest`]).
        resumed (`bool`): Whether to read the trajectories that the file has of this batch.

    Attributes:
        finished (`dict[int, Trajectory]`): Trajectories of an earlier process, by index.
    """

    def __init__(self, path: Path | None, batch: str = "", *, resumed: bool = False) -> None:
        self.finished: dict[int, Trajectory] = {}
        self._file: TextIO | None = None
        self._told = False  # whether the warning about trajectories that cannot be kept was logged
        if path is None:
            return
        if resumed and path.is_file():
            self.finished = dict(_read(path, batch))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._write({"batch": batch, "format": FORMAT})
        for index, trajectory in self.finished.items():
            self._keep(index, trajectory)

    def add(self, index: int, trajectory: Trajectory) -> None:
        """Writes a trajectory that has just ended. A kill during the write loses only this one."""
        if index not in self.finished and not trajectory.failed:
            self._keep(index, trajectory)

    def _keep(self, index: int, trajectory: Trajectory) -> None:
        try:
            pickled = pickle.dumps(trajectory)
            _restored(pickled)
        except (pickle.PickleError, TypeError, AttributeError) as error:
            if not self._told:
                logger.warning("a trajectory cannot be kept, and is rolled out again if the run is killed: %s", error)
            self._told = True
            return
        self._write({"index": index, "trajectory": base64.b64encode(pickled).decode()})

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@contextlib.contextmanager
def open_journal(trainer: Any, sampling: Sampling) -> Iterator[Journal]:
    """The journal of the batch that a [`SearchGRPOTrainer`] is about to roll out. Evaluations keep no journal."""
    journal = Journal(None)
    if trainer.model.training:
        args, batch = trainer.args, trainer.last_rollout
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        digest = batch_digest(
            trained, trainer.run_log.model, args.agent, sampling, batch.prompt_ids, batch.rows, *batch.spare
        )
        path = Path(args.output_dir or ".") / FOLDER / f"rank{trainer.accelerator.process_index}.jsonl"
        # A run that was not resumed ignores the journal: its retriever may be another one.
        journal = Journal(path, digest, resumed=trainer.state.global_step > 0)
    try:
        yield journal
    finally:
        journal.close()


def batch_digest(parameters: Iterable[torch.Tensor], *settings: Any) -> str:
    """A digest of the weights on this rank (its shards, if they are sharded) and of the `repr` of `settings`."""
    sums = []
    for parameter in parameters:
        tensor = getattr(parameter, "ds_tensor", parameter).detach()  # the shard under DeepSpeed ZeRO-3
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        sums.append(checksum(local, local.dtype).cpu())
    weights = [int(value) for value in sums]
    return hashlib.sha256(repr((weights, settings)).encode()).hexdigest()


def _read(path: Path, batch: str) -> Iterator[tuple[int, Trajectory]]:
    # The last line of a killed process may be cut off.
    with path.open(encoding="utf-8") as file, contextlib.suppress(json.JSONDecodeError):
        if json.loads(next(file, "null")) != {"batch": batch, "format": FORMAT}:
            return
        for line in file:
            row = json.loads(line)
            yield row["index"], _restored(base64.b64decode(row["trajectory"]))


class _TypesOnly(pickle.Unpickler):
    """Restores nothing but the classes of `types.py`, so that a journal cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        made = getattr(trl_search.types, name, None)
        if not module == getattr(made, "__module__", None) == trl_search.types.__name__:
            raise pickle.UnpicklingError(f"{name} is not a class of trl_search.types")
        return made


def _restored(pickled: bytes) -> Trajectory:
    trajectory: Trajectory = _TypesOnly(io.BytesIO(pickled)).load()
    return trajectory
