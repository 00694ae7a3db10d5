"""An index folder: built under another name, finished by its manifest, checked when opened.

    indexes/wiki/
        manifest.json           format, kind, options, every file's size, the corpus' hash; written last
        corpus.jsonl            the passages, by row
        corpus.offsets.npy      where each row begins
        bm25/                   the files of the kind

A build works in a hidden folder (`build_folder.py`), which is renamed when it is complete. So a folder with its final
name is complete, or was damaged later, which `open_index` detects.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from trl_search.common.errors import UserError, unknown_name
from trl_search.common.files import home_expanded, write_json
from trl_search.retrieval.corpus.fields import USUAL_FIELDS, Fields
from trl_search.retrieval.corpus.passages import ROWS, Corpus, write_corpus
from trl_search.retrieval.corpus.sources import BEIR_CORPUS, Fingerprint, open_source
from trl_search.retrieval.corpus.text_folder import TEXT_FORMATS
from trl_search.retrieval.index.build_folder import MANIFEST, BuildFolder, build_path, may_be_built
from trl_search.retrieval.index.workers import ALONE, Workers
from trl_search.retrieval.registry import INDEX_KINDS
from trl_search.types import Passage

FORMAT = 1
_CORPUS = "corpus"  # the step that writes the passages
logger = logging.getLogger(__name__)

_DOCUMENT_BYTES = 3000  # a passage of wiki-18 has about 700; by default, a policy reads 256 tokens of each
_SHARE_TOLD = 0.1


class IndexFolderError(UserError):
    """A folder cannot be used as an index. The message says why and which command rebuilds it."""


class Builder(Protocol):
    """Builds indexes of one kind. A dataclass whose fields are the user's options; it checks them before any work, and
    the manifest records them."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def build(self, corpus: Corpus, folder: Path) -> dict[str, Any] | None:
        """Writes the kind's own files into `folder`, and returns the manifest's `details`."""


@runtime_checkable
class Plans(Protocol):
    """A builder that can estimate the cost of an index."""

    def plan(self, passages: int) -> str:
        """Describes memory, disk and time, before the work begins."""


