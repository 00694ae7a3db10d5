"""Trains a policy to search with GRPO, from a recipe.

    trl-search train quickstart                                   a shipped recipe, by name
    trl-search train recipes/qwen3b.yaml --learning_rate 5e-7     a file; every key can be overridden
    accelerate launch -m trl_search train qwen3b                  several processes

A recipe is a flat YAML file with keys of TRL's GRPOConfig and ModelConfig and the keys below. The model, checkpoints,
results.json and curves.png are written to output_dir. Before anything is loaded, the command checks whether this
machine can run the recipe and lists all problems at once. `trl-search doctor RECIPE` prints the same checks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_search.config.grpo import SearchGRPOConfig


def main(argv: list[str]) -> int:
    from trl_search.cli.recipe_command import run_recipe

    def train(*arguments: Any) -> None:
        from trl_search.trainer.pipeline import run_training

        run_training(*arguments)

    def go_on(config: SearchGRPOConfig) -> str:
        from trl_search.trainer.resume import how_to_resume

        return how_to_resume(Path(config.output_dir or "."))

    return run_recipe(argv, "train", __doc__, train, go_on)
