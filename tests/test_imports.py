"""Imports go one way, without cycles, and only folders that need torch import it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "trl_search"
FILES = sorted(PACKAGE.rglob("*.py"))
# The folders of the package from the bottom up: each imports only from folders on earlier lines, and from itself.
LAYERS = """
common
types
protocols retrieval policies
rewards
environment
rollout
data
config
evaluation
chat
records
trainer
cli
__main__ __init__
"""
LAYER = {folder: layer for layer, line in enumerate(LAYERS.split("\n")) for folder in line.split()}
# Only these folders import torch at the top of a module.
MAY_IMPORT_TORCH = {"policies", "trainer"}


def folder(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path, *, top_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else list(ast.walk(tree))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_every_folder_has_a_layer_and_there_are_few():
    folders = {folder(path) for path in FILES} - {"__init__", "__main__"}
    assert folders == LAYER.keys() - {"__init__", "__main__"}
    assert len(folders) <= 15


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_folder_imports_only_from_lower_layers(path):
    if folder(path) == "__init__":
        return
    for name in imported(path):
        if name.startswith("trl_search."):
            below = name.split(".")[1]
            assert below == folder(path) or LAYER[below] < LAYER[folder(path)], f"{folder(path)} imports {below}"
    heavy = {name.split(".")[0] for name in imported(path, top_level=True)} & {"torch", "vllm", "faiss", "matplotlib"}
    assert heavy <= ({"torch"} if folder(path) in MAY_IMPORT_TORCH else set())
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_there_are_no_import_cycles():
    graph = {module(path): {name for name in map(as_file, imported(path)) if name} for path in FILES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for below in graph[name]:
                visit(below, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def as_file(name: str) -> str | None:
    return name if name in MODULES else None


MODULES = {module(path) for path in FILES}


def test_no_file_shadows_a_library_that_the_code_imports():
    libraries = {name.split(".")[0] for path in FILES for name in imported(path)} - {"trl_search", "types"}
    assert not {path.stem for path in FILES if path.name != "__init__.py"} & libraries - {"types", "data"}


def test_the_package_itself_is_quick_to_import():
    code = "import sys, trl_search; print(sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
