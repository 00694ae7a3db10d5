"""Cold start for GRPO (`trl-search sft`): collects attempts, selects the good ones, and fine-tunes a policy on
them."""
