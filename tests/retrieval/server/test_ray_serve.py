"""`trl-search serve --ray`: a real Ray cluster on this machine, two replicas, and one that is killed under load.

The tests share one server and run in order; the one with SIGTERM stops it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from trl_search.cli.main import main
from trl_search.common.errors import UserError
from trl_search.retrieval import RetrievalError, load_retriever

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'trl-search[ray]'"),
]

# A custom kind, found through its entry point: slow enough that a replica is always busy.
SLOW_KIND = """
import time
from trl_search.retrieval.base import Retriever
from trl_search.types import Passage

class Slow(Retriever):
    def search(self, queries, k):
        time.sleep(0.1)
        return [[Passage(f"{q}-{rank}", "", q, score=1.0 - rank) for rank in range(k)] for q in queries]

def load(*, fails: bool = False):
    if fails:
        raise RuntimeError("the index is on another machine")
    return Slow()
"""


@dataclass(frozen=True)
class Served:
    url: str
    process: subprocess.Popen[str]
    log: Path

    def replicas(self) -> list[psutil.Process]:
        """The running processes of the server's replicas."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if process.name().startswith("ray::ServeRepli") and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that can import the slow kind."""
    (folder / "slow_kind.py").write_text(SLOW_KIND)
    info = folder / "slow_kind-1.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slow_kind\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[trl_search.retrievers]\nslow = slow_kind:load\n")
    return {**os.environ, "PYTHONPATH": str(folder), "TRL_SEARCH_TOKEN": "s3cret"}


