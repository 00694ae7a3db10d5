"""Callbacks of a training: alarms, held-out evaluation, the best checkpoint, the lines on the terminal."""
