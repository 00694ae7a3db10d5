"""The command line: `main.py` finds the command, `commands/` holds one module per command."""