COMMAND = [sys.executable, "-m", "trl_search", "serve", "slow", "--ray", "--port", "0", "--replica_cpus", "0.5"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("ray")
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [*COMMAND, "--cache_mb", "0"], stdout=subprocess.PIPE, stderr=log, text=True, env=environment(folder)
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("serving"):
                yield Served(line.split(" at ")[1].split(",")[0], process, folder / "log")
                break
        else:
            raise AssertionError((folder / "log").read_text()[-3000:])
        if process.poll() is None:
            process.kill()
        process.stdout.close()
        process.wait()


HEADERS = {"Authorization": "Bearer s3cret"}


@pytest.fixture
def client(served: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOKEN_OF_THE_TEST", "s3cret")
    retriever = load_retriever("http", url=served.url, token_env="TOKEN_OF_THE_TEST")
    yield retriever
    retriever.close()


def wait_for(condition, seconds: float = 300.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def test_it_behaves_like_the_server_of_one_process(served: Served) -> None:
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", served.url)
    asked = {"queries": ["a", "b"], "topk": 2, "return_scores": True}
    assert httpx.post(f"{served.url}/retrieve", json=asked).status_code == 401
    found = httpx.post(f"{served.url}/retrieve", json=asked, headers=HEADERS).json()
    assert [[hit["document"]["id"] for hit in hits] for hits in found["result"]] == [["a-0", "a-1"], ["b-0", "b-1"]]
    refused = httpx.post(f"{served.url}/retrieve", json={"queries": ["a"], "topk": "x"}, headers=HEADERS)
    assert (refused.status_code, refused.json()["field"]) == (422, "topk")
    large = b'{"queries": ["' + b"x" * (17 << 20) + b'"]}'
    assert httpx.post(f"{served.url}/retrieve", content=large, headers=HEADERS, timeout=200).status_code == 413
    assert httpx.get(f"{served.url}/health").json()["serves"] == "slow"
    assert httpx.get(f"{served.url}/ready").json() == {"ready": True}


def test_each_replica_batches_requests_and_metrics_cover_all_replicas(served: Served, client) -> None:
    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda number: client.search([f"q{number}"], 1)[0][0].id, range(96)))
    assert found == [f"q{number}-0" for number in range(96)]
    assert httpx.get(f"{served.url}/metrics").status_code == 401
    text = httpx.get(f"{served.url}/metrics", headers=HEADERS).text

    def by_replica(metric: str) -> dict[str, float]:
        return {name: float(value) for name, value in re.findall(rf'^{metric}{{replica="(\w+)"}} (\S+)$', text, re.M)}

    queries, batches = by_replica("trl_search_queries_total"), by_replica("trl_search_batches_total")
    assert len(queries) == 2 and min(queries.values()) > 10
    assert sum(queries.values()) >= 2 * sum(batches.values())
    assert text.count("# TYPE trl_search_queries_total counter") == 1


def test_a_killed_replica_fails_no_request(served: Served, client) -> None:
    before = wait_for(lambda: len(served.replicas()) == 2 and served.replicas())
    until = time.monotonic() + 8
    stopping = threading.Event()

    def ask(thread: int) -> int:
        asked = 0
        while time.monotonic() < until and not stopping.is_set():
            query = f"{thread}-{asked}"
            try:
                (found,) = client.search([query], 2)
            except RetrievalError:
                stopping.set()
                raise
            assert [passage.text for passage in found] == [query, query]
            asked += 1
        return asked

    with ThreadPoolExecutor(16) as pool:
        asking = [pool.submit(ask, thread) for thread in range(16)]
        time.sleep(1)
        before[0].kill()
        asked = [future.result() for future in asking]
    metrics = client.take_metrics()
    assert min(asked) >= 1 and metrics["retrieval/retries"] >= 1, "no request was affected: the test killed nothing"
    after = wait_for(lambda: len(served.replicas()) == 2 and served.replicas())
    assert before[0].pid not in {replica.pid for replica in after}
    # The new replica also answers: metrics are from two replicas.
    wait_for(lambda: httpx.get(f"{served.url}/metrics", headers=HEADERS).text.count("trl_search_ready{") == 2)


def test_on_sigterm_it_answers_running_requests(served: Served) -> None:
    children = psutil.Process(served.process.pid).children(recursive=True)
    answers: list[tuple[float, int | None]] = []  # time of the request, status or None for a lost connection
    gone = threading.Event()

    def ask() -> None:
        with httpx.Client(headers=HEADERS, timeout=200) as client:
            while not gone.is_set():
                asked = time.monotonic()
                try:
                    status = client.post(f"{served.url}/retrieve", json={"query": "last"}).status_code
                except httpx.TransportError:
                    status = None
                    gone.set()
                answers.append((asked, status))

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask) for _ in range(8)]
        wait_for(lambda: len(answers) > 20)
        served.process.terminate()
        told = time.monotonic()
        for future in asking:
            future.result()
    # On a busy machine a request may reach its replica after the signal; earlier ones are never lost.
    assert {200} <= {status for asked, status in answers if asked < told} <= {200, 503}
    # Clients retry these elsewhere. Ray's own 404 would be final.
    assert {status for asked, status in answers if asked >= told} <= {200, 503, None}
    assert served.process.stdout is not None
    assert served.process.stdout.read().endswith("stopped; what was under way is answered\n")
    assert served.process.wait(200) == 0
    psutil.wait_procs(children, timeout=100)
    assert not [process for process in children if process.is_running()]
    log = served.log.read_text()
    assert '"status":200' in log and "s3cret" not in log


def test_a_retriever_that_cannot_be_loaded_ends_the_server_with_the_reason(tmp_path: Path) -> None:
    command = [*COMMAND, "--replicas", "1", "--retriever_options", '{"fails": true}']
    ended = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), timeout=600)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("trl-search: error: the replicas did not start: ")
    assert "the index is on another machine" in ended.stderr.splitlines()[-1]


def test_mistakes_are_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from trl_search.retrieval.server.ray_serve import RayConfig

    assert main(["serve", "bm25", "--ray", "--replicas", "0"]) == 2
    assert "replicas=0 must be at least 1" in capsys.readouterr().err
    with pytest.raises(UserError, match="must be a finite number above 0"):
        RayConfig(cpus=0)
