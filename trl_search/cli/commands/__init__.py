"""The commands of `trl-search`, a module each: its docstring is the help, its first line the summary in the overview.

A module either defines `add_arguments(parser)` and `run(args) -> int`, or, where it parses its own arguments (TRL's
parser reads recipes), `main(argv: list[str]) -> int`. It is imported when its command is called and not before.
"""
