"""Checks that wiki-18 and its e5 indexes, once fetched, are the published ones (`wiki18.py` fetches them).

The indexes hold no ids: row i of the index is line i of the corpus. With a filtered, sorted or truncated corpus,
searches return wrong passages without an error, so count and ids are checked.
"""

from __future__ import annotations

import struct
from contextlib import closing
from pathlib import Path

from trl_search.common.errors import UserError
from trl_search.data.hub_download import check_bytes
from trl_search.retrieval.corpus.published import open_jsonl

PASSAGES, DIM = 21_015_324, 768
ARCHIVE = "wiki-18.jsonl.gz"
IDS_COMPARED = 1000
# The header of a FAISS file: kind, dimensions, vectors, two unused numbers, trained or not, metric.
_HEAD = struct.Struct("<4siqqq?i")
_FLAT_HEAD_BYTES = _HEAD.size + 8
_INNER_PRODUCT = 0
_KINDS = {"e5-flat": b"IxFI", "e5-hnsw": b"IHNf"}


def check_index(path: Path, word: str) -> str:
    """Raises `UserError` if there is no file, its header is not that of the published index, or it is too short.
    Returns what was checked.

    The header of an HNSW file does not give its length: only the hub's listing shows that its last bytes are missing.
    """
    if not path.is_file():
        raise UserError(f"there is no {path}: fetch it with trl-search data wiki18 --what {word}")
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
    if len(head) < _HEAD.size or head[:4] != _KINDS[word]:
        raise UserError(f"{path} is not the FAISS file of {word} (it begins with {head[:4]!r}): move it away")
    _, dim, count, _, _, _, metric = _HEAD.unpack(head)
    if dim != DIM or metric != _INNER_PRODUCT:
        kind = "inner product" if metric == _INNER_PRODUCT else f"metric {metric}"
        raise UserError(
            f"{path} holds vectors of {dim} dimensions under {kind}; the e5 index has {DIM} under inner product"
        )
    if count != PASSAGES:
        raise UserError(f"{path} holds {count:,} vectors and the published index {PASSAGES:,}: move it away")
    vectors = f"{count:,} vectors of {dim} dimensions, by its head"
    if word == "e5-flat":
        check_bytes(path, _FLAT_HEAD_BYTES + 4 * dim * count)
        return f"{vectors}, and the length that they take"
    there, least = path.stat().st_size, 4 * dim * count
    if there < least:
        raise UserError(f"{path} has {there:,} bytes and its vectors alone take {least:,}: it was cut short")
    return f"{vectors}, and no shorter than they are; the graph was not looked at"


def check_corpus(path: Path) -> str:
    """Raises `UserError` if there is no file, or the number of passages or the ids differ from the published corpus.
    Returns what was checked. The line offsets are stored beside the file, because searches need them too."""
    if not path.is_file():
        raise UserError(f"there is no {path}: fetch it with trl-search data wiki18 --what corpus")
    with path.open("rb") as file:
        if is_tar(file.read(512)):
            raise UserError(
                f"{path} is a tar, as `gzip -d {ARCHIVE}` leaves it: move it away and run this again, or unpack it "
                f"with `tar -xOf {path.name} > other-name.jsonl`"
            )
    with closing(open_jsonl(path)) as corpus:
        count = len(corpus)
        if count != PASSAGES:
            raise UserError(
                f"{path} has {count:,} passages and the published corpus {PASSAGES:,}: row i of an index is line i of "
                "the corpus, so another corpus would be searched wrongly. Fetch the published one"
            )
        rows = sorted({count * part // IDS_COMPARED for part in range(IDS_COMPARED)} | {count - 1})
        for row in rows:
            if (identity := corpus[row].id) != str(row):
                raise UserError(
                    f"{path}, line {row + 1}: the passage has id {identity!r}, and the published corpus the passage "
                    f"{row} there: this one was sorted, filtered or renumbered. Fetch the published one"
                )
    return f"{count:,} passages, and the ids of {len(rows):,} of them"


def is_tar(head: bytes) -> bool:
    """Whether these are the first 512 bytes of a tar."""
    return head[257:262] == b"ustar"
