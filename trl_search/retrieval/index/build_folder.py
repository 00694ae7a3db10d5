"""`BuildFolder`: the folder of an index that is being built, and how a killed build resumes.

    indexes/.wiki.building/
        build.json      what is built from what: format, kind, options, the source's hash; and the steps that are done
        build.lock      held while a process builds: a second one for the same output is refused
        scratch/        what the index does not need: vectors that are encoded already
        ...             the index itself, renamed to indexes/wiki when it is whole

The state and the lock are removed last. A build that is killed between the rename and their removal leaves them in the
finished index, where nobody reads them. Were they removed before the rename, a kill in between would lose the build.

A folder that cannot be replaced by a rename (an empty one that is there already, a mount point, one in a parent that
we may not write) is built inside itself, in `indexes/wiki/.building`, and its files move up at the end, the manifest
last. That the place can be written is tested before any work.

A build with the same inputs resumes; one with other inputs starts again and says so. A build that ends in an error
leaves what can be reused: the scratch, and a complete index.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from trl_search.common.errors import UserError

MANIFEST, STATE, LOCK, SCRATCH = "manifest.json", "build.json", "build.lock", "scratch"
INSIDE = ".building"


def build_path(output: Path) -> Path:
    """Where `output`, an absolute path without links, is built."""
    if output.is_dir() and (not (output / MANIFEST).is_file() or not _replaceable(output)):
        return output / INSIDE
    return output.parent / f".{output.name}.building"


def may_be_built(output: Path) -> bool:
    """Whether `output` holds nothing that a build would overwrite."""
    if not output.exists():
        return True
    if not output.is_dir():
        return False
    there = {entry.name for entry in output.iterdir()} - {INSIDE, "lost+found"}
    return not there or (output / INSIDE / MANIFEST).is_file()  # the last build was killed while its files moved up


def _replaceable(folder: Path) -> bool:
    return not os.path.ismount(folder) and folder != Path.cwd() and os.access(folder.parent, os.W_OK)


def _disk_is_full(error: BaseException) -> bool:
    """Libraries in C++ and Rust give the system's message without its number."""
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


class BuildFolder:
    """The folder at `path`, ours while the context is open.

    Args:
        output (`Path`): What the finished folder will be called: an absolute path without links.
        announce (`Callable[[str], None]`): Gets messages: what is resumed, and what is thrown away.
    """

    def __init__(self, output: Path, announce: Callable[[str], None]) -> None:
        self.path = build_path(output)
        self._output, self._announce = output, announce
        self._inputs: dict[str, Any] | None = None
        self._done: list[str] = []
        self._lock = FileLock(self.path / LOCK)

    def __enter__(self) -> BuildFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another process builds {self._output} now; wait for it, or choose another output"
            ) from None
        except OSError as error:
            raise UserError(f"{self._output} cannot be written ({error}); choose another output") from None
        return self

    def take_up(self, inputs: dict[str, Any] | None) -> None:
        """Goes on with a build of the same inputs, and removes what is left of any other.

        Args:
            inputs (`dict`, *optional*): JSON that says what is built from what. `None` if that is unknown; such a
                build is never resumed.
        """
        self._inputs = inputs
        found = self._read_state()
        if found is not None and inputs is not None and found.get("inputs") == inputs:
            self._done = found["done"]
            self._announce(f"going on with the build in {self.path}")
            return
        if found is not None:
            self._announce(
                f"{self.path} holds a build that was not finished, of other passages or options: starting anew"
            )
        self._clear()
        self._write_state()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        self._lock.release()
        kept = f"what is done is kept in {self.path}; the same command goes on with it"
        if (self.path / MANIFEST).is_file():
            kept = f"the index is whole and kept in {self.path}; the same command puts it in place"
        elif self._inputs is None or not (self.path / SCRATCH).exists():
            shutil.rmtree(self.path, ignore_errors=True)
            kept = ""
        if _disk_is_full(error):
            raise UserError(f"the disk of {self.path} is full; {kept or 'nothing of the build is kept'}") from error
        if kept:
            self._announce(kept)

    def has(self, step: str) -> bool:
        return step in self._done

    def note(self, step: str) -> None:
        """Records that a step is done: a later build goes on from there."""
        self._done.append(step)
        self._write_state()

    def sizes(self) -> dict[str, int]:
        """The bytes of every file that belongs to the index."""
        files = sorted(file for file in self.path.rglob("*") if file.is_file())
        names = {file.relative_to(self.path).as_posix(): file.stat().st_size for file in files}
        return {name: size for name, size in names.items() if name.split("/")[0] not in (STATE, LOCK, SCRATCH)}

    def put_in_place(self, *, replace: bool) -> None:
        """Drops what the index does not need, and gives the index its name.

        Raises:
            UserError: if another process has made the folder meanwhile.
        """
        in_the_way = (self._output / MANIFEST).exists()
        if in_the_way and not replace:
            raise UserError(f"{self._output} was made by another process meanwhile; that one is kept")
        shutil.rmtree(self.path / SCRATCH, ignore_errors=True)
        self._lock.release()
        if self.path.parent == self._output:
            self._move_up()
        elif in_the_way:
            self._swap()
        else:
            os.rename(self.path, self._output)
        for name in (STATE, LOCK):
            (self._output / name).unlink(missing_ok=True)

    def _swap(self) -> None:
        old = self.path.with_name(f"{self.path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(self._output, old)
        try:
            os.rename(self.path, self._output)
        except OSError:
            os.rename(old, self._output)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def _move_up(self) -> None:
        """Removes the manifest first, so that the folder is no index while its files change. A second call resumes."""
        (self._output / MANIFEST).unlink(missing_ok=True)
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == MANIFEST):
            there = self._output / entry.name
            if there.is_dir():
                shutil.rmtree(there)
            os.replace(entry, there)
        self.path.rmdir()

    def _read_state(self) -> dict[str, Any] | None:
        """What an earlier build left; `None` for a new folder, `{}` for one whose state cannot be read."""
        try:
            state = json.loads((self.path / STATE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {} if (self.path / MANIFEST).exists() or (self.path / SCRATCH).exists() else None
        except ValueError:
            return {}
        return state if isinstance(state, dict) else {}

    def _write_state(self) -> None:
        new = self.path / f"{STATE}.new"
        new.write_text(json.dumps({"inputs": self._inputs, "done": self._done}, indent=2) + "\n", encoding="utf-8")
        os.replace(new, self.path / STATE)

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.name == LOCK:
                continue
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
