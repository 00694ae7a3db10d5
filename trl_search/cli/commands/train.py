"""Trains a policy to search with GRPO, from a recipe.

    trl-search train quickstart                                   a shipped recipe, by name
    trl-search train recipes/qwen3b.yaml --learning_rate 5e-7     a file; every key can be overridden
    accelerate launch -m trl_search train qwen3b                  several processes

A recipe is a flat YAML file with keys of TRL's GRPOConfig and ModelConfig and the keys below. The model, checkpoints,
results.json and curves.png are written to output_dir. Before anything is loaded, the command checks whether this
machine can run the recipe and lists all problems at once. `trl-search doctor RECIPE` prints the same checks.
"""

from __future__ import annotations


def main(argv: list[str]) -> int:
    from trl_search.cli.recipe_command import run_recipe

    return run_recipe(argv, "train", __doc__)
