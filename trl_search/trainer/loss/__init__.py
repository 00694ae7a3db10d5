"""Log-probs of ragged trajectories, without padding, for the tokens of the loss alone."""
