"""A cold start for GRPO: attempts collected, the good ones chosen, a policy fine-tuned on them (`trl-search sft`)."""