@runtime_checkable
class Shares(Protocol):
    """A builder whose work several processes can share, and that resumes after a kill."""

    def share(self, corpus: Corpus, folder: Path, workers: Workers) -> None:
        """Called in every process, before `build` in one of them. Works in `folder / SCRATCH`; returns when all is
        done."""


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`. `source` is the file that the corpus was read from, `None` for passages in
    memory; `details` are specific to the kind: its encoder, measurements."""

    format: int
    kind: str
    passages: int
    options: dict[str, Any]
    corpus: Fingerprint
    source: Fingerprint | None
    files: dict[str, int]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Index:
    """An index folder that has passed every check."""

    folder: Path
    manifest: Manifest
    corpus: Corpus


def build_index(
    corpus: str | Path | Iterable[Passage],
    output: str | Path,
    kind: str = "bm25",
    *,
    overwrite: bool = False,
    fields: Fields = USUAL_FIELDS,
    skip_duplicates: bool = False,
    announce: Callable[[str], None] = logger.info,
    workers: Workers = ALONE,
    **options: Any,
) -> Manifest:
    """Builds an index folder that `load_retriever(kind, index=output)` opens. After a kill, the same call resumes the
    build, and produces the same bytes.

    Args:
        corpus (`str | Path | Iterable[Passage]`): A file or a dataset (see `sources.py`), or the passages themselves.
        output (`str | Path`): The folder to make. It appears only when the index is complete.
        kind (`str`): `"bm25"`, `"dense"`; `"qdrant"` and `"opensearch"` load an engine on other hosts.
        fields (`Fields`): The fields of id, title and text, if they are not the usual ones.
        skip_duplicates (`bool`): Keeps the first passage of each id; otherwise a repeated id is an error.
        overwrite (`bool`): Replaces an existing index, once the new one is complete.
        announce (`Callable[[str], None]`): Receives messages: the estimated cost, and what is resumed.
        workers (`Workers`): This process, of rank 0, among several; the others call `join_build`.
        options: Of the kind: the fields of its builder. For bm25 `stemmer`, `stopwords`, `k1`, `b` and `engine`.

    Raises:
        IndexFolderError: if the corpus changes during the build.
    """
    corpus, output = home_expanded(corpus), _place(output)
    builder = make_builder(kind, options)
    _check_output(output, overwrite)
    _check_outside(output, corpus)
    with BuildFolder(output, announce) as build:
        source = open_source(corpus, fields)
        fingerprint = source.fingerprint() if source.fingerprint is not None else None
        inputs = {
            "format": FORMAT,
            "kind": kind,
            "options": asdict(builder),
            "source": fingerprint and fingerprint.sha256,  # not its path: a build may be resumed on another machine
            "fields": asdict(fields),
            "skip_duplicates": skip_duplicates,
        }
        build.take_up(inputs if fingerprint is not None else None)
        if not (build.path / MANIFEST).exists():
            if not build.has(_CORPUS):
                write_corpus(source, build.path, fields, skip_duplicates=skip_duplicates).close()
                build.note(_CORPUS)
            with contextlib.closing(Corpus(build.path)) as rows:
                _warn_of_documents(rows)
                if isinstance(builder, Plans):
                    announce(builder.plan(len(rows)))
                if isinstance(builder, Shares):
                    workers.wait()
                    builder.share(rows, build.path, workers)
                details = builder.build(rows, build.path) or {}
            if fingerprint is not None and fingerprint.changed():
                raise IndexFolderError(
                    f"{fingerprint.name} changed while it was indexed; build again when it is complete"
                )
            manifest = Manifest(
                format=FORMAT,
                kind=kind,
                passages=len(rows),
                options=asdict(builder),
                corpus=Fingerprint.of(build.path / ROWS, ROWS),
                source=fingerprint,
                files=build.sizes(),
                details=details,
            )
            write_json(build.path / MANIFEST, asdict(manifest))
        build.put_in_place(replace=overwrite)
    return read_manifest(output)


def _warn_of_documents(rows: Corpus) -> None:
    """Warns if passages are whole documents, of which a policy would read little more than the beginning."""
    if (share := rows.share_above(_DOCUMENT_BYTES)) >= _SHARE_TOLD:
        logger.warning(
            "%.0f%% of the passages are longer than %d bytes (some 500 words), and a policy reads only the first "
            "words of each, as max_observation_length tokens are shared by all passages of a search: cut them into "
            "passages first, with trl-search data chunk DOCUMENTS --size 100 --output corpus.jsonl",
            100 * share,
            _DOCUMENT_BYTES,
        )


def join_build(output: str | Path, kind: str, workers: Workers, **options: Any) -> None:
    """Does this process's share of the build; call it in every process but the one that calls `build_index`."""
    builder = make_builder(kind, options)
    if not isinstance(builder, Shares):
        return
    workers.wait()
    folder = build_path(_place(output))
    with contextlib.closing(Corpus(folder)) as rows:
        builder.share(rows, folder, workers)


def read_manifest(folder: str | Path) -> Manifest:
    """Reads `manifest.json`. Raises `IndexFolderError` if it is missing, damaged, or has a format that this version
    cannot read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise IndexFolderError(f"there is no index folder {folder}; build it with: {_command(folder)}")
    try:
        written = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if any(file.suffix in TEXT_FORMATS for file in folder.iterdir()):
            raise IndexFolderError(
                f"{folder} holds documents, and is not an index: build one of them with trl-search index --corpus "
                f"{shlex.quote(str(folder))} --output NEW_FOLDER"
            ) from None
        raise IndexFolderError(
            f"{folder} is not a finished index (it has no {MANIFEST}): a copy or a build was cut short, or it is "
            f"not an index; build it with: {_command(folder)}"
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
        if other := [name for name in ("options", "files", "details") if not isinstance(written.get(name), dict)]:
            raise TypeError(f"{other[0]} is no object")
        source = written.pop("source")
        corpus = Fingerprint(**written.pop("corpus"))
        return Manifest(corpus=corpus, source=Fingerprint(**source) if source else None, **written)
    except (KeyError, TypeError) as error:
        raise IndexFolderError(f"{folder}/{MANIFEST} is damaged ({error}); rebuild with: {_command(folder)}") from None


def open_index(folder: str | Path, kind: str, *, check_source: bool = True) -> Index:
    """Opens an index folder after checking that it is complete, of this kind, and up to date with its corpus.

    `check_source=False` skips the last check, whether the source file has changed since the build.

    Raises:
        IndexFolderError: if it is not an index of that kind, or its files or its corpus have changed.
    """
    if not isinstance(folder, str | Path):
        raise IndexFolderError(f"an index must be a folder, not {folder!r:.60}: give its path")
    folder = Path(folder)
    manifest = read_manifest(folder)
    rebuild = rebuild_hint(folder)
    if manifest.kind != kind:
        raise IndexFolderError(f"{folder} is an index of kind {manifest.kind!r}, not {kind!r}; load it as such")
    check_sizes(folder, manifest)
    if not manifest.corpus.matches(folder / ROWS):
        raise IndexFolderError(f"{folder / ROWS} was changed after the index was built from it; {rebuild}")
    source = manifest.source
    if check_source and source is not None and source.changed():
        raise IndexFolderError(
            f"{source.name} has changed since {folder} was built from it; {rebuild}; "
            "or use the index unchanged: load_retriever(..., check_source=False)"
        )
    with reading_index(folder):
        return Index(folder, manifest, Corpus(folder))


@contextlib.contextmanager
def reading_index(folder: str | Path) -> Iterator[None]:
    """Explains what opening the files of an index raises, if they are damaged or of another version.

    Raises:
        IndexFolderError: with the command that builds the index again.
    """
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:  # a missing option; NumPy, JSON and tantivy raise ValueError
        raise IndexFolderError(
            f"{folder} cannot be read ({type(error).__name__}: {str(error)[:200]}): it is damaged, or another version "
            f"of trl-search built it; {rebuild_hint(folder)}"
        ) from error


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Checks that the files of an index have the sizes in its manifest.

    Raises:
        IndexFolderError: if a file is missing or has another size.
    """
    for name, size in manifest.files.items():
        file = folder / name
        if not file.exists() or file.stat().st_size != size:
            there = f"has {file.stat().st_size}" if file.exists() else "is missing"
            raise IndexFolderError(
                f"{file} should have {size} bytes, but {there}: copy it again, or {rebuild_hint(folder)}"
            )


def rebuild_hint(folder: str | Path) -> str:
    """`"rebuild with: trl-search index ..."`, the command that builds a finished index again."""
    return f"rebuild with: {_command(Path(folder), asdict(read_manifest(folder)))}"


def make_builder(kind: str, options: dict[str, Any]) -> Builder:
    """The builder of a kind, with its options checked.

    Raises:
        UserError: for an option that the kind does not have.
    """
    make = INDEX_KINDS.get(kind)
    known = [option.name for option in fields(make)]
    for option in options:
        if option not in known:
            raise unknown_name(f"option of a {kind} index", option, known)
    builder: Builder = make(**{name: home_expanded(value) for name, value in options.items()})
    return builder


def _place(output: str | Path) -> Path:
    """The folder that `output` names, with `~`, `.` and links resolved."""
    return Path(home_expanded(output)).resolve()


def _check_output(output: Path, overwrite: bool) -> None:
    """Raises if the output may not be written, before hours of work. Only an index is ever replaced."""
    if (output / MANIFEST).is_file():
        if not overwrite:
            raise IndexFolderError(f"{output} holds an index already; pass --overwrite (overwrite=True) to replace it")
    elif not may_be_built(output):
        raise IndexFolderError(f"{output} exists and is not a finished index: choose another output")


def _check_outside(output: Path, corpus: object) -> None:
    """Refuses an index among the files of its corpus: the next build would take its files for documents."""
    folder = Path(corpus).resolve() if isinstance(corpus, str | Path) else None
    if folder is None or not folder.is_dir() or any((folder / name).is_file() for name in BEIR_CORPUS):
        return
    if output.is_relative_to(folder):
        raise IndexFolderError(f"{output} lies in the folder of the corpus, {corpus}: choose an output outside of it")


def _command(folder: Path, manifest: Any = None) -> str:
    """The command that builds `folder`, filled in from the manifest if there is one."""
    known = manifest if isinstance(manifest, dict) else {}
    source = known.get("source")
    corpus = shlex.quote(str(source["name"])) if isinstance(source, dict) and "name" in source else "FILE.jsonl"
    kind = shlex.quote(str(known.get("kind", "bm25")))
    overwrite = " --overwrite" if (folder / MANIFEST).exists() else ""
    return f"trl-search index --corpus {corpus} --kind {kind} --output {shlex.quote(str(folder))}{overwrite}"
