"""`BuildFolder`: where an index is while it is built, and how a build that was killed goes on.

    indexes/.wiki.building/
        build.json      what is built from what: format, kind, options, the source's hash; and the steps that are done
        build.lock      held while a process builds: a second one for the same output is refused
        scratch/        what the index does not need: vectors that are encoded already
        ...             the index to be, renamed to indexes/wiki when whole

A build with the same inputs takes up what is there; with others it starts anew and says so. What ends in an error
leaves only what is worth going on with, the scratch.
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

MANIFEST, STATE, LOCK, SCRATCH = "manifest.json", "build.json", "build.lock", "scratch"


def build_path(output: Path) -> Path:
    """Where `output` is built."""
    return output.parent / f".{output.name}.building"


class BuildFolder:
    """The folder at `path`, ours while the context is open.

    Args:
        output (`Path`): What the finished folder will be called.
        inputs (`dict`, *optional*): JSON that says what is built from what; `None` where that cannot be told, and then
            nothing is ever taken up.
        announce (`Callable[[str], None]`): Told what is taken up, and what is thrown away.
    """

    def __init__(self, output: Path, inputs: dict[str, Any] | None, announce: Callable[[str], None]) -> None:
        self.path = build_path(output)
        self._output, self._inputs, self._announce = output, inputs, announce
        self._done: list[str] = []
        self._lock = FileLock(self.path / LOCK)

    def __enter__(self) -> BuildFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another process builds {self._output} now; wait for it, or choose another output"
            ) from None
        found = self._read_state()
        if found is not None and self._inputs is not None and found.get("inputs") == self._inputs:
            self._done = found["done"]
            self._announce(f"going on with the build in {self.path}")
            return self
        if found is not None:
            self._announce(
                f"{self.path} holds a build that was not finished, of other passages or options: starting anew"
            )
        self._clear()
        self._write_state()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        self._lock.release()
        if self._inputs is not None and (self.path / SCRATCH).exists():
            self._announce(f"what is done is kept in {self.path}; the same command goes on with it")
        else:
            shutil.rmtree(self.path, ignore_errors=True)

    def has(self, step: str) -> bool:
        return step in self._done

    def note(self, step: str) -> None:
        """Records that a step is done: what it wrote is taken up from now on."""
        self._done.append(step)
        self._write_state()

    def sizes(self) -> dict[str, int]:
        """The bytes of every file that belongs to the index."""
        files = sorted(file for file in self.path.rglob("*") if file.is_file())
        names = {file.relative_to(self.path).as_posix(): file.stat().st_size for file in files}
        return {name: size for name, size in names.items() if name.split("/")[0] not in (STATE, LOCK, SCRATCH)}

    def put_in_place(self, *, replace: bool) -> None:
        """Drops what the index does not need and gives it its name."""
        in_the_way = (self._output / MANIFEST).exists()
        if in_the_way and not replace:
            raise UserError(f"{self._output} was made by another process meanwhile; that one is kept")
        shutil.rmtree(self.path / SCRATCH, ignore_errors=True)
        self._lock.release()
        for name in (STATE, LOCK):
            (self.path / name).unlink(missing_ok=True)
        if not in_the_way:
            os.rename(self.path, self._output)
            return
        old = self.path.with_name(f"{self.path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(self._output, old)
        os.rename(self.path, self._output)
        shutil.rmtree(old)

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
