"""Imports what test files import, so that no worker does it again which is forked from a process that imported this.

Four CPU seconds per worker. What is not installed is left out; the tests that need it say so.

accelerate looks up again at each call whether PEFT is installed, many times per optimizer step: here once per process,
which saves a thirtieth of every training.
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
