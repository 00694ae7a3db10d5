"""Log-probs of ragged trajectories, without padding, for the tokens in the loss only."""
