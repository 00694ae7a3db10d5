"""Opens the corpus of a published index without conversion, such as `wiki-18.jsonl` of `e5_Flat.index`.

Row i of the index is line i of the file. A file of offsets is made once, with 8 bytes per line. The corpus stays on
disk, memory-mapped, and a line is read only when a search finds it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from trl_search.common.blocks import read_blocks
from trl_search.common.errors import UserError
from trl_search.common.files import cache_folder, written_whole
from trl_search.common.table_files import COMPRESSIONS
from trl_search.retrieval.corpus.passages import Corpus, join_contents
from trl_search.retrieval.dense.encoder import Encoder

SAME_PASSAGE = 0.98  # a lower bound for the cosine of a passage encoded twice; a wrong prefix gives less


def open_jsonl(path: str | Path) -> Corpus:
    """Opens a jsonl file of any size as a `Corpus`. The offsets of its lines are stored in `<file>.offsets.npy`, or in
    the cache folder if the file's folder is read-only.

    Raises:
        UserError: if the file is missing, empty or compressed.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise UserError(f"there is no corpus file {path}")
    if path.suffix in (".csv", ".tsv", ".parquet", *COMPRESSIONS):
        raise UserError(
            f"{path} cannot be read by row: unpack it (gunzip) or convert it to .jsonl first (wiki-18: trl-search "
            "data wiki18)"
        )
    offsets = _offsets_path(path)
    if not _fresh(offsets, path):
        starts = find_lines(path)
        with written_whole(offsets) as new, new.open("wb") as file:
            np.save(file, starts)
    return Corpus(path.parent, rows=path, offsets=offsets)


def find_lines(path: Path) -> np.ndarray:
    """The start of each line that is not blank, and last the size of the file; int64.

    Raises:
        UserError: if there are no passages.
    """
    size, read = path.stat().st_size, 0
    ends = []
    with open(path, "rb") as file:
        for block in read_blocks(file, f"finding the lines of {path.name}", size):
            ends.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + (read + 1))
            read += len(block)
        starts = np.concatenate([[0], *ends]).astype(np.int64)
        starts = starts[starts < size]
        lengths = np.diff(np.append(starts, size))
        # A blank line ("\n" or "\r\n") gets no start, so it is read with the line before, where JSON allows it.
        blank = np.zeros(len(starts), dtype=bool)
        for line in np.flatnonzero(lengths <= 2):
            file.seek(int(starts[line]))
            blank[line] = not file.read(int(lengths[line])).strip()
        file.seek(0)
        if file.read(3) == b"\xef\xbb\xbf":
            starts[0] = 3
    if blank.all():
        raise UserError(f"{path}: no passages; a corpus needs one at least")
    return np.append(starts[~blank], size)


def check_encoder(encoder: Encoder, rows_ND: np.ndarray, corpus: Corpus, name: str) -> None:
    """Re-encodes a few passages and compares the vectors. With the wrong pooling, prefix or weights, searches would
    find the wrong passages without an error.

    Raises:
        UserError: if the vectors come from another encoder.
    """
    chosen = sorted({len(corpus) * part // 5 for part in range(5)})
    again_ND = encoder.encode_passages([join_contents(corpus[row]) for row in chosen])
    there_ND = np.asarray(rows_ND[chosen], dtype=np.float32)
    lengths = np.linalg.norm(again_ND, axis=1) * np.linalg.norm(there_ND, axis=1)
    cosine = float(np.median((again_ND * there_ND).sum(axis=1) / np.maximum(lengths, 1e-12)))
    if cosine < SAME_PASSAGE:
        raise UserError(
            f"encoder {encoder.fingerprint.name!r} does not reproduce the vectors of {name}: re-encoded passages have "
            f"a cosine similarity of only {cosine:.2f}, not 1. Is it another model, prefix, pooling or corpus? "
            "check_source=False skips this check"
        )


def _offsets_path(path: Path) -> Path:
    beside = path.with_name(f"{path.name}.offsets.npy")
    if beside.exists() or os.access(path.parent, os.W_OK):
        return beside
    return cache_folder() / f"{path.name}.{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.offsets.npy"


def _fresh(offsets: Path, path: Path) -> bool:
    """Whether the offsets belong to the current content of the file."""
    if not offsets.exists() or offsets.stat().st_mtime_ns < path.stat().st_mtime_ns:
        return False
    return int(np.load(offsets, mmap_mode="r")[-1]) == path.stat().st_size
