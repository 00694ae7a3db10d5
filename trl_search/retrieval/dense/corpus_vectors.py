"""Encodes a corpus to vectors on disk: in shards, by several processes, and resumable after a kill.

    scratch/vectors.npy     (N, dim) float32 or float16, preallocated; each shard is written at its own place
    scratch/shards.done     one byte per shard: 1 when its vectors are on disk
    scratch/encoding.json   the inputs; a different corpus, encoder or precision starts again

A shard's vectors are on disk before its byte is, so a kill loses only the shards in progress. A shard depends only on
its own texts (sentence-transformers batches them by length within the shard), so a resumed build has the same bytes as
an uninterrupted one, whatever the number of processes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from trl_search.common.bounds import check_minima
from trl_search.common.errors import UserError, unknown_name
from trl_search.common.files import write_json
from trl_search.retrieval.corpus.passages import Passages, join_contents
from trl_search.retrieval.dense.encoder import Encoder, load_encoder
from trl_search.retrieval.index.workers import ALONE, Workers

VECTORS, DONE, ABOUT = "vectors.npy", "shards.done", "encoding.json"
ENCODER = "intfloat/e5-base-v2"
SAMPLE = 1000  # passages sampled to check that the encoder reads whole passages
SHARD_ROWS = 8192  # enough for little padding after sorting by length, few enough to lose


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodingOptions:
    """The encoding options of every builder of dense vectors.

    Args:
        encoder (`str`): The encoder of dense vectors, a model of the hub or a folder: e5, bge, MiniLM, or any of
            sentence-transformers.
        dtype (`str`): Precision of encoding: "float32", or "float16", which is faster on a GPU and needs half the
            disk.
        batch_size (`int`): Passages per forward pass of the encoder. Lower it if a GPU runs out of memory.
        max_length (`int`, *optional*): Tokens that are read of a passage; by default as the encoder was trained.
        query_prompt (`str`, *optional*): Text before every query, or the name of one of the encoder's prompts; by
            default as the encoder was trained.
        passage_prompt (`str`, *optional*): The same as query_prompt, for passages.
        pooling (`str`, *optional*): "mean", "cls", "max" or "lasttoken", for a checkpoint that does not define it.
        normalize (`bool`, *optional*): True scales vectors to length 1, False does not; by default as the encoder was
            trained.
        query_encoder (`str`, *optional*): The encoder for queries, if a model has two (DPR, Dragon).
        trust_remote_code (`bool`): Runs Python code from the checkpoint. Read that code first.
    """

    encoder: str = ENCODER
    dtype: str = "float32"
    batch_size: int = 64
    max_length: int | None = None
    query_prompt: str | None = None
    passage_prompt: str | None = None
    pooling: str | None = None
    normalize: bool | None = None
    query_encoder: str | None = None
    trust_remote_code: bool = False

    def check_encoding(self) -> None:
        """Checks the options and loads the encoder, so that a mistake is an error now and not after an hour of
        reading.

        Raises:
            UserError: for an option out of range.
        """
        if self.dtype not in ("float32", "float16"):
            raise unknown_name("dtype", self.dtype, ["float32", "float16"])
        check_minima(self, batch_size=1)
        for name in ("encoder", "query_encoder"):
            given = getattr(self, name)
            if given is not None and Path(given).is_dir():  # the index may be opened from another folder
                object.__setattr__(self, name, str(Path(given).resolve()))
        _ = self.loaded

    @cached_property
    def loaded(self) -> Encoder:
        names = {option.name for option in fields(EncodingOptions)} - {"encoder", "batch_size"}
        return load_encoder(self.encoder, **{name: getattr(self, name) for name in names})

    def encode(self, passages: Passages, folder: Path, workers: Workers) -> None:
        """Runs `encode_corpus` with these options. Warns if the encoder truncates passages."""
        if workers.rank == 0:
            step = max(1, len(passages) // SAMPLE)
            sample = [join_contents(passages[row]) for row in range(0, len(passages), step)]
            if cut := self.loaded.cut_share(sample):
                logger.warning(
                    "%s of the passages are longer than the %d tokens that the encoder reads, so their ends cannot be "
                    "found; cut them with `trl-search data chunk`, or raise max_length if the encoder allows more",
                    f"{cut:.0%}" if cut >= 0.01 else "under 1%",
                    self.loaded.fingerprint.max_length,
                )
        encode_corpus(passages, self.loaded, folder, dtype=self.dtype, batch_size=self.batch_size, workers=workers)


def encode_corpus(
    passages: Passages,
    encoder: Encoder,
    folder: Path,
    *,
    dtype: str = "float32",
    batch_size: int = 64,
    shard_rows: int = SHARD_ROWS,
    workers: Workers = ALONE,
) -> np.ndarray:
    """Encodes every passage into `folder/vectors.npy` and returns it, memory-mapped.

    A repeated call encodes only the missing shards. With several workers, each calls it, and all return together.

    Raises:
        UserError: if the processes use different encoders or options.
    """
    about = {
        "passages": len(passages),
        "dim": encoder.dim,
        "dtype": dtype,
        "batch_size": batch_size,
        "shard_rows": shard_rows,
        "encoder": asdict(encoder.fingerprint),
    }
    if workers.rank == 0:
        _prepare(folder, about)
    workers.wait()
    if json.loads((folder / ABOUT).read_text(encoding="utf-8")) != about:
        raise UserError(f"process {workers.rank} encodes with a different encoder or other options than process 0")
    _encode_shards(passages, encoder, folder, about, workers)
    workers.wait()
    return np.load(folder / VECTORS, mmap_mode="r")


def _prepare(folder: Path, about: dict[str, Any]) -> None:
    """Creates the files, or keeps those of an earlier run with the same inputs."""
    shards = -(-about["passages"] // about["shard_rows"])
    if (folder / ABOUT).exists():
        if json.loads((folder / ABOUT).read_text(encoding="utf-8")) == about:
            done = (folder / DONE).read_bytes().count(1)
            logger.info("%d of %d shards are already encoded", done, shards)
            return
        logger.info("%s holds vectors of another encoder or other options: encoding again", folder)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shape, dtype = (about["passages"], about["dim"]), np.dtype(about["dtype"])
    size = shape[0] * shape[1] * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"encoding needs {size / 1e9:,.1f} GB of disk, and {folder} has {free / 1e9:,.1f} GB free; "
            "dtype float16 needs half as much as float32"
        )
    np.lib.format.open_memmap(folder / VECTORS, mode="w+", dtype=dtype, shape=shape)
    (folder / DONE).write_bytes(bytes(shards))
    write_json(folder / ABOUT, about)  # last: its presence means that the other files exist


def _encode_shards(
    passages: Passages, encoder: Encoder, folder: Path, about: dict[str, Any], workers: Workers
) -> None:
    """Encodes the missing shards of this worker."""
    count, step, width = about["passages"], about["shard_rows"], about["dim"] * np.dtype(about["dtype"]).itemsize
    shards = {shard: range(shard * step, min((shard + 1) * step, count)) for shard in range(-(-count // step))}
    mine = {shard: rows for shard, rows in shards.items() if shard % workers.count == workers.rank}
    done = (folder / DONE).read_bytes()
    left = {shard: rows for shard, rows in mine.items() if not done[shard]}
    # Not through a memory map: on a full disk, a mapped write kills the process, and a file write raises.
    with (
        open(folder / VECTORS, "r+b") as vectors,
        open(folder / DONE, "r+b") as journal,
        tqdm(
            desc="encoding" if workers.count == 1 else f"encoding ({workers.rank + 1} of {workers.count})",
            total=sum(map(len, mine.values())),
            initial=sum(map(len, mine.values())) - sum(map(len, left.values())),
            unit=" passages",
            position=workers.rank,
            disable=None,
        ) as bar,
    ):
        start = vectors.seek(0, os.SEEK_END) - count * width
        for shard, rows in left.items():
            vectors.seek(start + rows.start * width)
            vectors.write(_encode(passages, encoder, rows, about).tobytes())
            _to_disk(vectors)
            journal.seek(shard)
            journal.write(b"\1")
            _to_disk(journal)
            bar.update(len(rows))


def _encode(passages: Passages, encoder: Encoder, rows: range, about: dict[str, Any]) -> np.ndarray:
    texts = [join_contents(passages[row]) for row in rows]
    with np.errstate(over="ignore"):  # an overflow is reported below
        vectors_ND = encoder.encode_passages(texts, batch_size=about["batch_size"]).astype(about["dtype"])
    broken = np.flatnonzero(~np.isfinite(vectors_ND).all(axis=1))
    if len(broken):
        raise UserError(
            f"passage {passages[rows[int(broken[0])]].id!r} was encoded to a vector with NaN or infinity; "
            "encode with dtype float32"
        )
    return vectors_ND


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
