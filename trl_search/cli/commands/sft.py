"""Fine-tunes a policy on trajectories: correct ones sampled from itself or a teacher, or scripted ones.

    trl-search sft sft_cold_start                                      samples answers and keeps the correct ones
    trl-search sft sft_cold_start --teacher http://localhost:8000      samples from a teacher behind `vllm serve`
    trl-search sft sft_cold_start --collect_only true                  collects and selects, but does not train
    trl-search sft sft_world --output_dir runs/good --quality good=1.0 scripted trajectories with good searches

The loss covers only the tokens that the policy writes (thoughts, calls, answers), never the passages. An interrupted
collection resumes. A recipe is a flat YAML file with keys of TRL's SFTConfig and ModelConfig and the keys below.
The trained model is in output_dir; `trl-search train RECIPE --model_name_or_path OUTPUT_DIR` trains it further.
"""

from __future__ import annotations


def main(argv: list[str]) -> int:
    from trl_search.cli.recipe_command import run_recipe

    return run_recipe(argv, "sft", __doc__)
