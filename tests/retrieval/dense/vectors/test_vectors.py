"""Vector indexes: files that FAISS can read, settings chosen by measurement, sizes known in advance."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from trl_search.common.errors import UserError
from trl_search.retrieval.base import RetrievalError
from trl_search.retrieval.dense.vectors import (
    VECTOR_INDEXES,
    build_vectors,
    faiss_module,
    open_faiss_file,
    open_vectors,
    plan,
)
from trl_search.retrieval.dense.vectors import build as build_module
from trl_search.retrieval.dense.vectors import open as open_module
from trl_search.retrieval.dense.vectors.calibrate import apply_settings, find_truth, make_queries
from trl_search.retrieval.dense.vectors.faiss_setup import kernels
from trl_search.retrieval.dense.vectors.plans import factory_of
from trl_search.retrieval.dense.vectors.search import read_faiss

COUNT, DIM = 8_000, 96


def mixture(count: int, dim: int, seed: int) -> np.ndarray:
    """Unit vectors in clusters, with a spread that decreases by dimension, like embeddings."""
    random = np.random.default_rng(seed)
    spread = 1 / np.sqrt(np.arange(1, dim + 1))
    centres = np.random.default_rng(99).standard_normal((60, dim)) * spread
    drawn = centres[random.integers(60, size=count)] + 0.75 * spread * random.standard_normal((count, dim))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def exact(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-(queries.astype(np.float64) @ vectors.T.astype(np.float64)), axis=1, kind="stable")[:, :k]


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return mixture(COUNT, DIM, seed=0)


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return mixture(100, DIM, seed=1)


@pytest.fixture(scope="module")
def folders(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for word in VECTOR_INDEXES:
        made[word] = tmp_path_factory.mktemp(word)
        build_vectors(made[word], vectors, index=word)
    return made


@pytest.fixture(params=VECTOR_INDEXES)
def word(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def about(folder: Path) -> dict[str, object]:
    told = json.loads((folder / "vectors.json").read_text())
    assert isinstance(told, dict)
    return told


def test_an_index_finds_what_exact_search_finds(word, folders, vectors, queries):
    index = open_vectors(folders[word])
    truth = find_truth(vectors, queries)
    recall = truth.recall(vectors, index.search(queries, 3)[1])
    assert recall >= {"flat": 1.0, "fp16": 0.99}.get(word, 0.92)
    assert about(folders[word])["recall_at_3"] >= {"flat": 1.0, "fp16": 0.99, "int8": 0.94}.get(word, 0.93)
    index.close()


def test_the_file_equals_the_one_that_faiss_writes(word, folders, vectors, queries, tmp_path):
    faiss = faiss_module()
    theirs = faiss.index_factory(DIM, factory_of(word, COUNT), faiss.METRIC_INNER_PRODUCT)
    if word == "small-ivf":
        faiss.extract_index_ivf(theirs.base_index).cp.seed = 1
    theirs.train(vectors)
    if word == "small":
        theirs.base_index.train(vectors * np.float32(0.99))
    theirs.add(vectors)
    ours = read_faiss(folders[word] / "vectors.index")
    settings = {name: about(folders[word])[name] for name in ("k_factor", "nprobe") if name in about(folders[word])}
    for index in (ours, theirs):
        apply_settings(index, settings)
    agree = (ours.search(queries, 5)[1] == theirs.search(queries, 5)[1]).mean()
    # k-means and graphs depend on threads, and other tests run beside this one.
    assert agree >= {"small-ivf": 0.9, "hnsw": 0.9}.get(word, 1.0)
    if word in ("flat", "int8", "small"):
        apply_settings(theirs, {"k_factor": 1} if word == "small" else {})
        faiss.write_index(theirs, str(tmp_path / "theirs"))
        assert (tmp_path / "theirs").read_bytes() == (folders[word] / "vectors.index").read_bytes()


def test_a_file_gives_the_same_results_every_time(word, folders, queries):
    one, other = open_vectors(folders[word]), open_vectors(folders[word])
    for first, second in zip(one.search(queries, 10), other.search(queries, 10), strict=True):
        np.testing.assert_array_equal(first, second)


def test_the_chosen_setting_is_used(folders, queries):
    for name in ("small", "small-ivf", "hnsw"):
        chosen = about(folders[name])
        index = open_vectors(folders[name]).index
        if name == "hnsw":
            assert index.hnsw.efSearch == chosen["efSearch"]
        else:
            assert index.k_factor == chosen["k_factor"] > 1
        if name == "small-ivf":
            assert faiss_module().extract_index_ivf(index.base_index).nprobe == chosen["nprobe"] > 1


def test_a_higher_recall_target_chooses_a_slower_setting(vectors, tmp_path, caplog):
    low = build_vectors(tmp_path, vectors, index="small", target_recall=0.7)
    high = build_vectors(tmp_path, vectors, index="small", target_recall=0.93)
    assert low["k_factor"] < high["k_factor"]
    assert 0.7 <= low["recall_at_3"] < high["recall_at_3"]
    assert not caplog.records
    build_vectors(tmp_path, vectors, index="small", target_recall=1.1)
    assert "not 1.10" in caplog.text


def test_generated_queries_are_seeded_and_close_to_the_vectors(vectors):
    np.testing.assert_array_equal(make_queries(vectors, 3), make_queries(vectors, 3))
    assert (make_queries(vectors, 3) != make_queries(vectors, 4)).any()
    # With isotropic noise of this size, only the original row would have a cosine above zero.
    second = np.sort(make_queries(vectors, 3) @ vectors.T, axis=1)[:, -2]
    assert np.median(second) > 0.5


def test_recall_counts_duplicates_as_one_another(vectors):
    twice = np.concatenate([vectors[:50], vectors[:50]])
    truth = find_truth(twice, vectors[:10])
    own, copy = exact(vectors[:50], vectors[:10], 2)[:, 0], exact(vectors[:50], vectors[:10], 2)[:, 0] + 50
    third = exact(vectors[:50], vectors[:10], 2)[:, 1]
    assert truth.recall(twice, np.stack([own, copy, third + 50], axis=1)) == 1.0
    assert truth.recall(twice, np.stack([own, own, own], axis=1)) == pytest.approx(1 / 3)


def test_the_plan_is_the_size_on_disk(word, folders):
    size = (folders[word] / "vectors.index").stat().st_size
    assert size == pytest.approx(plan(word, COUNT, DIM).disk_bytes, rel=0.03)


def test_the_plan_at_scale_agrees_with_the_documentation():
    million = {word: plan(word, 1_000_000, 768) for word in VECTOR_INDEXES}
    assert million["flat"].disk_bytes == pytest.approx(3.07e9, rel=0.01)
    assert million["small"].ram_bytes <= 110e6
    assert million["small"].disk_bytes == pytest.approx(872e6, rel=0.01)
    assert million["small-ivf"].disk_bytes == pytest.approx(906e6, rel=0.02)
    assert plan("fp16", 21_000_000, 768).gpu_bytes == pytest.approx(32.3e9, rel=0.01)
    told = plan("small", 21_000_000, 768).describe()
    assert re.search(r"^small \(RaBitQfs,.*RAM 2\.2 GB, disk 18\.3 GB, build about .*recall@3", told)
    with pytest.raises(UserError, match="did you mean 'small'"):
        plan("smal", 10, 10)


def test_results_always_have_the_same_shape(word, folders, queries):
    index = open_vectors(folders[word])
    assert (index.dim, index.count) == (DIM, COUNT)
    for batch in (1, 7, 64):
        scores, rows = index.search(queries[:batch], 4)
        assert (scores.shape, scores.dtype, rows.shape, rows.dtype) == ((batch, 4), np.float32, (batch, 4), np.int64)
        assert (np.diff(scores, axis=1) <= 0).all()
    assert index.search(queries[:0], 4)[1].shape == (0, 4)
    strided = np.asfortranarray(np.repeat(queries, 2, axis=0).astype(np.float64))[::2]
    np.testing.assert_array_equal(index.search(strided, 3)[1], index.search(queries, 3)[1])
    index.close()
    index.close()
    with pytest.raises(RetrievalError, match="closed"):
        index.search(queries, 1)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_k_may_exceed_the_number_of_vectors(word, count, tmp_path, vectors):
    build_vectors(tmp_path, vectors[:count], index=word)
    for batch in (1, 20):
        scores, rows = open_vectors(tmp_path).search(vectors[:1].repeat(batch, axis=0), count + 5)
        assert (rows[:, count:] == -1).all() and (scores[:, count:] == -np.inf).all()
        assert rows[0, 0] == 0
        if word not in ("small-ivf", "hnsw"):
            assert (np.sort(rows[:, :count], axis=1) == np.arange(count)).all()


def test_a_corpus_of_identical_vectors(word, tmp_path, vectors):
    build_vectors(tmp_path, vectors[[5] * 300], index=word)
    assert (open_vectors(tmp_path).search(vectors[4:6], 3)[1] >= 0).all()


def test_bad_queries_are_refused(folders):
    index = open_vectors(folders["flat"])
    with pytest.raises(RetrievalError, match="NaN"):
        index.search(np.full((2, DIM), np.nan), 3)


def test_threads_may_search_concurrently(word, folders, queries):
    index = open_vectors(folders[word])
    alone = [index.search(queries[start : start + 10], 3) for start in range(0, 100, 10)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda start: index.search(queries[start : start + 10], 3), range(0, 100, 10)))
    for (_, one), (_, other) in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_equal_scores_are_ordered_by_row(tmp_path):
    """Whole numbers: their float32 sum is the same in any order and on any number of threads."""
    rng = np.random.default_rng(5)
    copies = rng.integers(0, 250, (1000, DIM)).astype(np.float32)
    copies[0], copies[[7, 500, 501, 502]] = 0, 255  # the full range of int8 in every dimension
    queries = rng.integers(1, 3, (16, DIM)).astype(np.float32)
    for name in ("flat", "fp16", "int8"):
        build_vectors(tmp_path, copies, index=name)
        for batch in (1, 16):
            scores, rows = open_vectors(tmp_path).search(queries[:batch], 4)
            assert (scores == scores[:, :1]).all()
            assert rows.tolist() == [[7, 500, 501, 502]] * batch


def test_fp16_vectors_and_memory_maps_are_accepted(vectors, queries, tmp_path):
    np.save(tmp_path / "half.npy", vectors.astype(np.float16))
    build_vectors(tmp_path, np.load(tmp_path / "half.npy", mmap_mode="r"), index="fp16")
    half = vectors.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(open_vectors(tmp_path).search(queries, 3)[1], exact(half, queries, 3))


def test_bad_vectors_are_refused(vectors, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="float64"):
        build_vectors(tmp_path, vectors.astype(np.float64), index="flat")
    with pytest.raises(UserError, match="not empty"):
        build_vectors(tmp_path, vectors[:0], index="flat")
    broken = vectors[:100].copy()
    broken[17, 3] = np.nan
    for name in VECTOR_INDEXES:
        with pytest.raises(UserError, match="vector 17 holds NaN"):
            build_vectors(tmp_path, broken, index=name)
    with pytest.raises(UserError, match=r"beyond what .* stores; normalise"):
        build_vectors(tmp_path, vectors[:100] * 1e6, index="fp16")
    monkeypatch.setattr(build_module, "available_ram_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"needs .* of memory and 0\.0 MB are free"):
        build_vectors(tmp_path, vectors, index="hnsw")


def test_damage_is_named(folders, vectors, tmp_path):
    with pytest.raises(UserError, match="no finished vector index"):
        open_vectors(tmp_path)
    (tmp_path / "vectors.json").write_bytes((folders["small"] / "vectors.json").read_bytes())
    whole = (folders["small"] / "vectors.index").read_bytes()
    (tmp_path / "vectors.index").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut short"):
        open_vectors(tmp_path)
    (tmp_path / "vectors.index").write_bytes((folders["flat"] / "vectors.index").read_bytes())
    (tmp_path / "vectors.json").write_text(json.dumps({**about(folders["flat"]), "count": 7}))
    with pytest.raises(UserError, match="says 7"):
        open_vectors(tmp_path)


def published(path: Path, vectors: np.ndarray, metric: str) -> None:
    faiss = faiss_module()
    index = faiss.index_factory(DIM, "Flat", getattr(faiss, metric))
    index.add(vectors)
    faiss.write_index(index, str(path))


def test_a_published_flat_file_opens_unchanged(vectors, queries, tmp_path):
    for metric, sign in (("METRIC_INNER_PRODUCT", 1), ("METRIC_L2", -1)):
        published(tmp_path / "e5_Flat.index", vectors, metric)
        index = open_faiss_file(tmp_path / "e5_Flat.index")
        scores, rows = index.search(queries, 3)
        np.testing.assert_array_equal(rows, exact(vectors, queries, 3))
        assert (sign * scores[:, 0] > 0).all()
    (tmp_path / "page.html").write_text("<html>")
    with pytest.raises(UserError, match="not a FAISS file"):
        open_faiss_file(tmp_path / "page.html")
    with pytest.raises(UserError, match="there is no FAISS file"):
        open_faiss_file(tmp_path / "missing.index")


MAPPED = """
import sys, time
from pathlib import Path
import numpy as np
from trl_search.retrieval.dense.vectors import open_faiss_file, open_vectors, faiss_module
def resident():
    lines = [line.split() for line in open("/proc/self/status")]
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[0].startswith("Rss")}
faiss_module()
path = Path(sys.argv[1])
before = resident()
index = open_faiss_file(path, device="cpu") if path.is_file() else open_vectors(path, device="cpu")
opened = resident()
index.search(np.ones((1, index.dim)), 3)
searched = resident()
print([opened[key] - before[key] for key in ("RssAnon", "RssFile")], searched["RssAnon"] - before["RssAnon"])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_vectors_stay_in_the_file_when_opened_and_searched(tmp_path):
    faiss = faiss_module()
    vectors = mixture(10_000, 768, seed=0)  # 31 MB in fp32
    index = faiss.IndexFlatIP(768)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "flat.index"))
    (tmp_path / "small").mkdir()
    build_vectors(tmp_path / "small", vectors, index="small")
    for path, kept in ((tmp_path / "flat.index", 0), (tmp_path / "small", 10_000 * 104)):
        told = subprocess.run([sys.executable, "-c", MAPPED, str(path)], capture_output=True, text=True, check=True)
        (anonymous, mapped), searched = (
            json.loads(part) for part in told.stdout.strip().replace("] ", "]\n").split("\n")
        )
        assert mapped < 4e6
        assert anonymous < kept + 4e6
        # The codes and the buffers of FAISS and OpenBLAS; the 8 to 31 MB of rows stay in the file.
        assert searched < kept + 24e6


