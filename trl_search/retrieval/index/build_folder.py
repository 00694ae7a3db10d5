"""`BuildFolder`: the folder of an index that is being built, and how a killed build resumes.

    indexes/.wiki.building/
        build.json      the inputs: format, kind, options, the source's hash; and the finished steps
        build.lock      locked while a process builds, so that a second one for the same output fails
        scratch/        temporary files: vectors that are already encoded
        ...             the index itself, renamed to indexes/wiki when it is complete

The state and the lock are removed after the rename. A kill before their removal leaves them in the finished index,
where they are ignored. If they were removed before the rename, a kill in between would lose the build.

If a rename cannot replace the output folder (it exists and is empty, is a mount point, or has a read-only parent), the
build is inside it, in `indexes/wiki/.building`, and its files move up at the end, the manifest last. Before any work,
the build checks that it can write there.

A build with the same inputs resumes; one with other inputs starts again and says so. After an error, the reusable
files stay: the scratch folder, and a complete index.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from trl_search.common.errors import UserError
from trl_search.common.files import disk_is_full

MANIFEST, STATE, LOCK, SCRATCH = "manifest.json", "build.json", "build.lock", "scratch"
INSIDE = ".building"


def build_path(output: Path) -> Path:
    """The folder in which `output`, an absolute path without links, is built."""
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
    return not there or (output / INSIDE / MANIFEST).is_file()  # the last build was killed while moving its files up


def _replaceable(folder: Path) -> bool:
    return not os.path.ismount(folder) and folder != Path.cwd() and os.access(folder.parent, os.W_OK)


class BuildFolder:
    """The folder at `path`, locked for this process while the context is open."""

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
                f"another process is building {self._output}; wait for it, or choose another output"
            ) from None
        except OSError as error:
            raise UserError(f"{self._output} cannot be written ({error}); choose another output") from None
        return self

    def take_up(self, inputs: dict[str, Any] | None) -> None:
        """Resumes a build with the same inputs, and removes the remains of any other build. A build whose inputs are
        unknown (`None`) is never resumed."""
        self._inputs = inputs
        found = self._read_state()
        if found is not None and inputs is not None and found.get("inputs") == inputs:
            self._done = found["done"]
            self._announce(f"resuming the build in {self.path}")
            return
        if found is not None:
            self._announce(f"{self.path} holds an unfinished build of other passages or options: starting again")
        self._clear()
        self._write_state()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        self._lock.release()
        kept = f"the finished part is kept in {self.path}; the same command resumes it"
        if (self.path / MANIFEST).is_file():
            kept = f"the index is complete and kept in {self.path}; the same command puts it in place"
        elif self._inputs is None or not (self.path / SCRATCH).exists():
            shutil.rmtree(self.path, ignore_errors=True)
            kept = ""
        if disk_is_full(error):
            raise UserError(f"the disk of {self.path} is full; {kept or 'nothing of the build is kept'}") from error
        if kept:
            self._announce(kept)

    def has(self, step: str) -> bool:
        return step in self._done

    def note(self, step: str) -> None:
        """Records that a step is done: a later build resumes after it."""
        self._done.append(step)
        self._write_state()

    def sizes(self) -> dict[str, int]:
        """The bytes of every file that belongs to the index."""
        files = sorted(file for file in self.path.rglob("*") if file.is_file())
        names = {file.relative_to(self.path).as_posix(): file.stat().st_size for file in files}
        return {name: size for name, size in names.items() if name.split("/")[0] not in (STATE, LOCK, SCRATCH)}

    def put_in_place(self, *, replace: bool) -> None:
        """Removes temporary files, and renames the folder to the output.

        Raises:
            UserError: if another process has made the output folder in the meantime.
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
        """Moves the files up. The manifest is removed first, so that the folder is not an index meanwhile. A second
        call resumes."""
        (self._output / MANIFEST).unlink(missing_ok=True)
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == MANIFEST):
            there = self._output / entry.name
            if there.is_dir():
                shutil.rmtree(there)
            os.replace(entry, there)
        self.path.rmdir()

    def _read_state(self) -> dict[str, Any] | None:
        """The state of an earlier build; `None` for a new folder, `{}` if the state cannot be read."""
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
