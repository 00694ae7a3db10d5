"""Callbacks of the trainer: alarms, held-out evaluation, the best checkpoint, progress on the terminal."""
