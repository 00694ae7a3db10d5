"""wiki-18 from a small hub on loopback: real downloads, cut off and resumed; real FAISS files; a real tar."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
from filelock import FileLock

from tests.support.fake_hub import COMMIT, FakeHub, fake_hub
from trl_search.common.errors import UserError
from trl_search.data.hub_download import HubFile, HubFiles, fetch, free_bytes, list_files, naming_full_disk
from trl_search.data.wiki18 import (
    ARCHIVE_BYTES,
    CORPUS,
    CORPUS_BYTES,
    PIECES,
    Wiki18Plan,
    check_wiki18,
    fetch_wiki18,
    next_commands,
    plan_wiki18,
    unpack_corpus,
)
from trl_search.data.wiki18_checks import ARCHIVE, DIM, PASSAGES
from trl_search.retrieval.corpus.published import open_jsonl
from trl_search.retrieval.dense.vectors import open_faiss_file

COUNT = 20
# The path inside the published archive.
MEMBER = "data00/jiajie_jin/flashrag_indexes/wiki_dpr_100w/wiki_dump.jsonl"
BOTH = ["corpus", "e5-flat"]
INDEX = PIECES["e5-flat"].made


def corpus_lines(ids: list[str] | None = None) -> bytes:
    ids = ids or [str(row) for row in range(COUNT)]
    rows = [{"id": identity, "contents": f'"Title {identity}"\nPassage {identity}, über Orlune.'} for identity in ids]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def tar_gz(content: bytes, name: str = MEMBER) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    return made.getvalue()


def flat_index(count: int = COUNT, dim: int = DIM, metric: type[faiss.Index] = faiss.IndexFlatIP) -> bytes:
    index = metric(dim)
    index.add(np.random.default_rng(0).normal(size=(count, dim)).astype(np.float32))
    return bytes(faiss.serialize_index(index).tobytes())


def hnsw_index() -> bytes:
    index = faiss.IndexHNSWFlat(DIM, 64, faiss.METRIC_INNER_PRODUCT)
    index.add(np.random.default_rng(0).normal(size=(COUNT, DIM)).astype(np.float32))
    return bytes(faiss.serialize_index(index).tobytes())


FLAT, HNSW = flat_index(), hnsw_index()
CUT = 40_000  # where the index is split into two parts
PUBLISHED = {
    PIECES["corpus"].repository: {"README.md": b"wiki-18", ARCHIVE: tar_gz(corpus_lines())},
    PIECES["e5-flat"].repository: {"part_aa": FLAT[:CUT], "part_ab": FLAT[CUT:], ".gitattributes": b"part_*"},
    PIECES["e5-hnsw"].repository: {"part_aa": HNSW[:CUT], "part_ab": HNSW[CUT:]},
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published corpus of these tests has `COUNT` passages."""
    for module in ("wiki18", "wiki18_checks"):
        monkeypatch.setattr(f"trl_search.data.{module}.PASSAGES", COUNT)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    # The default is to write 10 MB at a time, more than these files have.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    with fake_hub({repository: dict(files) for repository, files in PUBLISHED.items()}) as hub:
        yield hub


def get(hub: FakeHub, folder: Path, what: list[str]) -> Wiki18Plan:
    planned = plan_wiki18(what, folder, endpoint=hub.url)
    fetch_wiki18(planned, endpoint=hub.url)
    return planned


def unfinished(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.incomplete"))


def test_corpus_and_indexes_are_fetched_joined_unpacked_and_checked(hub: FakeHub, tmp_path: Path) -> None:
    get(hub, tmp_path, [*BOTH, "e5-hnsw"])
    assert (tmp_path / INDEX).read_bytes() == FLAT
    assert (tmp_path / "e5_HNSW64.index").read_bytes() == HNSW
    assert (tmp_path / CORPUS).read_bytes() == corpus_lines()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "e5_Flat.index", "e5_HNSW64.index", CORPUS, ARCHIVE, f"{CORPUS}.offsets.npy",
    ]  # fmt: skip
    # as the dense retriever opens them
    rows, vectors = open_jsonl(tmp_path / CORPUS), open_faiss_file(tmp_path / INDEX, device="cpu")
    assert len(rows) == vectors.count == COUNT and rows[7].title == "Title 7"
    assert open_faiss_file(tmp_path / "e5_HNSW64.index").count == COUNT

    asked = len(hub.ranges)
    again = get(hub, tmp_path, BOTH)
    assert len(hub.ranges) == asked and again.download_bytes == again.disk_bytes == 0
    assert "e5_Flat.index is there" in again.describe()


