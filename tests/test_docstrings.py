"""A public function that raises says so in its docstring, or in that of its class."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "trl_search"
# A command's `run` is called by `main` alone, which prints what it raises.
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "cli" not in path.parts)


def public_functions(tree: ast.AST, of: str = "") -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Each with its docstring; that of an `__init__` may be its class's."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node, ast.get_docstring(node) or "")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == "__init__":
            yield node, ast.get_docstring(node) or of
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node, ast.get_docstring(node) or ""


def raises(function: ast.AST) -> bool:
    """Whether it makes an exception itself, and not in a function inside."""
    return any(
        (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call))
        or (not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and raises(node))
        for node in ast.iter_child_nodes(function)
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_a_public_function_raises_is_in_its_docstring(path: Path) -> None:
    for function, said in public_functions(ast.parse(path.read_text(encoding="utf-8"))):
        # An implementation without words of its own has those of the interface.
        assert not said or not raises(function) or "aises" in said or "efuses" in said, function.name
