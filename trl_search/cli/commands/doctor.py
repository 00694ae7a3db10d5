"""Checks this environment, a recipe and a vLLM server, and says what to change.

    trl-search doctor                                       versions, extras, devices
    trl-search doctor --server http://localhost:8000        and what that server does when it is asked
    trl-search doctor recipes/qwen3b.yaml                   and whether both fit that recipe; its server, too
    trl-search doctor Qwen/Qwen3-4B                         which protocols are exact for a model (docs/models.md)

One line per check: ok, note, warning or problem, and what helps. The exit code is 1 if there is a problem.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from trl_search.cli.model_checks import is_model, model_checks
from trl_search.cli.preflight import (
    Check,
    Status,
    check_sampling,
    environment_checks,
    recipe_servers,
    recipe_values,
    server_checks,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE|MODEL", help="a recipe, or a model: its protocols")
    parser.add_argument("--server", nargs="+", metavar="URL", help="vLLM servers, http://localhost:8000")
    parser.add_argument(
        "--prompt_tokens", type=int, default=512, metavar="N", help="tokens of the longest prompt (default: 512)"
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of lines")


def run(args: argparse.Namespace) -> int:
    model = args.recipe if args.recipe and is_model(args.recipe) else None
    recipe = recipe_values(args.recipe) if args.recipe and model is None else None
    checks = environment_checks() + (model_checks(model) if model else [])
    if recipe is not None:
        checks.append(check_sampling(recipe))
    for server in args.server or (recipe_servers(recipe) if recipe is not None else []):
        checks += server_checks(server, recipe, prompt_tokens=args.prompt_tokens)
    if args.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        print("\n".join(line(check) for check in checks))
    return int(any(check.status is Status.PROBLEM for check in checks))


def line(check: Check) -> str:
    remedy = f": {check.remedy}" if check.remedy else ""
    return f"{check.status.value:<8} {check.name:<16} {check.said}{remedy}"
