"""The commands of `trl-search`, one module per command. The docstring is the help; its first line is the summary.

A module defines `add_arguments(parser)` and `run(args) -> int`. One that parses its own arguments (TRL's parser reads
recipes) defines `main(argv: list[str]) -> int` instead. A module is imported only when its command is called.
"""
