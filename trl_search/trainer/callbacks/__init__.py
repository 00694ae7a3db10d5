"""What watches a training run: alarms, held-out evaluation, the best checkpoint, the lines on the terminal."""
