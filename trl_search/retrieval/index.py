"""An index folder: built under another name, finished by its manifest, checked when opened.

    indexes/wiki/
        manifest.json           what this is: format, kind, options, every file's size, the corpus' hash; written last
        corpus.jsonl            the passages, by row
        corpus.offsets.npy      where each row begins
        bm25/                   what the kind itself keeps

A build works in `indexes/.wiki.building-<random>` and renames it when all is there, so a folder under its own name is
whole or was damaged later, and then `open_index` says so instead of answering from it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shlex
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

from tqdm.auto import tqdm

from trl_search.errors import UserError, unknown_name
from trl_search.retrieval.corpus import ROWS, Corpus, CorpusError, write_corpus
from trl_search.types import Passage

FORMAT = 1
MANIFEST = "manifest.json"
_BUILDERS = {"bm25": "trl_search.retrieval.bm25:BM25Builder"}


class IndexFolderError(UserError):
    """A folder cannot be used as an index. The message says why and which command rebuilds it."""


class Builder(Protocol):
    """What a kind is built with. Made from the user's options, which it checks before any work; a dataclass, whose
    fields become the manifest's `options`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def build(self, corpus: Corpus, folder: Path) -> None:
        """Writes the kind's own files into `folder`."""


@dataclass(frozen=True)
class Fingerprint:
    """A file's content, by hash. Size and time only spare the hashing when they have not moved."""

    name: str
    bytes: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path, name: str) -> Fingerprint:
        stat = path.stat()
        return cls(name, stat.st_size, stat.st_mtime_ns, _sha256(path))

    def matches(self, path: Path) -> bool:
        stat = path.stat()
        if stat.st_size != self.bytes:
            return False
        return stat.st_mtime_ns == self.mtime_ns or _sha256(path) == self.sha256


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says. `source` is the corpus file that was read, `None` for passages given in memory."""

    format: int
    kind: str
    passages: int
    options: dict[str, Any]
    corpus: Fingerprint
    source: Fingerprint | None
    files: dict[str, int]

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Index:
    """An index folder that passed every check."""

    folder: Path
    manifest: Manifest
    corpus: Corpus


def build_index(
    corpus: str | Path | Iterable[Passage],
    output: str | Path,
    kind: str = "bm25",
    *,
    overwrite: bool = False,
    **options: Any,
) -> Manifest:
    """Builds an index folder that `load_retriever(kind, index=output)` opens.

    Args:
        corpus (`str | Path | Iterable[Passage]`): A jsonl file (see `corpus.py`) or the passages themselves.
        output (`str | Path`): The folder to make. Appears only when the index is whole.
        kind (`str`): `"bm25"`.
        overwrite (`bool`): Replaces an index that is there already, once the new one is whole.
        options: Of the kind; for bm25 `stemmer`, `stopwords`, `k1` and `b`.
    """
    builder, output = _builder(kind, options), Path(output)
    _check_output(output, overwrite)
    source = None
    if isinstance(corpus, (str, Path)):
        if not Path(corpus).is_file():
            raise CorpusError(f"there is no corpus file {corpus}")
        source = Fingerprint.of(Path(corpus), str(Path(corpus).resolve()))
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.parent / f".{output.name}.building-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        rows = write_corpus(corpus, folder)
        try:
            builder.build(rows, folder)
        finally:
            rows.close()
        if source is not None and not source.matches(Path(source.name)):
            raise IndexFolderError(f"{source.name} changed while it was indexed; build again when it is complete")
        manifest = Manifest(
            format=FORMAT,
            kind=kind,
            passages=len(rows),
            options=asdict(builder),
            corpus=Fingerprint.of(folder / ROWS, ROWS),
            source=source,
            files={file.relative_to(folder).as_posix(): file.stat().st_size for file in _files(folder)},
        )
        manifest.write(folder)
        _put_in_place(folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return manifest


def read_manifest(folder: str | Path) -> Manifest:
    """Reads `manifest.json`, refusing a folder without one and a format that this version does not read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise IndexFolderError(f"there is no index folder {folder}; build it with: {_command(folder)}")
    try:
        written = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IndexFolderError(
            f"{folder} is not a finished index, it has no {MANIFEST}: a copy or a build was cut short, or it is "
            f"another folder; build it with: {_command(folder)}"
        ) from None
    except ValueError as error:
        raise IndexFolderError(f"{folder}/{MANIFEST} is damaged ({error}); rebuild with: {_command(folder)}") from None
    if not isinstance(written, dict) or written.get("format") != FORMAT:
        found = written.get("format") if isinstance(written, dict) else None
        raise IndexFolderError(
            f"{folder} has index format {found}, this version of trl-search reads format {FORMAT}; rebuild with: "
            f"{_command(folder, written)}"
        )
    try:
        source = written.pop("source")
        corpus = Fingerprint(**written.pop("corpus"))
        return Manifest(corpus=corpus, source=Fingerprint(**source) if source else None, **written)
    except (KeyError, TypeError) as error:
        raise IndexFolderError(f"{folder}/{MANIFEST} is damaged ({error}); rebuild with: {_command(folder)}") from None


