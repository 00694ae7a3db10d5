"""Large files of the hub: resumed at the byte after a kill, joined as they arrive, checked against the hub's SHA-256.

`huggingface_hub` (1.x) writes a download to a file of its process and deletes it when the download fails, so a kill at
40 GB of 43 starts again at 0. Here the unfinished file is kept, under a name made from its final content:

    e5_Flat.index.3f9a0c1d2b7e.incomplete      part_aa, followed by what has arrived of part_ab

Its length says where to resume. The library does the transfer itself (ranges, retries, redirects, progress). Parts are
appended to one file, so joining them takes no second copy and no time.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from trl_search.common.blocks import read_blocks
from trl_search.common.errors import UserError


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as the hub describes it. `sha256` is known of large files (LFS, Xet); small ones have none."""

    name: str
    bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class HubFiles:
    """Files of one commit of a dataset repository, in the order in which they are joined."""

    repository: str
    commit: str
    files: tuple[HubFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def unfinished(self, target: Path) -> Path:
        """Where the content of `target` is gathered until it is complete. Different content has a different name."""
        content = hashlib.sha256(repr([(file.bytes, file.sha256 or file.name) for file in self.files]).encode())
        return target.with_name(f"{target.name}.{content.hexdigest()[:12]}.incomplete")

    def unwritten_bytes(self, target: Path) -> int:
        """Bytes that are still to be written: 0 if `target` exists."""
        if target.exists():
            return 0
        unfinished = self.unfinished(target)
        return self.bytes - (unfinished.stat().st_size if unfinished.exists() else 0)

    def download_bytes(self, target: Path) -> int:
        """Bytes that the hub must send: `fetch` copies parts that are already beside `target`."""
        parts = self.parts(self.bytes - self.unwritten_bytes(target))
        return sum(part.bytes - have for part, _, have in parts if _local_part(target, part) is None)

    def parts(self, written: int) -> Iterator[tuple[HubFile, int, int]]:
        """Each file, its first byte in the joined file, and how much of it the first `written` bytes hold."""
        begins = 0
        for part in self.files:
            yield part, begins, min(max(written - begins, 0), part.bytes)
            begins += part.bytes


def list_files(repository: str, pattern: str, *, endpoint: str | None = None) -> HubFiles:
    """Asks the hub which files of a dataset repository match a pattern, and how large they are.

    Args:
        repository (`str`): The dataset, `"PeterJinGo/wiki-18-e5-index"`.
        pattern (`str`): Of the file names, `"part_*"`. They are joined in the order of their names.
        endpoint (`str`, *optional*): A mirror of the hub; by default `HF_ENDPOINT`, or the hub.

    Raises:
        UserError: if no file has that name.
    """
    from huggingface_hub import HfApi

    with _hub_errors(repository):
        info = HfApi(endpoint=endpoint).dataset_info(repository, files_metadata=True)
    siblings = info.siblings or []
    found = sorted((file for file in siblings if fnmatch.fnmatch(file.rfilename, pattern)), key=lambda f: f.rfilename)
    files = tuple(HubFile(f.rfilename, f.size, f.lfs.sha256 if f.lfs else None) for f in found if f.size is not None)
    if not files or info.sha is None:
        held = ", ".join(file.rfilename for file in siblings) or "nothing"
        raise UserError(f"{repository} on the hub holds no {pattern} any more, but: {held}. It has been changed.")
    return HubFiles(repository, info.sha, files)


def fetch(files: HubFiles, target: Path, *, endpoint: str | None = None) -> None:
    """Joins the files into `target`. After a kill, the same call resumes where it stopped.

    A part that is already in the folder of `target`, in its full size, is copied from there.

    Args:
        files (`HubFiles`): What to fetch, from `list_files`.
        target (`Path`):
            The file to make; it appears when it is whole and its SHA-256 is right. One that is there is not touched.
        endpoint (`str`, *optional*): As for `list_files`.

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
    """Refuses a file whose size differs from the published one, and leaves it alone: it may be somebody's work.

    Raises:
        UserError: if it does not have the published size.
    """
    there = path.stat().st_size
    if there != expected:
        raise UserError(
            f"{path} has {there:,} bytes and the published file {expected:,}: it was cut short, or is another file. "
            "Move it away and run this again; it is not overwritten"
        )


@contextlib.contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
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
    """A part that is beside `target` in its full size."""
    local = target.with_name(part.name)
    return local if local != target and local.is_file() and local.stat().st_size == part.bytes else None


class _Part:
    """A file from one byte on, as if it began there. `http_get` takes its file for the download alone: if a server
    ignores the range, it seeks to 0 and truncates, which must not touch the part before."""

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

    # The commit's own address: parts of two commits would not fit together.
    url = hf_hub_url(files.repository, part.name, repo_type="dataset", revision=files.commit, endpoint=endpoint)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}  # a range counts bytes of the file, not of a gzip
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
    """Cuts off a part that differs from the hub's, with everything after it, so that the next call fetches it."""
    begins = 0
    with path.open("r+b") as file:
        for part in files.files:
            if part.sha256 is not None and _sha256(file, part) != part.sha256:
                file.truncate(begins)
                raise UserError(
                    f"{part.name} of {files.repository} did not arrive as it is on the hub (its SHA-256 differs), and "
                    "was dropped. Run this again to fetch it again; remove a local copy of that name first"
                )
            file.seek(begins := begins + part.bytes)


def _sha256(file: BinaryIO, part: HubFile) -> str:
    """The digest of the next bytes of `file`, as many as the part has."""
    digest = hashlib.sha256()
    for block in read_blocks(file, f"checking {part.name}", part.bytes):
        digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Turns errors of the hub into a `UserError` with the remedy."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        yield
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{repository} is not on the hub any more, or is private now: `hf auth login` if you have access"
        ) from error
    except OfflineModeIsEnabled as error:
        raise UserError(
            f"{repository}: HF_HUB_OFFLINE is set, so the hub is not asked. Unset it to download; without a network, "
            "bring the files here"
        ) from error
    except (HfHubHTTPError, httpx.HTTPError) as error:
        raise UserError(
            f"{repository}: the hub does not answer as it should ({_first_line(error)}). What has come is kept: run "
            "this again to go on, with HF_ENDPOINT for a mirror; without a network, bring the files here"
        ) from error
    except OSError as error:
        if error.errno is not None:  # of the disk, not of the transfer
            raise
        raise UserError(f"{repository}: {_first_line(error)} Run this again") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def free_bytes(folder: Path) -> int:
    """What the disk of a folder has left; the folder need not exist yet."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free
