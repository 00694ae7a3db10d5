"""The versions of vLLM that work with this TRL, and with each other."""

from __future__ import annotations

import contextlib

from packaging.version import InvalidVersion, Version

# The first version that TRL 1.16 supports, and the last one that was tested (TRL warns above 0.31).
VLLM_VERSIONS = ("0.22.0", "0.33.0")
# Since this version, a server is asked in another way to join an NCCL group (vllm-project/vllm#50902).
_JOINS_ANOTHER_WAY = Version("0.28.0")


def version_problem(version: str) -> str:
    """Why a version of vLLM may not work with this TRL; empty if it does."""
    first, last = VLLM_VERSIONS
    # CPU builds have versions such as 0.32.0+cpu, and an unfinished build is called dev.
    with contextlib.suppress(InvalidVersion):
        if Version(first) <= Version(Version(version).base_version) <= Version(last):
            return ""
    return f"vLLM {version} is outside {first} to {last}, the versions that were tested with TRL 1.16"


def can_join(there: str, here: str) -> bool:
    """Whether a server can join an NCCL group with this process, by both versions of vLLM. Unknown ones are tried."""
    with contextlib.suppress(InvalidVersion):
        return (Version(there) < _JOINS_ANOTHER_WAY) == (Version(here) < _JOINS_ANOTHER_WAY)
    return True