BLAS = """
import os
from trl_search.retrieval.dense.vectors import faiss_module
print(faiss_module().cvar.distance_compute_blas_threshold, os.environ.get("OPENBLAS_CORETYPE"))
"""


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="faiss is built with another BLAS")
def test_openblas_uses_the_kernels_for_this_processor():
    flags = set(re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[0].split())
    for given in (None, "Nehalem"):
        environment = {**os.environ, "OPENBLAS_VERBOSE": "2", "OPENBLAS_CORETYPE": given or ""}
        if given is None:
            del environment["OPENBLAS_CORETYPE"]
        told = subprocess.run(
            [sys.executable, "-c", BLAS], capture_output=True, text=True, check=True, env=environment
        )
        # numpy's OpenBLAS prints first, FAISS's last. The user's setting is kept; ours is removed again.
        cores = re.findall(r"Core: (\w+)", told.stdout + told.stderr)
        assert cores[-1] == given or (given is None and cores[-1] == kernels(flags))
        assert told.stdout.splitlines()[-1] == f"20 {given}"


def test_which_kernels_a_processor_gets():
    assert kernels({"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}) == "SkylakeX"
    assert kernels({"avx2", "fma", "avx512f"}) == "Haswell"  # Xeon Phi
    assert kernels({"sse4_2"}) is None


def test_without_faiss_the_error_names_the_extras(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install .trl-search\[faiss\]"):
        faiss_module()


def test_a_graph_larger_than_memory_is_refused_and_a_flat_file_gives_a_warning(folders, monkeypatch, caplog):
    monkeypatch.setattr(open_module, "available_ram_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"a graph of .* searched in memory"):
        open_vectors(folders["hnsw"])
    open_vectors(folders["flat"], device="cpu")
    assert "searches will wait for the disk" in caplog.text


def test_a_published_graph_is_searched_with_good_recall_and_custom_ids_are_refused(tmp_path):
    faiss = faiss_module()
    vectors = np.random.default_rng(0).standard_normal((5000, 96)).astype(np.float32)
    graph = faiss.IndexHNSWFlat(96, 16, faiss.METRIC_INNER_PRODUCT)
    graph.add(vectors)
    assert graph.hnsw.efSearch == 16
    faiss.write_index(graph, str(tmp_path / "graph.index"))
    found = open_faiss_file(tmp_path / "graph.index", device="cpu").search(vectors[:200], 3)[1]
    exact = np.argsort(-(vectors[:200] @ vectors.T), axis=1)[:, :3]
    as_it_was = graph.search(vectors[:200], 3)[1]
    recall, low = (
        np.mean([len({*a} & {*b}) / 3 for a, b in zip(rows, exact, strict=True)]) for rows in (found, as_it_was)
    )
    assert recall > 0.97 and recall > low + 0.02
    mapped = faiss.IndexIDMap(faiss.IndexFlatIP(96))
    mapped.add_with_ids(vectors[:100], np.arange(1000, 1100))
    faiss.write_index(mapped, str(tmp_path / "mapped.index"))
    with pytest.raises(UserError, match="maps its rows to its own ids"):
        open_faiss_file(tmp_path / "mapped.index")


def test_a_published_graph_larger_than_memory_is_refused(folders, monkeypatch):
    monkeypatch.setattr(open_module, "available_ram_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"a graph of .* searched in memory"):
        open_faiss_file(folders["hnsw"] / "vectors.index")


@pytest.mark.parametrize("factory", ["IVF128,Flat", "PCA24,IVF128,PQ12x4fs", "IVF128,RaBitQ"])
def test_a_published_ivf_index_is_searched_in_several_lists(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, factory: str
) -> None:
    faiss, vectors = faiss_module(), mixture(4_000, 32, 3)
    index = faiss.index_factory(32, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "ivf.index"))
    faiss.extract_index_ivf(index).nprobe = 128
    exact = index.search(vectors[:100], 10)[1]
    with caplog.at_level("INFO"):
        found = open_faiss_file(tmp_path / "ivf.index", device="cpu").search(vectors[:100], 10)[1]
    recall = np.mean([len(set(one) & set(other)) / 10 for one, other in zip(found, exact, strict=True)])
    assert recall > 0.9
    assert re.search(r"128 lists, nprobe \d+ of them are searched", caplog.text)
    one = open_faiss_file(tmp_path / "ivf.index", device="cpu", nprobe=1).search(vectors[:100], 10)[1]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(one, exact, strict=True)]) < recall


def test_search_effort_is_an_option_of_approximate_indexes(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="nprobe is an option of an IVF"):
        open_vectors(folders["flat"], device="cpu", nprobe=3)
    with pytest.raises(UserError, match="ef_search=0 must be at least 1"):
        open_vectors(folders["hnsw"], device="cpu", ef_search=0)
    assert open_vectors(folders["hnsw"], device="cpu", ef_search=77).index.hnsw.efSearch == 77  # type: ignore[attr-defined]
