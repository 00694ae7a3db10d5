"""Atomic file writes, reading of JSON with errors that name the place, `~` in paths."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trl_search.common.errors import UserError

# In Python, a file name that is not UTF-8 holds lone surrogates. They are written as \udce9, which JSON reads back.
_ESCAPED = "backslashreplace"
_NUMPY_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")  # `tofile`, also inside `np.save`


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file that replaces `path` at the end, so a reader of `path` never sees half a file.

    A device or a pipe (`/dev/null`, `/dev/stdout`) is written to, and stays what it is.

    Example:
        >>> with written_whole(folder / "results.json") as temporary:
        ...     temporary.write_text("{}")
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, atomically. NaN raises, because JSON has no NaN: see `finite_or_none`."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with written_whole(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8", errors=_ESCAPED)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line, atomically."""
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8", errors=_ESCAPED) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def disk_is_full(error: BaseException) -> bool:
    """Whether the disk is full. Libraries in C++ and Rust give the system's message without its number, NumPy gives
    the numbers of values."""
    number = error.errno if isinstance(error, OSError) else None
    said = str(error)
    cut_short = isinstance(error, OSError) and _NUMPY_CUT_SHORT.fullmatch(said) is not None
    return number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in said or cut_short


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def finite_or_none(value: Any) -> Any:
    """The value with `None` in place of every float that is not finite, also inside dicts and lists."""
    if isinstance(value, dict):
        return {name: finite_or_none(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that is appended to. An unfinished last line, left by a kill, is removed from the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    if (whole := content.rfind(b"\n") + 1) < len(content):
        os.truncate(path, whole)
    return content[:whole].splitlines()


class NotJSON(ValueError):
    """Bytes cannot be read as JSON. The message is to follow the name of their source."""


def parse_json(content: bytes) -> Any:
    """The value in UTF-8 text of JSON from elsewhere.

    Raises:
        NotJSON: "not UTF-8 (...)", "not JSON (...)".
    """
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise NotJSON(f"not UTF-8 ({error.reason} at byte {error.start}): convert it to UTF-8") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise NotJSON(f"not JSON ({error.msg} at {line}column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits, brackets 100,000 deep
        raise NotJSON(f"not JSON that can be read ({error})") from None


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file. `remedy` is the end of the error message.

    Raises:
        UserError: if the file is not JSON, was cut off, or does not hold an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: {remedy}")
    return value


def parse_object(text: str | Mapping[str, Any], option: str, example: str) -> dict[str, Any]:
    """The JSON object in an option or in a recipe's key.

    Raises:
        UserError: if the text is not JSON, or not an object.

    Example:
        >>> parse_object('["wiki"]', "--retriever_options", '{"index": "indexes/wiki"}')
        UserError: --retriever_options must be a JSON object such as {"index": "indexes/wiki"}, not ["wiki"]
    """
    if isinstance(text, Mapping):
        return dict(text)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{option} is not JSON ({error}): write an object such as {example}, not {text}") from None
    if not isinstance(value, dict):
        raise UserError(f"{option} must be a JSON object such as {example}, not {text}")
    return value


def home_expanded(value: Any) -> Any:
    """Expands `~` in a path or in a string that begins with it; returns any other value unchanged.

    Example:
        >>> home_expanded("~/wiki.jsonl"), home_expanded("bm25"), home_expanded(3)
        ('/home/mira/wiki.jsonl', 'bm25', 3)
    """
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def cache_folder() -> Path:
    """`~/.cache/trl-search`, or below `XDG_CACHE_HOME`, or below the temporary folder if there is no home folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(tempfile.gettempdir() if base.startswith("~") else base, "trl-search")
