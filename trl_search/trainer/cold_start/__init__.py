"""Cold start for GRPO (`trl-search sft`): collects attempts and fine-tunes a policy on the good ones."""
