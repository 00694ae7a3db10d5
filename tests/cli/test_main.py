"""The command line: finds commands in their folder, imports little, and prints tracebacks only for bugs."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import trl_search.cli.commands
from tests.support.forked import ForkedProcess
from trl_search.cli.main import command_names, is_user_error, main
from trl_search.cli.options import asked_questions, tell_of_imports
from trl_search.common.errors import UserError
from trl_search.retrieval.base import RetrievalError

ROOT = Path(trl_search.__path__[0]).parent


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules are commands; it replaces the package's own."""
    monkeypatch.setattr(trl_search.cli.commands, "__path__", [str(tmp_path)])
    monkeypatch.delenv("TRL_SEARCH_DEBUG", raising=False)
    for name in [name for name in sys.modules if name.startswith("trl_search.cli.commands.")]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("trl_search.cli.commands.")]:
        del sys.modules[name]


def write(folder: Path, name: str, source: str) -> None:
    (folder / f"{name}.py").write_text(textwrap.dedent(source), "utf-8")


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    program = """
        import sys, time
        start = time.process_time()
        from trl_search.cli.main import main
        assert main(["--help"]) == 0
        seconds = time.process_time() - start
        heavy = {"torch", "transformers", "trl", "datasets", "numpy", "bm25s", "httpx"} & sys.modules.keys()
        assert not heavy, heavy
        assert seconds < 1, seconds
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    assert list(lines) == command_names()
    assert all(len(line.split()) > 3 for line in lines.values()), "a command's docstring has no first line"


def test_a_wrong_recipe_is_an_error_before_anything_heavy_is_imported() -> None:
    program = """
        import sys
        from trl_search.cli.main import main
        for words in (["train", "quikstart"], ["train"], ["train", "sft_world"], ["sft", "nofile.yaml"]):
            assert main(words) == 2
        heavy = {"torch", "transformers", "trl.trainer"} & sys.modules.keys()
        assert not heavy, heavy
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    misspelt, none, other, missing = done.stderr.splitlines()
    assert "did you mean 'quickstart'?" in misspelt and "sft_world" not in misspelt  # recipes of `train` only
    assert "no recipe is given" in none and "for another command: run trl-search sft sft_world" in other
    assert missing.endswith("sft_cold_start, sft_world") and "quickstart" not in missing


def test_the_help_of_a_command_imports_nothing_heavy() -> None:
    """`train` and `sft` list keys beside TRL's classes, and importing these takes 5 s."""
    program = """
        import contextlib, sys
        from trl_search.cli.main import command_names, main
        for name in command_names():
            if name not in ("train", "sft"):
                with contextlib.suppress(SystemExit):
                    main([name, "--help"])
                heavy = {"torch", "transformers", "trl", "datasets"} & sys.modules.keys()
                assert not heavy, (name, heavy)
        with contextlib.suppress(SystemExit):
            main(["doctor", "tiny", "--no_such_option"])
        assert main(["push", ".", "not/a/name"]) == 2
        assert main(["eval", "tiny", "--datasets", "world", "--modes", "serach", "--output", "out"]) == 2
        assert "torch" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("terminal", "rank", "imported"), [(True, "0", False), (False, "0", False), (True, "1", False), (True, "0", True)]
)
def test_a_terminal_shows_what_takes_seconds(
    terminal: bool, rank: str, imported: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    if not imported:
        monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("RANK", rank)
    tell_of_imports()
    expected = "importing torch and TRL ...\n" if terminal and rank == "0" and not imported else ""
    assert capsys.readouterr().err == expected


def test_a_misspelt_option_is_an_error_before_the_trainer_is_imported() -> None:
    program = """
        import sys
        from trl_search.cli.main import main
        assert main(["train", "quickstart", "--lerning_rate", "1"]) == 2
        assert not {"trl.trainer.grpo_trainer", "trl_search.trainer.pipeline"} & sys.modules.keys()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "did you mean '--learning_rate'" in done.stderr


@pytest.mark.parametrize("name", command_names())
def test_every_command_has_a_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main([name, "--help"])
    except SystemExit as stop:  # how argparse ends
        status = int(stop.code or 0)
    assert status == 0
    assert f"usage: trl-search {name}" in capsys.readouterr().out


