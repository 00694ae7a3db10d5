"""Training: GRPO on TRL's trainer, supervised fine-tuning, and the steps of `trl-search train` and `sft`.

grpo.py       `SearchGRPOTrainer`, and a list of the seams between TRL's `GRPOTrainer` and our rollout
rollouts.py   the seams that generate and score a batch
inputs.py     checks and completes the trainer's arguments
pipeline.py   the steps of `trl-search train`
sft.py        supervised fine-tuning on trajectories
groups/       the groups of a batch: choice of questions, refill, carry-over
generation/   the engines that generate, and how they get the weights of a step
loss/         the loss, with log-probs of ragged trajectories without padding
callbacks/    alarms, held-out evaluation, the best checkpoint, progress
cold_start/   `trl-search sft`: collect attempts, choose the good ones, fine-tune
"""
