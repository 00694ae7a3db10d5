"""`trl-search serve`: its messages, what it refuses before it starts, and that it serves an index and ends cleanly."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.support.ports import free_port
from trl_search.cli.main import main
from trl_search.config.searched import Searched
from trl_search.retrieval.index.folder import build_index
from trl_search.types import Passage


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "index"
    build_index([Passage("1", "Orlune", "Orlune is a harbour town."), Passage("2", "Vesk", "A country.")], folder)
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["serve", *words]) == 2
    return capsys.readouterr().err


def test_it_serves_an_index_prints_example_requests_and_ends_cleanly(index: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    command = [sys.executable, "-m", "trl_search", "serve", str(index), "--port", "0"]
    command += ["--retriever-options", '{"backend": "numpy"}', "--token_file", str(tmp_path / "token")]
    command += ["--passages-per-query", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        loading, first, ready, _, curl = (server.stdout.readline() for _ in range(5))
        assert re.fullmatch(rf"serving bm25 from {index} at http://127\.0\.0\.1:\d+, with a token\n", first)
        assert loading == f"loading bm25 from {index} ...\n" and ready.startswith("ready after ")
        url = first.split(" at ")[1].split(",")[0]
        assert f"curl -s {url}/retrieve" in curl and "$TRL_SEARCH_TOKEN" in curl
        assert httpx.post(f"{url}/retrieve", json={"query": "harbour"}).status_code == 401
        headers = {"Authorization": "Bearer s3cret"}
        found = httpx.post(f"{url}/retrieve", json={"query": "harbour country"}, headers=headers).json()
        assert [document["id"] for document in found["result"][0]] in (["1"], ["2"])
        assert len(httpx.get(f"{url}/health").json()["fingerprint"]) == 16
        server.terminate()
        written, logged = server.communicate(timeout=200)
    assert server.returncode == 0 and written.endswith("stopped; what was under way is answered\n")
    assert '"status":200' in logged and "s3cret" not in first + curl + written + logged


def test_it_serves_on_when_nobody_reads_its_messages(index: Path) -> None:
    """A launcher that read the first line and closed the pipe ended the server, with status 0."""
    port = free_port()
    command = [sys.executable, "-m", "trl_search", "serve", str(index), "--port", str(port), "--no_access_log"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdout.readline().startswith("loading bm25")
        server.stdout.close()
        while server.poll() is None and not is_ready(f"http://127.0.0.1:{port}"):
            time.sleep(0.05)
        assert httpx.post(f"http://127.0.0.1:{port}/retrieve", json={"query": "harbour"}).status_code == 200
        server.terminate()
        assert (server.wait(timeout=200), server.stderr.read() if server.stderr else "") == (0, "")


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").is_success
    except httpx.TransportError:
        return False


def test_it_listens_to_other_machines_only_on_request(
    index: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TRL_SEARCH_TOKEN", raising=False)
    said = refusal(capsys, str(index), "--host", "0.0.0.0")
    assert "TRL_SEARCH_TOKEN" in said and "--allow_anonymous" in said
    (tmp_path / "token").write_text(" \n")
    said = refusal(capsys, str(index), "--token-file", str(tmp_path / "token"))
    assert f"the token from the file {tmp_path / 'token'} must be printable ASCII and not empty" in said
    (tmp_path / "token").write_bytes(b"\xff\xfes3cret")
    assert "must be printable ASCII" in refusal(capsys, str(index), "--token-file", str(tmp_path / "token"))
    monkeypatch.setenv("TRL_SEARCH_TOKEN", "")
    assert "not empty" in refusal(capsys, str(index), "--host", "0.0.0.0")


def test_mistakes_are_reported_in_one_line(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in refusal(capsys, "./nowhere")
    served = [str(index), "--port", "0"]
    assert "default_topk" in refusal(capsys, *served, "--passages_per_query", "0")
    assert "could never be answered" in refusal(capsys, *served, "--max-queued", "5")
    assert refusal(capsys, *served, "--max_batch", "0").endswith("error: max_batch=0 must be at least 1\n")
    assert "choose another" in refusal(capsys, str(index), "--port", "70000")
    assert "'bm52' is not a retriever" in refusal(capsys, "bm52", "--port", "0")
    assert "--retriever_options is not JSON" in refusal(capsys, *served, "--retriever_options", "backend=numpy")
    assert capsys.readouterr().out == ""  # it does not claim to serve before it does


def test_a_rebuilt_index_has_another_fingerprint(index: Path, tmp_path: Path, monkeypatch) -> None:
    from trl_search.cli.commands.serve import fingerprint_of

    build_index([Passage("1", "Orlune", "Orlune has burnt down.")], tmp_path / "index")

    def fingerprint(folder: Path) -> str:
        return fingerprint_of(Searched("bm25", {"index": str(folder)}))

    assert fingerprint(index) == fingerprint(index) != fingerprint(tmp_path / "index")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fingerprint(Path("~/index")) == fingerprint(tmp_path / "index")
    assert fingerprint_of(Searched("bm25", {}, (300, 1))) != fingerprint_of(Searched("bm25", {}, (300, 2)))
