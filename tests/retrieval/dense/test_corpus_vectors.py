"""Encoding a corpus gives the same bytes when it is killed and resumed, and when several processes share it."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.encoders import save_random_bert
from tests.support.forked import ForkedProcess
from tests.support.two_ranks import run_ranks
from trl_search.common.errors import UserError
from trl_search.retrieval.corpus.passages import join_contents
from trl_search.retrieval.dense import corpus_vectors as encoding
from trl_search.retrieval.dense.corpus_vectors import DONE, VECTORS, encode_corpus
from trl_search.retrieval.dense.encoder import Encoder, load_encoder
from trl_search.retrieval.index.folder import MANIFEST, build_index, read_manifest
from trl_search.retrieval.index.workers import Workers
from trl_search.types import Passage

ROOT = Path(__file__).parents[3]
PASSAGES = tuple(
    Passage(str(row), f"Title {row}", "harbour town " * (row * 7 % 23) + f"lantern {row}") for row in range(50)
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_bert(tmp_path_factory.mktemp("checkpoints") / "e5-base-v2")


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> Encoder:
    return load_encoder(checkpoint, device="cpu")


@pytest.fixture
def one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_jsonl(path: Path, count: int) -> Path:
    rows = (
        {"id": str(row), "contents": f'"T{row}"\nharbour {row} ' + "town " * (row * 7 % 19)} for row in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_each_row_is_the_vector_of_its_passage(tmp_path: Path, encoder: Encoder, dtype: str) -> None:
    vectors = encode_corpus(PASSAGES, encoder, tmp_path / "s", dtype=dtype, shard_rows=16, batch_size=4)
    expected = encoder.encode_passages([join_contents(passage) for passage in PASSAGES])
    assert vectors.dtype == dtype and isinstance(vectors, np.memmap)
    assert np.abs(vectors.astype(np.float32) - expected).max() < (1e-6 if dtype == "float32" else 1e-3)


@pytest.mark.parametrize("dies_at", range(1, 9))
def test_an_encoding_killed_anywhere_is_resumed_to_the_same_bytes(
    tmp_path: Path, encoder: Encoder, dies_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encode_corpus(PASSAGES, encoder, tmp_path / "whole", shard_rows=16)
    to_disk, calls = encoding._to_disk, 0

    def die(file: object) -> None:
        nonlocal calls
        calls += 1
        if calls == dies_at:
            raise KeyboardInterrupt
        to_disk(file)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoding, "_to_disk", die)
        encode_corpus(PASSAGES, encoder, tmp_path / "cut", shard_rows=16)
    done = (tmp_path / "cut" / DONE).read_bytes().count(1)
    assert done == dies_at // 2  # an unfinished shard is encoded again unless its done byte is set
    encoded: list[int] = []
    encode = encoder.encode_passages
    monkeypatch.setattr(
        encoder, "encode_passages", lambda texts, **rest: encoded.append(len(texts)) or encode(texts, **rest)
    )
    again = encode_corpus(PASSAGES, encoder, tmp_path / "cut", shard_rows=16)
    assert len(encoded) == 4 - done
    assert np.array_equal(again, whole)
    assert (tmp_path / "cut" / VECTORS).read_bytes() == (tmp_path / "whole" / VECTORS).read_bytes()


def test_another_encoder_or_option_starts_again_with_a_message(
    tmp_path: Path, encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trl_search")
    for batch_size in (8, 8, 4):
        encode_corpus(PASSAGES, encoder, tmp_path / "s", shard_rows=16, batch_size=batch_size)
    said = caplog.messages
    assert said[0] == "4 of 4 shards are already encoded"
    assert "encoding again" in said[1] and len(said) == 2


def test_two_workers_encode_each_shard_once(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "wait", lambda self: None)
    whole = encode_corpus(PASSAGES, encoder, tmp_path / "whole", shard_rows=16)
    for rank, done in ((0, b"\1\0\1\0"), (1, b"\1\1\1\1")):
        vectors = encode_corpus(PASSAGES, encoder, tmp_path / "s", shard_rows=16, workers=Workers(rank, 2))
        assert (tmp_path / "s" / DONE).read_bytes() == done
    assert np.array_equal(vectors, whole)


def test_a_vector_that_is_not_finite_names_its_passage(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        encoder,
        "encode_passages",
        lambda texts, **_: np.array([[1e6 if "lantern 7" in text else 0.0] * 32 for text in texts]),
    )
    with pytest.raises(UserError, match="passage '7' was encoded to a vector with NaN or infinity"):
        encode_corpus(PASSAGES, encoder, tmp_path / "s", dtype="float16", shard_rows=16)


def test_too_little_disk_is_reported_before_any_work(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shutil import _ntuple_diskusage

    monkeypatch.setattr("shutil.disk_usage", lambda path: _ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"encoding needs 0\.0 GB of disk.* dtype float16"):
        encode_corpus(PASSAGES, encoder, tmp_path / "s")


# Real processes

SHARD_ROWS = 200


def same_bytes(one: Path, other: Path) -> None:
    """The content of every file, without the times in them."""
    assert read_manifest(one).files.keys() == read_manifest(other).files.keys()
    for name in read_manifest(one).files:
        if name.endswith("vectors.json"):
            first, second = (json.loads((folder / name).read_text()) for folder in (one, other))
            assert {**first, "build_s": 0} == {**second, "build_s": 0}
        else:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slow
def test_a_killed_build_is_resumed_to_the_same_bytes(
    tmp_path: Path, checkpoint: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", 1500)
    command = ["index", "--corpus", str(corpus), "--kind", "dense", "--encoder", str(checkpoint)]
    process = ForkedProcess(
        "tests.support.shared_build",
        [*command, "--output", str(tmp_path / "index")],
        environment={**os.environ, "CUDA_VISIBLE_DEVICES": "", "COUNTS": str(tmp_path), "SHARD_ROWS": "64"},
        log=tmp_path / "build.log",
    )
    journal = tmp_path / ".index.building" / "scratch" / DONE
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(1) >= 3):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "index").exists()
    assert 3 <= journal.read_bytes().count(1) < 24, "it was killed too late for this test"
    monkeypatch.setitem(encode_corpus.__kwdefaults__, "shard_rows", 64)
    said: list[str] = []
    build_index(corpus, tmp_path / "index", "dense", announce=said.append, encoder=str(checkpoint))
    assert said[0] == f"resuming the build in {tmp_path / '.index.building'}"
    build_index(corpus, tmp_path / "whole", "dense", encoder=str(checkpoint))
    same_bytes(tmp_path / "index", tmp_path / "whole")
    assert not (tmp_path / ".index.building").exists()


@pytest.mark.slow
def test_two_processes_build_one_index(
    tmp_path: Path, checkpoint: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", SHARD_ROWS + 100)
    (tmp_path / "counts").mkdir()
    command = ["index", "--corpus", str(corpus), "--kind", "dense", "--encoder", str(checkpoint)]
    said = run_ranks(
        "tests.support.shared_build",
        [*command, "--output", str(tmp_path / "index")],
        tmp_path,
        environment={"COUNTS": str(tmp_path / "counts"), "SHARD_ROWS": str(SHARD_ROWS)},
    )
    # Only one process prints the plan and the measurements.
    assert [text.count("recall@3") for text in said] == [2, 0]
    assert {file.name: int(file.read_text()) for file in (tmp_path / "counts").iterdir()} == {
        "0": SHARD_ROWS,
        "1": 100,
    }
    monkeypatch.setitem(encode_corpus.__kwdefaults__, "shard_rows", SHARD_ROWS)
    build_index(corpus, tmp_path / "alone", "dense", encoder=str(checkpoint))
    same_bytes(tmp_path / "index", tmp_path / "alone")
    assert (tmp_path / "index" / MANIFEST).exists()


@pytest.mark.parametrize(("tokens", "said"), [(32, "% of the passages are longer than the 32 tokens"), (200, None)])
def test_a_build_warns_of_passages_that_the_encoder_truncates(
    tmp_path: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture, tokens: int, said: str | None
) -> None:
    build_index(PASSAGES, tmp_path / "index", "dense", encoder=str(checkpoint), max_length=tokens)
    warned = [record.getMessage() for record in caplog.records if "longer than" in record.getMessage()]
    assert bool(warned) == bool(said) and all(str(said) in one for one in warned)
