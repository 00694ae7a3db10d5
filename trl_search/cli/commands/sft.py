"""Fine-tunes a policy (SFT) on correct trajectories: its own, a teacher's, or those of scripted players.

    trl-search sft sft_cold_start                                      real questions; keeps correct trajectories
    trl-search sft sft_cold_start --teacher http://localhost:8000      a teacher behind `vllm serve`
    trl-search sft sft_cold_start --collect_only true                  collect and select; train later
    trl-search sft sft_world --output_dir runs/good --quality good=1.0 scripted: it searches as it should

The loss covers only the policy's own tokens (thoughts, calls and answers), never the passages. An interrupted
collection resumes. A recipe is a flat YAML file with the keys of TRL's SFTConfig and ModelConfig, and ours. The model
is saved in output_dir: `trl-search train RECIPE --model_name_or_path OUTPUT_DIR` starts from it."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    from trl_search.cli.recipe_command import run_recipe
    from trl_search.trainer.cold_start.run import run_sft

    how = "the same command goes on; --resume_from_checkpoint last keeps the trained steps, too"
    return run_recipe(argv, "sft", __doc__, run_sft, lambda _: how)
