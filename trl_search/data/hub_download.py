"""Downloads large files of the hub: resumes after a kill, joins parts as they arrive, and checks the hub's SHA-256.

`huggingface_hub` (1.x) writes a download to a temporary file of the process and deletes it if the download fails, so a
kill at 40 GB of 43 starts again at 0. Here the unfinished file is kept, with a hash of its final content in its name:

    e5_Flat.index.3f9a0c1d2b7e.incomplete      part_aa, followed by what has arrived of part_ab

Its length says where to resume. The library does the transfer itself (ranges, retries, redirects, progress). Parts are
appended to one file, so no second copy is needed to join them.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from trl_search.common.blocks import read_blocks, read_sha256
from trl_search.common.errors import UserError, first_line
from trl_search.common.files import disk_is_full
from trl_search.common.hub import hub_http


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as the hub describes it. Only large files (LFS, Xet) have a `sha256`."""

    name: str
    bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class HubFiles:
    """Files of one commit of a dataset repository, in the order of joining."""

    repository: str
    commit: str
    files: tuple[HubFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def unfinished(self, target: Path) -> Path:
        """The path of the unfinished `target`. Different content has a different name."""
        content = hashlib.sha256(repr([(file.bytes, file.sha256 or file.name) for file in self.files]).encode())
        return target.with_name(f"{target.name}.{content.hexdigest()[:12]}.incomplete")

    def unwritten_bytes(self, target: Path) -> int:
        """Bytes still to be written: 0 if `target` exists."""
        if target.exists():
            return 0
        unfinished = self.unfinished(target)
        return self.bytes - (unfinished.stat().st_size if unfinished.exists() else 0)

    def download_bytes(self, target: Path) -> int:
        """Bytes still to be downloaded, without the parts beside `target`, which `fetch` copies."""
        parts = self.parts(self.bytes - self.unwritten_bytes(target))
        return sum(part.bytes - have for part, _, have in parts if _local_part(target, part) is None)

    def parts(self, written: int) -> Iterator[tuple[HubFile, int, int]]:
        """Yields each file, its offset in the joined file, and how many of its bytes are among the first `written`."""
        begins = 0
        for part in self.files:
            yield part, begins, min(max(written - begins, 0), part.bytes)
            begins += part.bytes


def list_files(repository: str, pattern: str, *, endpoint: str | None = None) -> HubFiles:
    """Asks the hub which files of a dataset repository match a pattern, and how large they are. The files are joined
    in the order of their names.

    Raises:
        UserError: if no file matches.
    """
    from huggingface_hub import HfApi

    with _hub_errors(repository):
        info = HfApi(endpoint=endpoint).dataset_info(repository, files_metadata=True)
    siblings = info.siblings or []
    found = sorted((file for file in siblings if fnmatch.fnmatch(file.rfilename, pattern)), key=lambda f: f.rfilename)
    files = tuple(HubFile(f.rfilename, f.size, f.lfs.sha256 if f.lfs else None) for f in found if f.size is not None)
    if not files or info.sha is None:
        held = ", ".join(file.rfilename for file in siblings) or "nothing"
        raise UserError(f"{repository} on the hub no longer holds {pattern}, but: {held}. It has been changed.")
    return HubFiles(repository, info.sha, files)


def fetch(files: HubFiles, target: Path, *, endpoint: str | None = None) -> None:
    """Joins the files into `target`, which appears when it is complete and its SHA-256 is right; an existing file is
    not touched. After a kill, the same call resumes where it stopped.

    A part that is already complete in the folder of `target` is copied from there.

    Raises:
        UserError: if another process is fetching it now.
    """
    from filelock import FileLock, Timeout

    if target.exists():
        check_bytes(target, files.bytes)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    path = files.unfinished(target)
    try:
        with FileLock(f"{path}.lock", timeout=0), naming_full_disk(path):
            _gather(files, path, target, endpoint)
            _check_hashes(files, path)
            os.replace(path, target)
    except Timeout:
        raise UserError(f"another process is fetching {target} now: wait for it, or end it") from None
    Path(f"{path}.lock").unlink(missing_ok=True)


def check_bytes(path: Path, expected: int) -> None:
    """Raises `UserError` if the size of a file differs from the published one. The file is kept, since it may be the
    user's own."""
    there = path.stat().st_size
    if there != expected:
        raise UserError(
            f"{path} has {there:,} bytes and the published file {expected:,}: it was cut short or is another file. "
            "Move it away and run this again; it is not overwritten"
        )


@contextlib.contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not disk_is_full(error):
            raise
        raise UserError(f"the disk of {path} is full: make room and run this again, it goes on from here") from error


def _gather(files: HubFiles, path: Path, target: Path, endpoint: str | None) -> None:
    done = path.stat().st_size if path.exists() else 0
    if done > files.bytes:
        raise UserError(f"{path} is longer than what it is made from: delete it and run this again")
    with path.open("r+b" if path.exists() else "x+b") as file:
        for part, begins, have in files.parts(done):
            file.seek(begins + have)
            if have == part.bytes:
                continue
            if local := _local_part(target, part):
                _copy(local, file, have)
            else:
                _download(files, part, file, have, endpoint)


def _local_part(target: Path, part: HubFile) -> Path | None:
    """The path of a complete part beside `target`."""
    local = target.with_name(part.name)
    return local if local != target and local.is_file() and local.stat().st_size == part.bytes else None


class _Part:
    """A view of a file that begins at an offset. `http_get` assumes that its file holds only this download: if a
    server ignores the range, it seeks to 0 and truncates, which must not touch the parts before."""

    def __init__(self, file: BinaryIO, begins: int) -> None:
        self._file, self._begins = file, begins

    def write(self, data: bytes) -> int:
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell() - self._begins

    def seek(self, offset: int) -> int:
        return self._file.seek(self._begins + offset) - self._begins

    def truncate(self) -> int:
        return self._file.truncate() - self._begins


def _download(files: HubFiles, part: HubFile, file: BinaryIO, have: int, endpoint: str | None) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    # The URL of the commit: parts of two commits would not match.
    url = hf_hub_url(files.repository, part.name, repo_type="dataset", revision=files.commit, endpoint=endpoint)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}  # a range counts bytes of the file
    window = cast(BinaryIO, _Part(file, file.tell() - have))
    with _hub_errors(files.repository):
        http_get(
            url, window, resume_size=have, headers=headers, expected_size=part.bytes, displayed_filename=part.name
        )


