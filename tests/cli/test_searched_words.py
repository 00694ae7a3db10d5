"""A folder, address, kind, run or `world` means the same in `serve`, `search`, `eval`, `chat` and recipes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.servers import retrieve_from, serving
from trl_search.cli.main import main
from trl_search.common.errors import UserError
from trl_search.config.searched import Searched
from trl_search.config.task import TaskArguments, load_task
from trl_search.retrieval import Retriever, load_retriever
from trl_search.retrieval.index.folder import build_index
from trl_search.types import Passage

PASSAGES = [Passage("1", "Orlune", "A harbour town.")]


class Stopped(UserError):
    """Raised instead of loading: the tests look at what would be loaded."""


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Searched]:
    """Records everything that a command would load."""
    seen: list[Searched] = []

    def load(self: Searched) -> Retriever:
        seen.append(self)
        raise Stopped("seen")

    monkeypatch.setattr(Searched, "load", load)
    return seen


def run_folder(folder: Path, **task: object) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"format": 1, "config": {}, "task": task}))
    (folder / "checkpoint-1").mkdir()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    build_index(PASSAGES, tmp_path / "wiki")
    (tmp_path / "q.jsonl").write_text('{"id": "1", "question": "Where?", "golden_answers": ["there"]}\n')
    run_folder(tmp_path / "runs/index", questions="nq", retriever="wiki", retriever_options='{"backend": "numpy"}')
    run_folder(
        tmp_path / "runs/world", questions="world", retriever="bm25", retriever_options="{}", world_passages=300,
        world_seed=5,
    )  # fmt: skip
    with serving(retrieve_from(load_retriever("bm25", passages=PASSAGES))) as server:
        (tmp_path / "address").write_text(server.url)
        yield tmp_path


def by_recipe(word: str, options: str) -> int:
    try:
        load_task(TaskArguments(questions="q.jsonl", retriever=word, retriever_options=options), seed=0)
    except UserError:
        return 2
    return 0


def by_command(*before: str, after: tuple[str, ...] = ()) -> Callable[[str, str], int]:
    def run(word: str, options: str) -> int:
        with contextlib.suppress(SystemExit):
            return main([*before, word, *after, "--retriever_options", options])
        raise AssertionError("argparse refused it")

    return run


ASKED = ("--device", "cpu")
COMMANDS: dict[str, Callable[[str, str], int]] = {
    "search": by_command("search", after=("who?",)),
    "serve": by_command("serve", after=("--port", "0")),
    "chat": by_command("chat", "tiny", "who?", *ASKED, "--retriever"),
    "eval": by_command("eval", "tiny", "--datasets", "q.jsonl", "--output", "out", *ASKED, "--retriever"),
    "eval-retriever": by_command("eval-retriever", after=("--datasets", "q.jsonl")),
    "recipe": by_recipe,
}
WORDS = {
    "wiki": Searched("bm25", {"index": "wiki"}),
    "./wiki": Searched("bm25", {"index": "wiki"}),
    "~/wiki": Searched("bm25", {"index": "HOME/wiki"}),
    "ADDRESS": Searched("http", {"url": "ADDRESS"}),
    'bm25 {"index": "wiki"}': Searched("bm25", {"index": "wiki"}),
    "runs/index": Searched("bm25", {"index": "wiki", "backend": "numpy"}),
    "runs/index/checkpoint-1": Searched("bm25", {"index": "wiki", "backend": "numpy"}),
    "runs/world": Searched("bm25", {}, (300, 5)),
    "world": Searched("bm25", {}, (2000, 0)),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_word_means_the_same_in_every_command(
    command: str, place: Path, loaded: list[Searched], capsys: pytest.CaptureFixture[str]
) -> None:
    address = (place / "address").read_text()
    for written, expected in WORDS.items():
        word, _, options = written.replace("ADDRESS", address).partition(" ")
        places = {"HOME": str(place), "ADDRESS": address}
        wanted = {
            name: places.get(value, value).replace("HOME", str(place)) for name, value in expected.options.items()
        }
        loaded.clear()
        assert COMMANDS[command](word, options or "{}") == 2
        assert loaded, (word, capsys.readouterr().err)
        assert (loaded[-1].kind, loaded[-1].options, loaded[-1].world_size) == (
            expected.kind, wanted, expected.world_size,
        ), word  # fmt: skip
    assert "serving" not in capsys.readouterr().out  # it does not claim to serve before it does


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("word", ["bm52", "./nowhere", "runs/world/none", "http://127.0.0.1:9"])
def test_an_unknown_word_is_refused_before_anything_is_loaded(
    command: str, word: str, place: Path, loaded: list[Searched], capsys: pytest.CaptureFixture[str]
) -> None:
    if word.startswith("http") and command not in ("serve", "eval"):
        pytest.skip("a server is contacted only by the first search")
    assert COMMANDS[command](word, "{}") == 2
    said = capsys.readouterr()
    assert not loaded and "serving" not in said.out
    if command != "recipe":
        assert word.removeprefix("./") in said.err and "Traceback" not in said.err


@pytest.mark.parametrize(("run", "size"), [("runs/index", None), ("runs/world", (300, 5))])
def test_chat_and_eval_of_a_run_use_its_retriever(
    run: str, size: object, place: Path, loaded: list[Searched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl_search.cli.evaluation_checks.checkpoint_checks", lambda plan, devices: [])
    monkeypatch.setattr("trl_search.evaluation.run.load_tokenizer", lambda name: None)
    assert main(["chat", run, "who?"]) == 2 and loaded.pop().world_size == size
    assert main(["eval", run, "--datasets", "q.jsonl", "--output", "out"]) == 2 and loaded.pop().world_size == size


def test_a_run_without_a_recorded_retriever_is_refused_and_never_searches_the_web(
    place: Path, loaded: list[Searched], capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(place / "runs/object")
    run_folder(place / "runs/secret", retriever="web", retriever_options='{"api_key": "<redacted>"}')
    assert main(["chat", "runs/object", "who?"]) == 2
    assert "has not recorded its retriever" in capsys.readouterr().err
    assert main(["chat", "runs/secret", "who?"]) == 2
    assert "with a secret, which runs do not record" in capsys.readouterr().err and not loaded
