"""What `trl-search data` does: one module per action. Its docstring is the help, as that of a command is."""
