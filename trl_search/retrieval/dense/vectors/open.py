"""`open_vectors` and `open_faiss_file` open an index on disk as a `VectorSearch`, in seconds whatever its size.

With `device="auto"`, `flat` and `fp16` are searched on the GPUs if the rows fit; the log says so, or says why not. All
other types are searched on CPU, mapped from the file.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trl_search.common.bounds import check_at_least
from trl_search.common.errors import UserError
from trl_search.common.files import read_object
from trl_search.retrieval.dense.vectors.build import ABOUT, VECTORS
from trl_search.retrieval.dense.vectors.calibrate import apply_settings, choose_nprobe, find_ivf
from trl_search.retrieval.dense.vectors.faiss_gpu import open_with_faiss, require_faiss_gpu
from trl_search.retrieval.dense.vectors.faiss_setup import faiss_module
from trl_search.retrieval.dense.vectors.gpu import check_gpu_memory, free_gpu_bytes, open_on_gpus
from trl_search.retrieval.dense.vectors.plans import plan
from trl_search.retrieval.dense.vectors.search import (
    FaissSearch,
    VectorSearch,
    available_ram_bytes,
    gb,
    read_faiss,
    stored_rows,
)

_SETTINGS = ("nprobe", "k_factor", "efSearch")
# Graph files of FAISS say 16, with recall@3 .6 on the published e5_HNSW64.index; this value reaches .97.
FILE_EF_SEARCH = 512
logger = logging.getLogger(__name__)


def open_vectors(
    folder: Path,
    *,
    device: str = "auto",
    gpu_engine: str = "torch",
    nprobe: int | None = None,
    ef_search: int | None = None,
) -> VectorSearch:
    """Opens an index of `build_vectors`, with the settings that it chose. The options are those of the retriever
    (`load`); they replace the settings, and a GPU that is asked for is never replaced by the CPU.

    Raises:
        UserError: if the index is missing, unfinished or damaged.
    """
    path = folder / VECTORS
    if not (folder / ABOUT).is_file():
        raise UserError(f"{folder} holds no finished vector index ({ABOUT} is missing); build it again")
    about = read_object(folder / ABOUT, "build it again")
    index = _open_index(path)
    if (index.d, index.ntotal) != (about["dim"], about["count"]):
        raise UserError(
            f"{path} holds {index.ntotal:,} x {index.d}, {ABOUT} says {about['count']:,} x {about['dim']}; "
            "build it again"
        )
    apply_settings(index, {name: about[name] for name in _SETTINGS if name in about})
    _apply_given(path, index, nprobe, ef_search)
    return _place(path, index, device, gpu_engine)


def open_faiss_file(
    path: Path,
    *,
    device: str = "auto",
    gpu_engine: str = "torch",
    nprobe: int | None = None,
    ef_search: int | None = None,
) -> VectorSearch:
    """Opens any FAISS file without conversion, such as the published `e5_Flat.index`, memory-mapped if its type allows
    it. The log states the search settings of an IVF or a graph. The scores of L2 are negated distances. Options as for
    `open_vectors`.

    Raises:
        UserError: if the file is missing, or its metric or row ids are not supported.
    """
    if not path.is_file():
        raise UserError(f"there is no FAISS file {path}")
    index = _open_index(path)
    faiss = faiss_module()
    if isinstance(index, faiss.IndexIDMap):
        raise UserError(
            f"{path} maps its rows to its own ids; only indexes whose rows are in corpus order can be searched"
        )
    _apply_given(path, index, nprobe, ef_search)
    ivf = find_ivf(index)
    if isinstance(index, faiss.IndexHNSW):
        if ef_search is None:
            index.hnsw.efSearch = max(index.hnsw.efSearch, FILE_EF_SEARCH)
        logger.info("%s: a graph, searched with ef_search %d", path, index.hnsw.efSearch)
    elif ivf is not None:
        recall = None
        if nprobe is None and ivf.nprobe == 1:
            ivf.nprobe, recall = choose_nprobe(ivf)
        measured = f", recall@10 {recall:.2f} of a search of all" if recall is not None else ""
        logger.info("%s: %d lists, nprobe %d of them are searched%s", path, ivf.nlist, ivf.nprobe, measured)
    if index.metric_type not in (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2):
        raise UserError(f"{path} has FAISS metric {index.metric_type}; only inner product and L2 are supported")
    return _place(path, index, device, gpu_engine)


def _apply_given(path: Path, index: Any, nprobe: int | None, ef_search: int | None) -> None:
    for name, value, there in (
        ("nprobe", nprobe, find_ivf(index) is not None),
        ("ef_search", ef_search, isinstance(index, faiss_module().IndexHNSW)),
    ):
        if value is None:
            continue
        check_at_least(1, **{name: value})
        if not there:
            raise UserError(
                f"{name} is an option of {'an IVF' if name == 'nprobe' else 'a graph'}, which {path} is not"
            )
        apply_settings(index, {"efSearch" if name == "ef_search" else name: value})


def _open_index(path: Path) -> Any:
    if path.is_file() and path.stat().st_size > available_ram_bytes() and _is_graph(path):
        raise UserError(
            f"{path} is a graph of {gb(path.stat().st_size)}, searched in memory, and {gb(available_ram_bytes())} "
            "are free"
        )
    faiss_module()
    try:
        return read_faiss(path)
    except RuntimeError as error:
        told = str(error).strip().splitlines()[-1]
        raise UserError(f"{path} is not a FAISS file that this FAISS reads, or it is cut short: {told}") from None


def _is_graph(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(3) == b"IHN"  # an HNSW file of FAISS begins with IHNf, IHNs, ...


def _place(path: Path, index: Any, device: str, gpu_engine: str) -> VectorSearch:
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is 'auto', 'cpu' or 'cuda', not {device!r}")
    if gpu_engine not in ("torch", "faiss"):
        raise UserError(f"gpu_engine is 'torch' or 'faiss', not {gpu_engine!r}")
    if gpu_engine == "faiss":
        if device == "cpu":
            raise UserError(
                "gpu_engine='faiss' searches on GPUs, and device='cpu' excludes them: leave one of them out"
            )
        require_faiss_gpu()
        device = "cuda"
    rows = stored_rows(path, index)
    faiss = faiss_module()
    exact = rows is not None and index.metric_type == faiss.METRIC_INNER_PRODUCT
    free = free_gpu_bytes() if device != "cpu" else []
    if device == "cuda":
        if not free:
            raise UserError("device='cuda' and torch finds no GPU; use device='cpu'")
        if not exact:
            raise UserError("only flat and fp16 indexes (inner product) are searched on GPUs; use device='cpu'")
    if free and exact and rows is not None and (device == "cuda" or _has_room(rows, free)):
        logger.info("%s: %s rows to GPU memory as fp16", path, f"{len(rows):,}")
        return open_with_faiss(rows) if gpu_engine == "faiss" else open_on_gpus(rows)
    size = path.stat().st_size
    if isinstance(index, faiss.IndexFlat | faiss.IndexScalarQuantizer) and size > available_ram_bytes():
        logger.warning(
            "each search reads all of %s (%s), and memory holds %s: searches will wait for the disk; index 'small' "
            "needs %s",
            path,
            gb(size),
            gb(available_ram_bytes()),
            gb(plan("small", int(index.ntotal), int(index.d)).ram_bytes),
        )
    return FaissSearch(index)


def _has_room(rows: np.ndarray, free: Sequence[int]) -> bool:
    try:
        check_gpu_memory(len(rows), int(rows.shape[1]), free)
    except UserError as error:
        logger.warning("searching on CPU: %s", error)
        return False
    return True
