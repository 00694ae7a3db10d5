"""Reads large files block by block, under a bar on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from _typeshed import SupportsRead

BLOCK_BYTES = 1 << 24


def read_blocks(file: SupportsRead[bytes], doing: str, total: int | None, *, done: int = 0) -> Iterator[bytes]:
    """The bytes of a file from where it stands.

    Args:
        doing (`str`): What is done with them, for the bar: "hashing wiki.jsonl".
        total (`int`, *optional*): No more are read. By default all.
        done (`int`, *optional*, defaults to `0`): How many of `total` were read before.
    """
    with tqdm(desc=doing, total=total, initial=done, unit="B", unit_scale=True, disable=None) as bar:
        while block := file.read(BLOCK_BYTES if total is None else min(BLOCK_BYTES, total - done)):
            yield block
            done += len(block)
            bar.update(len(block))
