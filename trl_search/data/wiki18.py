"""Fetches and unpacks wiki-18, the corpus of the published runs, and its e5 indexes (`wiki18_checks.py` checks them).

    corpus      PeterJinGo/wiki-18-corpus              wiki-18.jsonl.gz     -> wiki-18.jsonl      21,015,324 passages
    e5-flat     PeterJinGo/wiki-18-e5-index            part_aa + part_ab    -> e5_Flat.index      exact, float32
    e5-hnsw     PeterJinGo/wiki-18-e5-index-HNSW64     part_aa + part_ab    -> e5_HNSW64.index    a graph, in memory

`plan_wiki18` reports the size of a download before it starts. Existing files are not overwritten, and a killed
download resumes (`hub_download.py`). `wiki-18.jsonl.gz` is a gzipped *tar* with one file in it, under a long path.
`gzip -d`, as in the published instructions, leaves the tar, whose first line begins with 512 bytes that are not JSON.
"""

from __future__ import annotations

import gzip
import json
import os
import shlex
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from trl_search.common.blocks import BLOCK_BYTES, read_blocks
from trl_search.common.errors import UserError, unknown_name
from trl_search.data.hub_download import HubFiles, check_bytes, fetch, list_files, naming_full_disk
from trl_search.data.wiki18_checks import ARCHIVE, DIM, PASSAGES, check_corpus, check_index, is_tar
from trl_search.retrieval.dense.vectors import plan
from trl_search.retrieval.dense.vectors.search import gb

CORPUS = "wiki-18.jsonl"
# Sizes of the archive and the corpus on the hub in 2025.
ARCHIVE_BYTES, CORPUS_BYTES = 5_123_307_260, 14_393_573_105
OFFSET_BYTES = 8  # per passage, in the file of line offsets


@dataclass(frozen=True, slots=True)
class Piece:
    """One download: its repository, its files, and the file that is made from them."""

    repository: str
    pattern: str
    made: str
    published_bytes: int


PIECES: dict[str, Piece] = {
    "corpus": Piece("PeterJinGo/wiki-18-corpus", ARCHIVE, CORPUS, ARCHIVE_BYTES),
    "e5-flat": Piece("PeterJinGo/wiki-18-e5-index", "part_*", "e5_Flat.index", 64_559_075_373),
    "e5-hnsw": Piece("PeterJinGo/wiki-18-e5-index-HNSW64", "part_*", "e5_HNSW64.index", 75_600_000_000),
}


@dataclass(frozen=True)
class Wiki18Plan:
    """What to fetch into a folder. `files` lists what is missing; `same_size` names the existing indexes that have the
    hub's size."""

    what: tuple[str, ...]
    folder: Path
    files: dict[str, HubFiles]
    same_size: frozenset[str] = frozenset()

    @property
    def download_bytes(self) -> int:
        return sum(files.download_bytes(self.target(word)) for word, files in self.files.items())

    @property
    def disk_bytes(self) -> int:
        """Bytes still to be written. No temporary files are written, so this is also the peak."""
        # An existing part is not fetched, but it is copied into the joined file.
        made = sum(files.unwritten_bytes(self.target(word)) for word, files in self.files.items())
        unpacked = 0
        if "corpus" in self.files:
            unpacked = self.files["corpus"].bytes * CORPUS_BYTES // ARCHIVE_BYTES + OFFSET_BYTES * PASSAGES
        return made + unpacked

    def check_disk(self, free: int) -> None:
        """Raises `UserError` if the disk has too few free bytes (`free_bytes`) for the download."""
        if self.disk_bytes > free:
            raise UserError(
                f"{gb(self.disk_bytes)} of disk are needed in {self.folder} and {gb(free)} are free: take a folder on "
                "another disk, or fetch less of it. Nothing was downloaded"
            )

    def describe(self) -> str:
        """Describes files and sizes, disk, and the memory for serving."""
        lines = []
        for word in self.what:
            made = self.folder / PIECES[word].made
            if word not in self.files:
                lines.append(f"{word:<9} {made} is there ({gb(made.stat().st_size)})")
                continue
            files = self.files[word]
            lines.append(f"{word:<9} {files.repository} at {files.commit[:12]} -> {made}")
            lines += [f"            {file.name:<18} {file.bytes:>15,} bytes" for file in files.files]
            if come := files.bytes - files.download_bytes(self.target(word)):
                lines.append(f"            {gb(come)} of it are here already: it goes on from there")
        lines += [f"download  {gb(self.download_bytes)}", f"disk      {gb(self.disk_bytes)} in {self.folder}"]
        return "\n".join(lines + [f"serving   {line}" for line in serving_needs(self.what)])

    def target(self, word: str) -> Path:
        """The file to download: an index, or the archive of the corpus."""
        return self.folder / (ARCHIVE if word == "corpus" else PIECES[word].made)


def plan_wiki18(what: Sequence[str], folder: str | Path, *, endpoint: str | None = None) -> Wiki18Plan:
    """Finds what is missing and asks the hub for sizes. Downloads nothing.

    Raises for an index of the wrong size. For the corpus, the hub knows only the size of the archive.

    Raises:
        UserError: for an unknown part, a folder that is a file, or a hub that does not answer.
    """
    folder = Path(folder).expanduser()
    for word in what:
        if word not in PIECES:
            raise unknown_name("part of wiki-18", word, PIECES)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder")
    files, same_size = {}, set()
    for word in what:
        piece = PIECES[word]
        made = folder / piece.made
        if word == "corpus" and made.exists():
            continue
        try:
            listed = list_files(piece.repository, piece.pattern, endpoint=endpoint)
        except UserError as error:
            if made.exists():  # nothing to fetch; the result says that it was not compared with the hub
                continue
            published = ", ".join(f"{name} {gb(PIECES[name].published_bytes)}" for name in what)
            raise UserError(f"{error}\nAs published, the downloads are: {published}.") from error
        if made.exists():
            check_bytes(made, listed.bytes)
            same_size.add(word)
        else:
            files[word] = listed
    return Wiki18Plan(tuple(what), folder, files, frozenset(same_size))


