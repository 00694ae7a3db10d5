"""The actions of `trl-search data`, one module per action. The docstring is the help."""
