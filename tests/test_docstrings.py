"""The docstring of a public function that raises, or of its class, says so."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "trl_search"
# Only `main` calls a command's `run`, and it prints errors.
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "cli" not in path.parts)


def public_functions(tree: ast.AST, of: str = "") -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Public functions with their docstrings; for `__init__` also that of the class."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node, ast.get_docstring(node) or "")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == "__init__":
            yield node, ast.get_docstring(node) or of
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node, ast.get_docstring(node) or ""


def raises(function: ast.AST) -> bool:
    """Whether the function itself raises an exception, not a nested function."""
    return any(
        (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call))
        or (not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and raises(node))
        for node in ast.iter_child_nodes(function)
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_a_public_function_raises_is_in_its_docstring(path: Path) -> None:
    for function, said in public_functions(ast.parse(path.read_text(encoding="utf-8"))):
        # An implementation without a docstring has that of the interface.
        assert not said or not raises(function) or "aises" in said or "efuses" in said, function.name