def fetch_wiki18(planned: Wiki18Plan, *, endpoint: str | None = None) -> dict[str, str]:
    """Fetches what is missing, unpacks the corpus, and checks everything in the plan. After a kill, call it again.
    Returns what was checked, for each piece."""
    of_hub = dict.fromkeys(planned.same_size, "size as on the hub")
    for word, files in planned.files.items():
        target = planned.target(word)
        compared = "size" if target.exists() else "SHA-256"
        fetch(files, target, endpoint=endpoint)
        of_hub[word] = f"{compared} as on the hub"
        if word == "corpus":
            unpack_corpus(target, planned.folder / CORPUS)
            of_hub[word] = f"{compared} of the archive as on the hub"
    return check_wiki18(planned.what, planned.folder, of_hub)


def check_wiki18(what: Sequence[str], folder: Path, of_hub: Mapping[str, str] | None = None) -> dict[str, str]:
    """Checks the headers of the indexes in the folder, and that the corpus is the one that they were made from. A
    corpus beside an index is checked with it. Returns what was checked, for each piece."""
    checked = {word: check_index(folder / PIECES[word].made, word) for word in what if word != "corpus"}
    if "corpus" in what or (checked and (folder / CORPUS).exists()):
        checked["corpus"] = check_corpus(folder / CORPUS)
    return {word: f"{said}; {(of_hub or {}).get(word, 'not compared with the hub')}" for word, said in checked.items()}


def unpack_corpus(archive: Path, target: Path) -> None:
    """Unpacks the jsonl in `wiki-18.jsonl.gz`, a gzipped tar; a plain gzip works too, in case the hub's file changes.

    After a kill, unpacking starts again, because gzip has no random access. The download does not.

    Raises:
        UserError: if the archive is damaged.
    """
    if target.exists():
        return
    unfinished = target.with_name(f"{target.name}.incomplete")
    try:
        with gzip.open(archive) as stream, naming_full_disk(unfinished):
            if is_tar(stream.read(512)):
                stream.seek(0)
                _unpack_tar(stream, unfinished, archive)
            else:
                stream.seek(0)
                _copy(stream, unfinished, None)
            while stream.read(BLOCK_BYTES):  # read to the end, where gzip verifies the checksum
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError) as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{archive} is damaged ({error}): delete it and run this again to fetch it again") from error
    os.replace(unfinished, target)


def serving_needs(what: Sequence[str]) -> list[str]:
    """The memory that a search server needs, and alternatives that need less."""
    lines = []
    if "e5-flat" in what:
        flat, small = plan("flat", PASSAGES, DIM), plan("small", PASSAGES, DIM)
        lines += [
            f"e5-flat: the file is mapped and every search reads all of it, so have {gb(flat.disk_bytes)} of free RAM,"
            f" or a GPU with {gb(flat.gpu_bytes or 0)} free (fp16, exact)",
            f"less: trl-search index --kind dense --index_type small, {gb(small.ram_bytes)} of RAM and "
            f"{gb(small.disk_bytes)} of disk; it encodes the corpus again, on a GPU",
        ]
    if "e5-hnsw" in what:
        lines.append(f"e5-hnsw: in memory as a whole, about {gb(PIECES['e5-hnsw'].published_bytes)} of RAM")
    if "corpus" in what:
        lines.append(
            "corpus: trl-search index --kind bm25 takes about 18 GB of disk (3.5 GB, and a copy of the passages), and "
            "next to no memory to serve"
        )
    return lines


def next_commands(folder: Path) -> list[str]:
    """The next commands for the files in the folder."""
    corpus = folder / CORPUS
    if not corpus.exists():
        return [f"trl-search data wiki18 --what corpus --output {shlex.quote(str(folder))}"]
    indexes = [folder / piece.made for word, piece in PIECES.items() if word != "corpus"]
    index = next((path for path in indexes if path.exists()), None)
    if index is None:
        return [
            f"trl-search index --corpus {shlex.quote(str(corpus))} --kind bm25 --output indexes/wiki18-bm25",
            "trl-search train qwen3b",
        ]
    options = json.dumps({"faiss_file": str(index), "corpus": str(corpus), "encoder": "intfloat/e5-base-v2"})
    return [
        f"trl-search serve dense --retriever_options {shlex.quote(options)}",
        """trl-search train qwen3b --retriever http --retriever_options '{"url": "http://localhost:8000"}'""",
    ]


def _unpack_tar(stream: gzip.GzipFile, unfinished: Path, archive: Path) -> None:
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            inside = tar.extractfile(member) if member.isfile() and member.name.endswith(".jsonl") else None
            if inside is None:
                continue
            with inside:
                written = _copy(inside, unfinished, member.size)
            if written != member.size:
                raise EOFError(f"{member.name} ends after {written:,} of {member.size:,} bytes")
            return
    raise UserError(f"{archive} is a tar without a .jsonl file in it: it has been changed on the hub")


def _copy(source: IO[bytes] | gzip.GzipFile, unfinished: Path, total: int | None) -> int:
    with unfinished.open("wb") as file:
        return sum(map(file.write, read_blocks(source, f"unpacking {unfinished.stem}", total)))
