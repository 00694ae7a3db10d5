"""Reads large files block by block, with a progress bar on a terminal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from _typeshed import SupportsRead

BLOCK_BYTES = 1 << 24


def read_blocks(file: SupportsRead[bytes], doing: str, total: int | None, *, done: int = 0) -> Iterator[bytes]:
    """Yields the bytes of a file from its current position, at most `total`, of which `done` were read before."""
    with tqdm(desc=doing, total=total, initial=done, unit="B", unit_scale=True, disable=None) as bar:
        while block := file.read(BLOCK_BYTES if total is None else min(BLOCK_BYTES, total - done)):
            yield block
            done += len(block)
            bar.update(len(block))


def read_sha256(file: SupportsRead[bytes], doing: str, total: int) -> str:
    """The SHA-256 of `total` bytes from the current position."""
    digest = hashlib.sha256()
    for block in read_blocks(file, doing, total):
        digest.update(block)
    return digest.hexdigest()
