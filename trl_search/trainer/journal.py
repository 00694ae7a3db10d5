"""Writes the finished trajectories of the current batch to disk, so that a killed run need not repeat them.

    output_dir/journal/rank0.jsonl
        {"batch": "3f1c…"}                                          a digest of weights, prompts, settings, seed
        {"index": 17, "trajectory": {"class": "Trajectory", …}}     one line per trajectory, as each one ends

A run that resumes from a checkpoint reads the finished trajectories from the journal and rolls out only the others. It
ignores the journal if the digest differs, so a run that was killed several steps after its checkpoint repeats those
steps. The journal does not keep failed trajectories, nor those that cannot be restored exactly, such as ones with
passages of a user's class.
"""

from __future__ import annotations

import array
import base64
import contextlib
import dataclasses
import enum
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

import trl_search.types
from trl_search.types import Sampling, Trajectory

logger = logging.getLogger(__name__)

FOLDER = "journal"
# Fields of a trajectory with one number per token, and their type codes for `array`.
_PER_TOKEN = {"prompt_ids": "q", "ids": "q", "mask": "b", "logprobs": "d", "versions": "q"}


class Journal:
    """The journal of one batch on one rank. Without a path, nothing is kept; `batch` is a digest of everything that
    shapes the batch."""

    def __init__(self, path: Path | None, batch: str = "", *, resumed: bool = False) -> None:
        self.finished: dict[int, Trajectory] = {}  # of an earlier process, by index
        self._file: TextIO | None = None
        self._told = False  # whether the warning about trajectories that cannot be kept was logged
        if path is None:
            return
        if resumed and path.is_file():
            self.finished = dict(_read(path, batch))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._write({"batch": batch})
        for index, trajectory in self.finished.items():
            self._keep(index, trajectory)

    def add(self, index: int, trajectory: Trajectory) -> None:
        """Writes a trajectory that has just ended. A kill during the write loses only this one."""
        if index not in self.finished and not trajectory.failed:
            self._keep(index, trajectory)

    def _keep(self, index: int, trajectory: Trajectory) -> None:
        try:
            encoded = _encoded(trajectory)
        except TypeError as error:
            if not self._told:
                logger.warning("a trajectory cannot be kept, and is rolled out again if the run is killed: %s", error)
            self._told = True
            return
        self._write({"index": index, "trajectory": encoded})

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
        args, batch, log = trainer.args, trainer.last_rollout, trainer.run_log
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        searched = {key: value for key, value in log.task.items() if key.startswith(("retriever", "world"))}
        settings = log.model, searched, log.environment, args.agent, sampling
        digest = batch_digest(trained, *settings, batch.prompt_ids, batch.rows, *batch.spare)
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
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()]
        sums.append(local.contiguous().view(bits).sum(dtype=torch.int64).cpu())
    weights = [int(value) for value in sums]
    return hashlib.sha256(repr((weights, settings)).encode()).hexdigest()


def _read(path: Path, batch: str) -> Iterator[tuple[int, Trajectory]]:
    # The last line of a killed process may be cut off.
    with path.open(encoding="utf-8") as file, contextlib.suppress(json.JSONDecodeError):
        if json.loads(next(file, "null")) != {"batch": batch}:
            return
        for line in file:
            row = json.loads(line)
            yield row["index"], _decoded(row["trajectory"])


def _encoded(value: Any) -> Any:
    """JSON for the types in `types.py`; `_decoded` restores equal values.

    Raises:
        TypeError: for a value that cannot be restored exactly.
    """
    if isinstance(value, enum.Enum) or dataclasses.is_dataclass(value):
        name = type(value).__name__
        if type(value) is not getattr(trl_search.types, name, None):
            raise TypeError(f"{name} is not a class of trl_search.types")
        if isinstance(value, enum.Enum):
            return {"class": name, "value": value.value}
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        per_token = _PER_TOKEN if isinstance(value, Trajectory) else {}
        coded = {
            field: _packed(per_token[field], numbers) if field in per_token else _encoded(numbers)
            for field, numbers in fields.items()
        }
        return {"class": name, "fields": coded}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(item) for item in value]}
    if isinstance(value, list):
        return [_encoded(item) for item in value]
    if isinstance(value, Mapping):
        return {"map": {key: _encoded(item) for key, item in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r:.80} cannot be written as JSON")


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "packed" in value:
        numbers = array.array(value["type"])
        numbers.frombytes(base64.b64decode(value["packed"]))
        return tuple(numbers) if value["immutable"] else numbers.tolist()
    if "tuple" in value:
        return tuple(_decoded(item) for item in value["tuple"])
    if "map" in value:
        return {key: _decoded(item) for key, item in value["map"].items()}
    made = getattr(trl_search.types, value["class"])
    if "value" in value:
        return made(value["value"])
    return made(**{name: _decoded(item) for name, item in value["fields"].items()})


def _packed(type_code: str, numbers: Sequence[Any]) -> dict[str, Any]:
    """Numbers as base64, which is exact and many times faster than decimal digits."""
    coded = base64.b64encode(array.array(type_code, numbers).tobytes()).decode()
    return {"type": type_code, "packed": coded, "immutable": isinstance(numbers, tuple)}
