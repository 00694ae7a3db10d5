"""Training: GRPO on TRL's trainer, supervised fine-tuning, and the steps of `trl-search train` and `sft`.

grpo.py       `SearchGRPOTrainer`: the seams between TRL's `GRPOTrainer` and our rollout
inputs.py     what the user gives the trainer, checked and completed
pipeline.py   the steps of `trl-search train`
sft.py        supervised fine-tuning on trajectories
groups/       which groups a batch is made of: chosen, refilled, carried over
generation/   what generates, and how the weights of a step reach it
loss/         log-probs of ragged trajectories without padding
callbacks/    alarms, held-out evaluation, the best checkpoint, progress
cold_start/   `trl-search sft`: collect attempts, choose the good ones, fine-tune
"""
