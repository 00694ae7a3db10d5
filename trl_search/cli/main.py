"""`trl-search COMMAND …`: finds the command's module, runs it, and prints mistakes of the user in one line.

Nothing heavy is imported before the command is known: the overview reads docstrings without importing the modules.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import logging
import os
import pkgutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import trl_search.cli.commands
from trl_search.cli.parser import CommandParser
from trl_search.common.errors import Explained, unknown_name
from trl_search.common.files import disk_is_full, home_expanded
from trl_search.common.visible import visible

# The order in which a new user needs them; other commands follow alphabetically.
ORDER = (
    *("recipes", "train", "sft", "eval", "index", "serve", "search", "eval-retriever"),
    *("data", "chat", "report", "push", "doctor"),
)
USER_ERROR, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line. Returns the command's exit status, or 2 for a mistake of the user."""
    _prepare_streams()
    if argv is None and not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a log needs no progress bars of the libraries
    # DeepSpeed, if it is installed, warns on every machine without a GPU. `doctor` says that, too.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    # TRL warns of vLLM above 0.31 five times per process. policies/vllm_versions.py has those that were tested.
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = bool(os.environ.get("TRL_SEARCH_DEBUG"))
    # Only before the command's name: after it, `--debug` is a key of transformers' TrainingArguments.
    while arguments[:1] == ["--debug"]:
        debug, arguments = True, arguments[1:]
    name, *rest = arguments or ["help"]
    try:
        try:
            return run_command(name, [with_underscores(word) for word in rest])
        finally:  # argparse exits with its help still in the buffer
            sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        if debug:
            raise
        said = f"; {interrupt}" if str(interrupt) else ""  # a command may say how to resume
        print(f"trl-search {name}: interrupted{said}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has closed the pipe (`trl-search search … | head -1`). Buffered output must go to /dev/null, or
        # the interpreter prints an error while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug or not is_user_error(error):
            raise
        print(visible(f"trl-search: error: {_message(error)}"), file=sys.stderr)  # it may hold a server's text
        return USER_ERROR


def run_command(name: str, argv: list[str]) -> int:
    """Imports the module of a command and runs it.

    Raises:
        UserError: for an unknown command.
    """
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name == "--version":
        print(trl_search.__version__)
        return 0
    names, name = command_names(), name.replace("_", "-")
    if name not in names:
        raise unknown_name("command", name, names)
    module = importlib.import_module(f"{trl_search.cli.commands.__name__}.{name.replace('-', '_')}")
    if hasattr(module, "main"):
        return int(module.main(argv))
    parser = CommandParser(
        prog=f"trl-search {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(argv)))


def with_underscores(word: str) -> str:
    """Writes an option as it is declared, with underscores, and expands `~` after `=`, which shells do not.

    Example:
        >>> with_underscores("--retriever-options={}"), with_underscores("--no-evaluate"), with_underscores("a-b")
        ('--retriever_options={}', '--no_evaluate', 'a-b')
    """
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{home_expanded(value)}"


def overview() -> str:
    """What `trl-search --help` prints: every command with the first line of its docstring."""
    names = command_names()
    width = max(map(len, names), default=0)
    lines = [f"  {name.ljust(width)}  {_summary(name)}" for name in names]
    return "\n".join(
        [
            "usage: trl-search [--debug] [--version] COMMAND ...",
            "",
            "Train language models that search.",
            "",
            *lines,
            "",
            "`trl-search COMMAND --help` describes a command. Errors in your input print one line;",
            "--debug, or TRL_SEARCH_DEBUG=1, shows the traceback.",
        ]
    )


def command_names() -> list[str]:
    """The names of the commands, in the order of `ORDER`; the module `eval_retriever.py` is `eval-retriever`."""
    found = [module.name.replace("_", "-") for module in pkgutil.iter_modules(trl_search.cli.commands.__path__)]
    return sorted(found, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def is_user_error(error: BaseException) -> bool:
    """Whether the message is enough: an `Explained` error, a path that cannot be opened, or a full disk. Other errors
    are bugs."""
    paths = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, (Explained, *paths)) or (isinstance(error, OSError) and disk_is_full(error))


def _prepare_streams() -> None:
    """Replaces closed streams (`>&-`, some services) by /dev/null, and escapes characters that an encoding lacks.

    Python has `None` for a closed stream, so that the first `print` or `isatty` of a library would end the command;
    an ASCII or Latin-1 terminal would end it at the first passage in another script. `asked_questions` refuses what
    cannot be read from stdin."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # a stream that was read already keeps its handling
                stream.reconfigure(errors="surrogateescape" if name == "stdin" else "backslashreplace")


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and disk_is_full(error):
        return f"the disk is full ({error}): free some space, then run the same command again"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return str(error)


def _summary(name: str) -> str:
    path = Path(next(iter(trl_search.cli.commands.__path__)), f"{name.replace('-', '_')}.py")
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]