def test_a_cut_connection_is_resumed_at_the_same_byte(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut_after = [10_500]
    get(hub, tmp_path, ["e5-flat"])
    assert (tmp_path / INDEX).read_bytes() == FLAT
    assert hub.ranges == [("part_aa", ""), ("part_aa", "bytes=10000-"), ("part_ab", "")]


@pytest.mark.parametrize(("cuts", "kept", "on"), [
    ([10_500], 10_000, [("part_aa", "bytes=10000-"), ("part_ab", "")]),
    ([CUT, 5_500], CUT + 5_000, [("part_ab", "bytes=5000-")]),
])  # fmt: skip
def test_a_failed_download_is_resumed_in_another_process(
    hub: FakeHub, tmp_path: Path, cuts: list[int], kept: int, on: list[tuple[str, str]]
) -> None:
    hub.cut_after, hub.broken = list(cuts), True
    with pytest.raises(UserError, match=r"wiki-18-e5-index: the hub did not answer .*500.* run this again to resume"):
        get(hub, tmp_path, ["e5-flat"])
    assert not (tmp_path / INDEX).exists() and unfinished(tmp_path)[0].stat().st_size == kept
    hub.broken = False
    asked = len(hub.ranges)
    planned = plan_wiki18(["e5-flat"], tmp_path, endpoint=hub.url)
    assert planned.download_bytes == len(FLAT) - kept and "are here already: it goes on" in planned.describe()
    fetch_wiki18(planned, endpoint=hub.url)
    assert hub.ranges[asked:] == on
    assert (tmp_path / INDEX).read_bytes() == FLAT and not unfinished(tmp_path)


def test_a_server_that_ignores_the_range_does_not_damage_the_first_part(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut_after, hub.ignores_ranges = [CUT, 5_500], True
    get(hub, tmp_path, ["e5-flat"])
    assert [name for name, _ in hub.ranges] == ["part_aa", "part_ab", "part_ab"]
    assert (tmp_path / INDEX).read_bytes() == FLAT


def test_content_that_differs_from_the_hubs_is_downloaded_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.wrong_bytes = {"part_ab"}
    with pytest.raises(
        UserError, match=r"part_ab of PeterJinGo/wiki-18-e5-index differs from the hub's file .by its SHA-256"
    ):
        get(hub, tmp_path, ["e5-flat"])
    assert not (tmp_path / INDEX).exists() and unfinished(tmp_path)[0].stat().st_size == CUT
    hub.wrong_bytes = set()
    get(hub, tmp_path, ["e5-flat"])
    assert (tmp_path / INDEX).read_bytes() == FLAT
    assert [name for name, _ in hub.ranges] == ["part_aa", "part_ab", "part_ab"]


def test_existing_parts_are_not_downloaded(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "part_aa").write_bytes(FLAT[:CUT])
    (tmp_path / "part_ab").write_bytes(FLAT[CUT:-1])  # truncated, so not used
    (tmp_path / ARCHIVE).write_bytes(PUBLISHED[PIECES["corpus"].repository][ARCHIVE])
    planned = get(hub, tmp_path, BOTH)
    assert hub.ranges == [("part_ab", "")]
    assert (tmp_path / INDEX).read_bytes() == FLAT and (tmp_path / "part_aa").read_bytes() == FLAT[:CUT]
    (tmp_path / INDEX).unlink()
    assert planned.download_bytes == len(FLAT) - CUT, "an existing part is not downloaded"
    corpus = len(PUBLISHED[PIECES["corpus"].repository][ARCHIVE]) * CORPUS_BYTES // ARCHIVE_BYTES + 8 * COUNT
    assert planned.disk_bytes == len(FLAT) + corpus, "the index is a second copy of its parts"


def test_a_file_of_another_size_is_not_overwritten(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(FLAT[:-4])
    with pytest.raises(UserError, match=r"e5_Flat\.index has 61,481 bytes and the published file 61,485: .* Move it"):
        get(hub, tmp_path, ["e5-flat"])
    (tmp_path / ARCHIVE).write_bytes(b"mine")
    with pytest.raises(UserError, match=r"wiki-18\.jsonl\.gz has 4 bytes"):
        get(hub, tmp_path, ["corpus"])
    assert (tmp_path / INDEX).read_bytes() == FLAT[:-4] and (tmp_path / ARCHIVE).read_bytes() == b"mine"
    (tmp_path / "e5_HNSW64.index").write_bytes(HNSW[:-4])  # its header does not give its length; the hub does
    with pytest.raises(
        UserError, match=r"e5_HNSW64\.index has [\d,]+ bytes and the published file [\d,]+: .* Move it"
    ):
        plan_wiki18(["e5-hnsw"], tmp_path, endpoint=hub.url)
    assert hub.ranges == []


def test_a_download_starts_again_if_the_repository_changed(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.cut_after, hub.broken = [10_500], True
    with pytest.raises(UserError):
        get(hub, tmp_path, ["e5-flat"])
    monkeypatch.setattr("trl_search.data.wiki18_checks.PASSAGES", COUNT + 1)
    changed = flat_index(COUNT + 1)
    hub.repositories[PIECES["e5-flat"].repository] = {"part_aa": changed[:CUT], "part_ab": changed[CUT:]}
    hub.broken = False
    get(hub, tmp_path, ["e5-flat"])
    assert (tmp_path / INDEX).read_bytes() == changed


def test_two_processes_do_not_write_the_same_file(hub: FakeHub, tmp_path: Path) -> None:
    files = list_files(PIECES["e5-flat"].repository, "part_*", endpoint=hub.url)
    assert files.commit == COMMIT and [file.name for file in files.files] == ["part_aa", "part_ab"]
    target = tmp_path / INDEX
    with (
        FileLock(f"{files.unfinished(target)}.lock"),
        pytest.raises(UserError, match="another process is fetching"),
    ):
        fetch(files, target, endpoint=hub.url)


def test_too_little_disk_is_refused_before_any_download(hub: FakeHub, tmp_path: Path) -> None:
    planned = plan_wiki18(BOTH, tmp_path / "new", endpoint=hub.url)
    archive = len(PUBLISHED[PIECES["corpus"].repository][ARCHIVE])
    assert planned.download_bytes == len(FLAT) + archive
    planned.check_disk(planned.disk_bytes)
    with pytest.raises(UserError, match=r"of disk are needed in .*new and .* are free: .* Nothing was downloaded"):
        planned.check_disk(planned.disk_bytes - 1)
    assert hub.ranges == [] and not (tmp_path / "new").exists()
    assert free_bytes(tmp_path / "new" / "deep") > 0


def test_a_disk_that_fills_up_is_reported(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"the disk of .*x is full: make room and run this again"),
        naming_full_disk(tmp_path / "x"),
        open("/dev/full", "wb") as file,
    ):
        file.write(b"1")
    with pytest.raises(FileNotFoundError), naming_full_disk(tmp_path / "x"):
        (tmp_path / "x").read_bytes()


def test_the_sizes_of_the_published_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers in docs/data.md and in the help."""
    monkeypatch.setattr("trl_search.data.wiki18.PASSAGES", PASSAGES)
    part_aa, part_ab = HubFile("part_aa", 42_949_672_960, "a"), HubFile("part_ab", 21_609_402_413, "b")
    flat = HubFiles(PIECES["e5-flat"].repository, COMMIT, (part_aa, part_ab))
    assert flat.bytes == PIECES["e5-flat"].published_bytes == 45 + PASSAGES * DIM * 4
    corpus = HubFiles(PIECES["corpus"].repository, COMMIT, (HubFile(ARCHIVE, PIECES["corpus"].published_bytes, "c"),))
    planned = Wiki18Plan(tuple(BOTH), tmp_path, {"corpus": corpus, "e5-flat": flat})
    said = planned.describe()
    assert planned.disk_bytes == corpus.bytes + CORPUS_BYTES + 8 * PASSAGES + flat.bytes
    assert "download  69.7 GB" in said and "disk      84.2 GB" in said
    assert "64.6 GB of free RAM" in said and "32.3 GB free" in said and "small, 2.2 GB of RAM and 18.3 GB" in said
    assert "part_aa             42,949,672,960 bytes" in said
    alone = replace(planned, what=("corpus",), files={"corpus": corpus})
    assert "download  5.1 GB" in alone.describe() and "disk      19.7 GB" in alone.describe()


# The archive


def test_a_plain_gzip_file_is_unpacked_too(tmp_path: Path) -> None:
    (tmp_path / ARCHIVE).write_bytes(gzip.compress(corpus_lines()))
    unpack_corpus(tmp_path / ARCHIVE, tmp_path / CORPUS)
    assert (tmp_path / CORPUS).read_bytes() == corpus_lines()


def damaged(content: bytes) -> bytes:
    return content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]  # the checksum at the end of the file


@pytest.mark.parametrize("pack", [tar_gz, gzip.compress], ids=["tar", "gzip"])
@pytest.mark.parametrize("harm", [lambda content: content[: len(content) // 2], damaged], ids=["cut", "checksum"])
def test_a_damaged_archive_leaves_no_corpus(tmp_path: Path, pack, harm) -> None:
    (tmp_path / ARCHIVE).write_bytes(harm(pack(corpus_lines())))
    with pytest.raises(UserError, match=r"wiki-18\.jsonl\.gz is damaged \(.*\): delete it and run this again"):
        unpack_corpus(tmp_path / ARCHIVE, tmp_path / CORPUS)
    assert [path.name for path in tmp_path.iterdir()] == [ARCHIVE]


def test_a_tar_without_a_corpus_and_a_file_that_is_not_an_archive(tmp_path: Path) -> None:
    (tmp_path / ARCHIVE).write_bytes(tar_gz(b"hello", "readme.txt"))
    with pytest.raises(UserError, match=r"is a tar without a \.jsonl file"):
        unpack_corpus(tmp_path / ARCHIVE, tmp_path / CORPUS)
    (tmp_path / ARCHIVE).write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=r"is damaged \(Not a gzipped file"):
        unpack_corpus(tmp_path / ARCHIVE, tmp_path / CORPUS)
    assert not (tmp_path / CORPUS).exists()


def test_a_killed_unpacking_starts_again(tmp_path: Path) -> None:
    (tmp_path / ARCHIVE).write_bytes(tar_gz(corpus_lines()))
    (tmp_path / f"{CORPUS}.incomplete").write_bytes(b"x" * 100_000)
    unpack_corpus(tmp_path / ARCHIVE, tmp_path / CORPUS)
    assert (tmp_path / CORPUS).read_bytes() == corpus_lines() and not unfinished(tmp_path)


# Index and corpus


def lay(folder: Path, corpus: bytes, index: bytes = FLAT) -> Path:
    (folder / CORPUS).write_bytes(corpus)
    (folder / INDEX).write_bytes(index)
    return folder


ROWS = [str(row) for row in range(COUNT)]


@pytest.mark.parametrize(
    ("corpus", "index", "message"),
    [
        (corpus_lines(ROWS[:-1]), FLAT, r"has 19 passages and the published corpus 20: row i of an index is line i"),
        (
            corpus_lines(ROWS[::-1]),
            FLAT,
            r"line 1: the passage has id '19', and the published corpus the passage 0 there",
        ),
        (corpus_lines([*ROWS[:-1], "99"]), FLAT, r"line 20: the passage has id '99'"),
        (gzip.decompress(tar_gz(corpus_lines())), FLAT, r"is a tar, as `gzip -d wiki-18\.jsonl\.gz` leaves it"),
        (corpus_lines(), flat_index(dim=384), r"vectors of 384 dimensions under inner product; the e5 index has 768"),
        (corpus_lines(), flat_index(metric=faiss.IndexFlatL2), r"is not the FAISS file of e5-flat"),
        (corpus_lines(), HNSW, r"is not the FAISS file of e5-flat \(it begins with b'IHNf'\)"),
        (corpus_lines(), FLAT[:20], r"is not the FAISS file of e5-flat"),
        (corpus_lines(), flat_index(19), r"e5_Flat\.index holds 19 vectors and the published index 20"),
        (corpus_lines(), FLAT + b"x", r"has 61,486 bytes and the published file 61,485"),
    ],
    ids=["fewer", "sorted", "other-id", "tar", "dimensions", "metric", "kind", "head", "vectors", "length"],
)
def test_a_corpus_and_an_index_that_do_not_match(tmp_path: Path, corpus: bytes, index: bytes, message: str) -> None:
    lay(tmp_path, corpus, index)
    with pytest.raises(UserError, match=message):
        check_wiki18(BOTH, tmp_path)
    assert (tmp_path / CORPUS).read_bytes() == corpus and (tmp_path / INDEX).read_bytes() == index


def test_an_index_is_compared_with_the_corpus_in_its_folder(tmp_path: Path) -> None:
    check_wiki18(["e5-flat"], lay(tmp_path, corpus_lines()))
    lay(tmp_path, corpus_lines(ROWS[:-1]))
    (tmp_path / f"{CORPUS}.offsets.npy").unlink()
    with pytest.raises(UserError, match="has 19 passages"):
        check_wiki18(["e5-flat"], tmp_path)
    with pytest.raises(UserError, match=r"there is no .*wiki-18\.jsonl: fetch it with trl-search data wiki18"):
        check_wiki18(["corpus"], tmp_path / "empty")


def test_a_corpus_alone_is_compared_with_the_published_one(tmp_path: Path) -> None:
    def said(corpus: bytes) -> str:
        (tmp_path / f"{CORPUS}.offsets.npy").unlink(missing_ok=True)
        (tmp_path / CORPUS).write_bytes(corpus)
        return check_wiki18(["corpus"], tmp_path)["corpus"]

    with pytest.raises(UserError, match="has 2 passages and the published corpus 20"):
        said(corpus_lines(["0"]) + b"no JSON\n")
    with pytest.raises(UserError, match="line 1: the passage has id '19'"):
        said(corpus_lines(ROWS[::-1]))
    with pytest.raises(UserError, match="line 20"):
        said(corpus_lines(ROWS[:-1]) + b"no JSON\n")
    assert said(corpus_lines()) == "20 passages, and the ids of 20 of them; not compared with the hub"


def test_only_real_checks_are_reported(hub: FakeHub, tmp_path: Path) -> None:
    """The header of an HNSW file does not give the length of the file."""
    index = tmp_path / "e5_HNSW64.index"
    index.write_bytes(HNSW[:100])
    with pytest.raises(UserError, match=r"has 100 bytes and its vectors alone take 61,440: it was cut short"):
        check_wiki18(["e5-hnsw"], tmp_path)
    index.write_bytes(HNSW[:-4])
    said = check_wiki18(["e5-hnsw"], tmp_path)["e5-hnsw"]
    assert said.endswith("no shorter than they are; the graph was not looked at; not compared with the hub")
    index.write_bytes(HNSW)
    (tmp_path / ARCHIVE).write_bytes(PUBLISHED[PIECES["corpus"].repository][ARCHIVE])
    planned = plan_wiki18([*BOTH, "e5-hnsw"], tmp_path, endpoint=hub.url)
    checked = fetch_wiki18(planned, endpoint=hub.url)
    assert {word: said.split("; ")[-1] for word, said in checked.items()} == {
        "corpus": "size of the archive as on the hub",
        "e5-flat": "SHA-256 as on the hub",
        "e5-hnsw": "size as on the hub",
    }


def test_the_next_commands_are_printed(tmp_path: Path) -> None:
    assert next_commands(tmp_path)[0].startswith("trl-search data wiki18 --what corpus --output ")
    (tmp_path / CORPUS).write_bytes(corpus_lines())
    assert next_commands(tmp_path)[0].startswith(f"trl-search index --corpus {tmp_path / CORPUS} --kind bm25")
    (tmp_path / INDEX).write_bytes(FLAT)
    assert f'"faiss_file": "{tmp_path / INDEX}"' in next_commands(tmp_path)[0]


# The hub


def test_a_changed_hub_is_reported(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown part of wiki-18 'bm25'.* There are: corpus, e5-flat, e5-hnsw"):
        plan_wiki18(["bm25"], tmp_path, endpoint=hub.url)
    hub.repositories[PIECES["e5-flat"].repository] = {"index.bin": b"1"}
    with pytest.raises(UserError, match=r"no longer holds part_\*, but: index\.bin"):
        plan_wiki18(["e5-flat"], tmp_path, endpoint=hub.url)
    del hub.repositories[PIECES["e5-flat"].repository]
    with pytest.raises(UserError, match=r"PeterJinGo/wiki-18-e5-index is no longer on the hub, or is private"):
        plan_wiki18(["e5-flat"], tmp_path, endpoint=hub.url)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file: give a folder"):
        plan_wiki18(["corpus"], tmp_path / "file", endpoint=hub.url)


def test_without_a_network_the_error_says_so(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"(?s)the hub did not answer.*downloads are: corpus 5\.1 GB, e5-flat 64\.6"):
        plan_wiki18(BOTH, tmp_path, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, so the hub is not used"):
        plan_wiki18(BOTH, tmp_path, endpoint=hub.url)
    planned = plan_wiki18(BOTH, lay(tmp_path, corpus_lines()), endpoint=hub.url)  # complete, so it needs no hub
    checked = fetch_wiki18(planned, endpoint=hub.url)
    assert all(said.endswith("; not compared with the hub") for said in checked.values())
