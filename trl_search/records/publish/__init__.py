"""Publishing a trained agent: the model card, its results, the commit (`trl-search push`)."""
