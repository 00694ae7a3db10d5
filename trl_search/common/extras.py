"""Imports a package of an extra where it is needed; if it is missing, the error names the extra."""

from __future__ import annotations

import importlib
from typing import Any

from trl_search.common.errors import UserError


def import_extra(module: str, what: str, extra: str, instead: str = "") -> Any:
    """Imports a module that `pip install 'trl-search[extra]'` installs.

    Raises:
        UserError: if it cannot be imported.

    Example:
        >>> import_extra("tantivy", "BM25's tantivy engine", "tantivy")
        UserError: BM25's tantivy engine needs tantivy (No module named 'tantivy'): pip install 'trl-search[tantivy]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{what} needs {module} ({error}): pip install 'trl-search[{extra}]'{instead}") from error
