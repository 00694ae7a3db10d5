"""Imports what the test files import, so that workers forked from a process with these imports need not repeat them.

This saves four CPU seconds per worker. Missing packages are skipped; the tests that need them report it.

accelerate checks many times per optimizer step whether PEFT is installed. Here it checks once per process, which saves
a thirtieth of every training.
"""

from __future__ import annotations

import contextlib
import functools
import importlib

from accelerate.utils import imports

for name in (
    *("hypothesis.strategies", "matplotlib.backends.backend_agg", "opensearchpy", "qdrant_client", "scipy.stats"),
    *("trafilatura", "trl_search.cli.preflight", "trl_search.retrieval.server.app", "uvicorn"),
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

imports._is_package_available = functools.cache(imports._is_package_available)
