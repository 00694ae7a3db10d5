"""Imports what test files import, so that no worker does it again which is forked from a process that imported this.

Four CPU seconds per worker. What is not installed is left out; the tests that need it say so.
"""

from __future__ import annotations

import contextlib
import importlib

for name in (
    *("hypothesis.strategies", "matplotlib.backends.backend_agg", "opensearchpy", "qdrant_client", "scipy.stats"),
    *("trafilatura", "trl_search.cli.preflight", "trl_search.retrieval.server.app", "uvicorn"),
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
