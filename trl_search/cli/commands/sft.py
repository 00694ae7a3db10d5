"""Fine-tunes a policy on trajectories: its own or a teacher's right ones, or scripted ones of the embedded world.

    trl-search sft sft_cold_start                                      real questions; what is right is kept
    trl-search sft sft_cold_start --teacher http://localhost:8000      a teacher behind `vllm serve`
    trl-search sft sft_cold_start --collect_only true                  collect and choose, train later
    trl-search sft sft_world --output_dir runs/good --quality good=1.0 scripted: it searches as it should

The loss is on what the policy itself writes; thoughts, calls and answers, never the passages. Collecting goes on where
it was stopped. A recipe is a flat YAML file of TRL's SFTConfig and ModelConfig keys and ours beside them. output_dir
then holds a model: `trl-search train RECIPE --model_name_or_path OUTPUT_DIR` goes on from it.
"""

from __future__ import annotations


def main(argv: list[str]) -> int:
    from trl_search.cli.recipe_command import run_recipe
    from trl_search.trainer.cold_start.run import run_sft

    how = "the same command goes on; --resume_from_checkpoint last keeps the trained steps, too"
    return run_recipe(argv, "sft", __doc__, run_sft, lambda _: how)