def test_the_help_of_index_names_the_options_that_kinds_share(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["index", "--help"])
    help = " ".join(capsys.readouterr().out.split())
    qdrant = help.partition("--kind qdrant: ")[2]
    assert "Also --encoder" in qdrant and "--url" in qdrant.partition("as above")[0]
    assert "none keeps every word" in help and "`None`" not in help  # on a command line, the word is `none`


def test_both_kinds_of_command_run(commands: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        commands,
        "plain",
        '''
        """Adds one."""
        def add_arguments(parser):
            parser.add_argument("--number", type=int, default=1)
        def run(args):
            return args.number + 1
    ''',
    )
    write(
        commands,
        "raw",
        '''
        """Counts its arguments."""
        def main(argv):
            print(argv)
            return len(argv)
    ''',
    )
    write(commands, "broken", '"""Is never imported for the overview."""\nraise RuntimeError')
    assert main(["plain", "--number", "4"]) == 5
    # --debug after the command belongs to the command: transformers has an argument of that name.
    assert main(["--debug", "raw", "recipe.yaml", "--debug", "underflow"]) == 3
    assert "['recipe.yaml', '--debug', 'underflow']" in capsys.readouterr().out
    assert main([]) == main(["help"]) == main(["--help"]) == 0
    out = capsys.readouterr().out
    assert out.count("  broken  Is never imported for the overview.") == 3
    assert main(["plain", "--nmber", "4"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("chat tiny --retreiver world hi", "unknown option '--retreiver': did you mean '--retriever'"),
        ("eval tiny --datsets=world --datasets w --output o", "unknown option '--datsets': did you mean '--datasets'"),
        ("data chunk d.jsonl --output c.jsonl --overlp 4", "unknown option '--overlp': did you mean '--overlap'"),
        ("eval tiny --datasets w --output o --modes search rga", "unknown mode 'rga': did you mean 'rag'"),
        ("eval tiny", "required: --datasets, --output; trl-search eval --help describes the command"),
        ("index --corpus c.jsonl --output o --kind bm52", "--kind: invalid choice: 'bm52' (choose from 'bm25', "),
        ("data audit q.jsonl --corpus c --world_passages 9", "There are: --answers_field, --corpus,"),  # not data's
        ("eval --model tiny --datasets w --output o", "MODEL is given without --model; trl-search eval --help"),
        ("report --run_dir runs/x", "RUN_DIR is given without --run_dir; trl-search report --help"),
        ("doctor --serv qwen3b", "unknown option '--serv': did you mean '--server'"),
        ("doctor tiny --jsno", "unknown option '--jsno': did you mean '--json'"),
        ("doctor --prompt_tokens x", "--prompt_tokens: invalid int value: 'x'; trl-search doctor --help"),
        ("chat", "the following arguments are required: MODEL; trl-search chat --help describes the command"),
        ("recipes list a b c", "unrecognized arguments: c; trl-search recipes --help describes the command"),
    ],
)
def test_a_mistyped_option_is_one_line_without_the_usage(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("trl-search: error: ") and message in said and said.count("\n") == 1


def test_commands_are_listed_in_the_order_of_first_use(commands: Path) -> None:
    for name in ("zebra", "index", "ant", "train"):
        write(commands, name, '"""A command."""')
    assert command_names() == ["train", "index", "ant", "zebra"]


def test_an_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("trl-search: error: unknown command 'trian': did you mean 'train'? There are: ")
    assert message.count("\n") == 1
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == trl_search.__version__


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ('from trl_search.common.errors import UserError; raise UserError("too small: use 3")', "too small: use 3"),
        ('open("/no/such/corpus.jsonl")', "No such file or directory: /no/such/corpus.jsonl"),
        (
            'from trl_search.retrieval.base import RetrievalError; raise RetrievalError("no server: start it")',
            "no server: start it",
        ),
        ('from trl_search.retrieval.base import Unavailable; raise Unavailable("it is down")', "it is down"),
        ('import errno; raise OSError(errno.ENOSPC, "No space left on device")', "device): free some space"),
        ('import errno; raise OSError(errno.ENOSPC, "No space left", "a.json")', "'a.json'): free some space"),
        ('raise FileNotFoundError("it is not in the cache")', "error: it is not in the cache"),  # huggingface_hub
    ],
)
def test_user_errors_are_reported_in_one_line(
    commands: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, statement: str, message: str
) -> None:
    write(commands, "fails", f'"""Fails."""\ndef main(argv):\n    {statement}\n')
    assert main(["fails"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("trl-search: error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    with pytest.raises((ValueError, OSError, RuntimeError, ImportError)):
        main(["--debug", "fails"])
    monkeypatch.setenv("TRL_SEARCH_DEBUG", "1")
    with pytest.raises((ValueError, OSError, RuntimeError, ImportError)):
        main(["fails"])


@pytest.mark.parametrize(
    "statement",
    [
        'import textwrap; textwrap.fill("text", 0)',
        'raise ValueError("2 ids came with 3 logprobs")',  # it does not matter who raises it
        "import no_such_module",
        'raise KeyError("ids")',
        'raise RuntimeError("shape mismatch")',
    ],
)
def test_a_bug_keeps_its_traceback(commands: Path, statement: str) -> None:
    write(commands, "fails", f'"""Fails."""\ndef main(argv):\n    {statement}\n')
    with pytest.raises((ValueError, ImportError, KeyError, RuntimeError)):
        main(["fails"])


def test_an_interrupt_prints_no_traceback(commands: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(commands, "waits", '"""Waits."""\ndef main(argv):\n    raise KeyboardInterrupt\n')
    assert main(["waits"]) == 130
    assert capsys.readouterr().err == "trl-search waits: interrupted\n"


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_closed_pipe_is_not_an_error(commands: Path, lines: int) -> None:
    # One line stays in the buffer until the command ends; many lines fail while it prints.
    write(
        commands,
        "talks",
        f'''
        """Talks, when nobody listens any more."""
        import time
        def main(argv):
            time.sleep(0.5)
            for _ in range({lines}):
                print("x" * 80)
            return 0
        ''',
    )
    program = f"""
        import sys, trl_search.cli.commands
        trl_search.cli.commands.__path__ = [{str(commands)!r}]
        from trl_search.cli.main import main
        sys.exit(main(["talks"]))
    """
    shell = f'{sys.executable} -c "$PROGRAM" | true; exit ${{PIPESTATUS[0]}}'
    environment = {**os.environ, "PROGRAM": textwrap.dedent(program)}
    done = subprocess.run(
        ["bash", "-c", shell], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("encoding", "shell", "printed"),
    [
        ("utf-8", "{} search", "東京\n"),
        ("ascii", "{} search", "\\u6771\\u4eac\n"),  # a print of the passage was a traceback
        ("utf-8", "{} search >&-", ""),
        ("utf-8", "{} search <&- >&- 2>&-", ""),
    ],
)
def test_a_command_prints_to_any_stream(commands: Path, encoding: str, shell: str, printed: str) -> None:
    lines = ("import sys", "def main(argv):", "    assert sys.stdin.read() == ''", "    print('東京')", "    return 0")
    write(commands, "search", "\n".join(('"""Asks."""', *lines)))
    program = f"""
        import sys, trl_search.cli.commands
        trl_search.cli.commands.__path__ = [{str(commands)!r}]
        from trl_search.cli.main import main
        sys.exit(main(["search"]))
    """
    environment = {**os.environ, "PROGRAM": textwrap.dedent(program), "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        ["bash", "-c", shell.format(f'{sys.executable} -c "$PROGRAM"')],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=600,
    )
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, printed, b"")


def test_a_log_has_no_progress_bars_and_no_needless_warning_of_libraries(commands: Path) -> None:
    lines = ("from datasets import Dataset", "def main(argv):")
    lines += ("    Dataset.from_dict({'a': [1]}).map(lambda row: row)",)
    if importlib.util.find_spec("deepspeed"):  # it warns that there is no GPU
        lines += ("    import deepspeed.accelerator as found", "    found.get_accelerator()")
    lines += ("    import trl.import_utils as found",)  # it warns of vLLM above 0.31
    lines += ("    found._is_package_available = lambda *name, **options: (True, '0.33.0')",)
    lines += ("    found.is_vllm_available()",)
    lines += ("    return 0",)
    write(commands, "maps", "\n".join(('"""Maps."""', *lines)))
    program = f"""
        import sys, trl_search.cli.commands
        trl_search.cli.commands.__path__ = [{str(commands)!r}]
        from trl_search.cli.main import main
        sys.argv = ["trl-search", "maps"]
        sys.exit(main())
    """
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_questions_are_utf8_in_every_locale() -> None:
    in_ascii_locale = "Zürich".encode().decode("ascii", "surrogateescape")
    assert asked_questions([in_ascii_locale, "東京"]) == ["Zürich", "東京"]
    with pytest.raises(UserError, match="not UTF-8"):  # it found nothing, without a word
        asked_questions(["Zürich".encode("latin-1").decode("utf-8", "surrogateescape")])


@pytest.mark.parametrize("words", [["--help"], ["index", "--help"]])
def test_a_pipe_closed_during_help_is_not_an_error(words: list[str]) -> None:
    shell = f"({sys.executable} -m trl_search {' '.join(words)}; echo $? >&2) | true"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stderr == "0\n"


def test_a_pipe_closed_during_the_longest_help_is_not_an_error(tmp_path: Path) -> None:
    """The help of TRL's parser, in a forked process because it imports TRL."""
    read, written = os.pipe()
    os.close(read)
    with open(os.devnull) as nothing:
        train = ForkedProcess(
            "trl_search",
            ["train", "--help"],
            environment=os.environ,
            log=tmp_path / "errors",
            streams=(nothing.fileno(), written),
        )
    os.close(written)
    assert (train.wait(), train.output()) == (0, "")


@pytest.mark.parametrize("option", ["--passages_per_query", "--passages-per-query"])
@pytest.mark.parametrize("joined", [True, False])
def test_options_accept_hyphens_and_underscores(commands: Path, option: str, joined: bool) -> None:
    write(
        commands,
        "plain",
        '''
        """Says a number."""
        def add_arguments(parser):
            parser.add_argument("--passages_per_query", type=int)
        def run(args):
            return args.passages_per_query
    ''',
    )
    assert main(["plain", *([f"{option}=4"] if joined else [option, "4"])]) == 4


def test_every_option_of_every_command_is_declared_with_underscores() -> None:
    for name in command_names():
        declared = importlib.import_module(f"trl_search.cli.commands.{name.replace('-', '_')}")
        if hasattr(declared, "add_arguments"):
            parser = argparse.ArgumentParser()
            declared.add_arguments(parser)
            assert [option for option in _options(parser) if "-" in option[2:]] == []


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from (option for option in action.option_strings if option.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _options(below)


def test_user_errors_are_recognized_by_their_type() -> None:
    assert is_user_error(UserError("x")) and is_user_error(RetrievalError("x")) and is_user_error(UserError("x"))
    assert not is_user_error(ValueError("x")) and not is_user_error(OSError("x"))


def test_every_deliberate_error_has_a_message() -> None:
    """A plain `ValueError` is an invariant of the code, or is caught again: no user reads it."""
    invariants = {
        "types.py",
        "vllm_server.py",
        "engine_thread.py",
        "calibrate.py",
        "even_micro_batches.py",
        "rerank_http.py",
        "call_formats.py",
    }
    raising = {
        path.name
        for path in Path(trl_search.__path__[0]).rglob("*.py")
        if re.search(r"raise (ValueError|ImportError)\(", path.read_text("utf-8"))
    }
    assert raising <= invariants | {"page_text.py"}


def test_the_package_lists_its_public_names() -> None:
    assert set(trl_search.__all__) <= set(dir(trl_search))
    assert all(getattr(trl_search, name) is not None for name in dir(trl_search))


def test_an_interrupted_cold_start_does_not_promise_a_checkpoint(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_search.trainer.cold_start.run.run_sft", interrupted)
    assert main(["sft", "sft_world", "--output_dir", str(tmp_path)]) == 130
    assert "collected attempts are kept; no checkpoint was written yet" in capsys.readouterr().err


def test_an_interrupt_says_how_to_resume(tmp_path, monkeypatch, capsys):
    from trl_search.cli.options import explained_interrupt
    from trl_search.trainer import resume

    def interrupted(args):
        with explained_interrupt(lambda: resume.how_to_resume(tmp_path)):
            raise KeyboardInterrupt

    monkeypatch.setattr("trl_search.cli.commands.search.run", interrupted)
    assert main(["search", "runs/index", "who?"]) == 130
    assert "interrupted; no checkpoint was written yet" in capsys.readouterr().err
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "trainer_state.json").touch()
    monkeypatch.setattr(resume, "is_whole", lambda path: True)
    assert main(["search", "runs/index", "who?"]) == 130
    assert f"--resume_from_checkpoint last continues from {tmp_path / 'checkpoint-4'}" in capsys.readouterr().err
