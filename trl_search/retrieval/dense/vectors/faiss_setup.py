"""`faiss_module()` imports FAISS for all other modules, with the right settings for its BLAS library.

Two defaults of faiss-cpu make exact search and IVF training five to ten times slower than they could be:

- The OpenBLAS in its wheels (0.3.15) does not recognise newer processors, and falls back to SSE kernels.
  `OPENBLAS_CORETYPE` selects the kernels, and is read once, when the library is loaded. It is set only during the
  import, so that it affects no other OpenBLAS in this process or a child process.
- FAISS uses BLAS only if queries x dimensions exceeds 128,000, and otherwise compares pair by pair.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Set
from pathlib import Path
from typing import Any

from trl_search.common.extras import import_extra

CORETYPE = "OPENBLAS_CORETYPE"
BLAS_THRESHOLD = 20
# OpenBLAS' SkylakeX kernels use these four; a processor with only the first (Xeon Phi) cannot run them.
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_AVX2 = {"avx2", "fma"}
_lock = threading.Lock()


def faiss_module() -> Any:
    """Imports FAISS. If it is missing, a `UserError` names the extra.

    Raises:
        UserError: if FAISS is not installed.
    """
    with _lock:
        name = kernels(_cpu_flags())
        chosen = name is not None and CORETYPE not in os.environ and "faiss" not in sys.modules
        if chosen:
            os.environ[CORETYPE] = str(name)
        try:
            faiss = import_extra("faiss", "a vector index", "faiss")
        finally:
            if chosen:
                del os.environ[CORETYPE]
        faiss.cvar.distance_compute_blas_threshold = BLAS_THRESHOLD
    return faiss


def kernels(flags: Set[str]) -> str | None:
    """The OpenBLAS kernels for a processor with these flags; `None` leaves the choice to OpenBLAS."""
    if flags >= _AVX512:
        return "SkylakeX"
    return "Haswell" if flags >= _AVX2 else None


def _cpu_flags() -> set[str]:
    """The processor's flags; empty if the system does not list them (macOS, Windows), where FAISS uses another
    BLAS."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return set()
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()
