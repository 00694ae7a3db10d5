"""Imports go one way, files stay short, and what is heavy is imported by those who need it alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "trl_search"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the bottom up: a module may import those of the layers before its own, and of its own.
LAYERS = [
    {"errors", "types", "text", "world_language", "whole_files", "json_objects", "credentials"},
    {"reflection", "wellformed", "world"},
    {"retrieval"},
    {"serving"},
    {"data", "data_summary", "hub_files", "wiki18"},
    {"protocols", "policies", "rewards", "alarms", "logprobs", "packing", "varlen_attention", "progress"},
    {"environment", "metrics", "outcomes"},
    {"rollout"},
    {"evaluate", "config", "scripts", "agent_settings"},
    {"records"},
    {"vllm_backend"},
    {"prepare"},
    {"report", "sft", "trainer", "tiny_policy", "recipe", "base_model"},
    {"evaluation"},
    {"task", "held_out"},
    {"best_checkpoint", "cold_start"},
    {"training", "doctor"},
    {"chat", "sharing"},
    {"commands"},
    {"cli", "__main__", "__init__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# torch, directly; what trains or generates, and nothing else.
MAY_IMPORT_TORCH = {"policies", "logprobs", "packing", "varlen_attention", "trainer", "training", "sft", "tiny_policy"}


def home(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path, *, top_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else list(ast.walk(tree))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    if home(path) == "__init__":
        return
    for name in imported(path):
        if name.startswith("trl_search."):
            below = name.split(".")[1]
            assert RANK[below] <= RANK[home(path)], f"{home(path)} imports {below}, which stands above it"
    heavy = {name.split(".")[0] for name in imported(path, top_level=True)} & {"torch", "vllm", "faiss", "matplotlib"}
    assert heavy <= ({"torch"} if home(path) in MAY_IMPORT_TORCH else set())
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_the_package_itself_is_quick_to_import():
    code = "import sys, trl_search; print(sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