def open_index(folder: str | Path, kind: str, *, check_source: bool = True) -> Index:
    """Opens an index folder after checking that it is whole, of this kind, and of the corpus it was built from.

    `check_source=False` skips the last question, whether the file it was built from has changed since.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    rebuild = f"rebuild with: {_command(folder, asdict(manifest))}"
    if manifest.kind != kind:
        raise IndexFolderError(f"{folder} is an index of kind {manifest.kind!r}, not {kind!r}; load it as such")
    for name, size in manifest.files.items():
        file = folder / name
        if not file.exists() or file.stat().st_size != size:
            there = f"{file.stat().st_size} bytes" if file.exists() else "nothing"
            raise IndexFolderError(f"{file} should have {size} bytes and there is {there}; {rebuild}")
    if not manifest.corpus.matches(folder / ROWS):
        raise IndexFolderError(f"{folder / ROWS} was changed after the index was built from it; {rebuild}")
    source = manifest.source
    if check_source and source is not None and Path(source.name).exists() and not source.matches(Path(source.name)):
        raise IndexFolderError(
            f"{source.name} has changed since {folder} was built from it; {rebuild}; "
            "or keep the index as it is: load_retriever(..., check_source=False)"
        )
    return Index(folder, manifest, Corpus(folder))


def _builder(kind: str, options: dict[str, Any]) -> Builder:
    if kind not in _BUILDERS:
        raise unknown_name("kind of index", kind, _BUILDERS)
    module, _, name = _BUILDERS[kind].partition(":")
    make = getattr(importlib.import_module(module), name)
    known = [option.name for option in fields(make)]
    for option in options:
        if option not in known:
            raise unknown_name(f"option of a {kind} index", option, known)
    builder: Builder = make(**options)
    return builder


def _check_output(output: Path, overwrite: bool) -> None:
    """Asked before hours of work: may `output` be written? What is not an index is never replaced."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MANIFEST).is_file():
        raise IndexFolderError(f"{output} exists and is not a finished index; remove it or choose another output")
    if not overwrite:
        raise IndexFolderError(f"{output} holds an index already; pass --overwrite (overwrite=True) to replace it")


def _put_in_place(folder: Path, output: Path) -> None:
    if not (output / MANIFEST).exists():
        os.rename(folder, output)
        return
    old = output.parent / f"{folder.name}.old"
    os.rename(output, old)
    os.rename(folder, output)
    shutil.rmtree(old)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with (
        open(path, "rb") as file,
        tqdm(desc=f"hashing {path.name}", total=path.stat().st_size, unit="B", unit_scale=True, disable=None) as bar,
    ):
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _command(folder: Path, manifest: Any = None) -> str:
    """The command that builds `folder`, as far as a manifest tells."""
    known = manifest if isinstance(manifest, dict) else {}
    source = known.get("source")
    corpus = shlex.quote(str(source["name"])) if isinstance(source, dict) and "name" in source else "FILE.jsonl"
    kind = shlex.quote(str(known.get("kind", "bm25")))
    overwrite = " --overwrite" if (folder / MANIFEST).exists() else ""
    return f"trl-search index --corpus {corpus} --kind {kind} --output {shlex.quote(str(folder))}{overwrite}"