def _copy(source: Path, file: BinaryIO, have: int) -> None:
    with source.open("rb") as read:
        read.seek(have)
        for block in read_blocks(read, f"copying {source.name}", source.stat().st_size, done=have):
            file.write(block)


def _check_hashes(files: HubFiles, path: Path) -> None:
    """Removes a part whose hash differs from the hub's, and everything after it, so that the next call fetches it."""
    begins = 0
    with path.open("r+b") as file:
        for part in files.files:
            if part.sha256 and read_sha256(file, f"checking {part.name}", part.bytes) != part.sha256:
                file.truncate(begins)
                raise UserError(
                    f"{part.name} of {files.repository} differs from the hub's file (by its SHA-256), and was "
                    "dropped. Run this again to fetch it again; remove a local copy of that name first"
                )
            file.seek(begins := begins + part.bytes)


@contextlib.contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Turns errors of the hub into a `UserError` with the remedy."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        yield
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{repository} is no longer on the hub, or is private now: run `hf auth login` if you have access"
        ) from error
    except OfflineModeIsEnabled as error:
        raise UserError(
            f"{repository}: HF_HUB_OFFLINE is set, so the hub is not used. Unset it to download; without a network, "
            "bring the files here"
        ) from error
    except (HfHubHTTPError, hub_http().HTTPError) as error:
        raise UserError(
            f"{repository}: the hub did not answer as expected ({first_line(error)}). The bytes so far are kept: run "
            "this again to resume, with HF_ENDPOINT for a mirror; without a network, bring the files here"
        ) from error
    except OSError as error:
        if error.errno is not None:  # an error of the disk, not of the transfer
            raise
        raise UserError(f"{repository}: {first_line(error)} Run this again") from error


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free
