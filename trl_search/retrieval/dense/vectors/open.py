"""`open_vectors` and `open_faiss_file`: an index on disk becomes a `VectorSearch`, in seconds whatever its size.

Where an index is searched, with `device="auto"`: `flat` and `fp16` on the GPUs when they are there and have room (a
log line says so, and why not), all else on CPU, mapped from the file.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from trl_search.common.errors import UserError
from trl_search.retrieval.dense.vectors.build import ABOUT, VECTORS
from trl_search.retrieval.dense.vectors.calibrate import apply_settings
from trl_search.retrieval.dense.vectors.faiss_setup import faiss_module
from trl_search.retrieval.dense.vectors.gpu import check_gpu_memory, free_gpu_bytes, gpu_engine, open_on_gpus
from trl_search.retrieval.dense.vectors.plans import plan
from trl_search.retrieval.dense.vectors.search import FaissSearch, VectorSearch, available_ram_bytes, gb
from trl_search.retrieval.dense.vectors.sliced import SlicedSearch, read_faiss, stored_rows

_SETTINGS = ("nprobe", "k_factor", "efSearch")
# FAISS' files of graphs say 16, which finds .6 of the exact three; this finds .97 (HNSW64, RETRIEVAL.md).
FILE_EF_SEARCH = 512
logger = logging.getLogger(__name__)


def open_vectors(folder: Path, *, device: str = "auto") -> VectorSearch:
    """Opens what `build_vectors` made, at the setting that it chose.

    Args:
        folder (`Path`): With `vectors.index` and `vectors.json`.
        device (`str`): `"auto"`, `"cpu"`, or `"cuda"`, which refuses instead of going to CPU.
    """
    path = folder / VECTORS
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no finished vector index, there is no {ABOUT}; build it again") from None
    except ValueError as error:
        raise UserError(f"{folder / ABOUT} is damaged ({error}); build it again") from None
    index = _open_index(path)
    if (index.d, index.ntotal) != (about["dim"], about["count"]):
        raise UserError(
            f"{path} holds {index.ntotal:,} x {index.d}, {ABOUT} says {about['count']:,} x {about['dim']}; "
            "build it again"
        )
    apply_settings(index, {name: about[name] for name in _SETTINGS if name in about})
    return _place(path, index, device, max_norm=about["max_norm"])


def open_faiss_file(path: Path, *, device: str = "auto") -> VectorSearch:
    """Opens any FAISS file as it is, such as the published `e5_Flat.index`; no conversion, mapped where its type
    allows.

    Args:
        path (`Path`): The file; inner product or L2 (whose scores are the distances, negated).
        device (`str`): As for `open_vectors`.
    """
    if not path.is_file():
        raise UserError(f"there is no FAISS file {path}")
    index = _open_index(path)
    faiss = faiss_module()
    if isinstance(index, faiss.IndexIDMap):
        raise UserError(f"{path} maps its rows to ids of its own; only rows in the order of the corpus are served")
    if isinstance(index, faiss.IndexHNSW):
        index.hnsw.efSearch = max(index.hnsw.efSearch, FILE_EF_SEARCH)
        logger.info("%s: a graph, searched with efSearch %d", path, index.hnsw.efSearch)
    if index.metric_type not in (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2):
        raise UserError(f"{path} has FAISS metric {index.metric_type}; inner product and L2 are searched here")
    return _place(path, index, device, max_norm=None)


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
        return file.read(3) == b"IHN"  # IHNf, IHNs, ...: what FAISS begins the file of an HNSW index with


def _place(path: Path, index: Any, device: str, *, max_norm: float | None) -> VectorSearch:
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is 'auto', 'cpu' or 'cuda', not {device!r}")
    rows = stored_rows(path, index)
    exact = rows is not None and rows.dtype != np.uint8 and index.metric_type == faiss_module().METRIC_INNER_PRODUCT
    engine = gpu_engine() if device != "cpu" else None
    if device == "cuda":
        if engine is None:
            raise UserError("device='cuda' and neither torch nor faiss-gpu finds a GPU; use device='cpu'")
        if not exact:
            raise UserError("only flat and fp16 indexes (inner product) are searched on GPUs; use device='cpu'")
    if engine is not None and exact and rows is not None and (device == "cuda" or _has_room(rows, engine)):
        logger.info("%s: %s rows to GPU memory as fp16, by %s", path, f"{len(rows):,}", engine)
        return open_on_gpus(rows, engine=engine)
    size = path.stat().st_size
    if rows is not None and size > available_ram_bytes():
        logger.warning(
            "%s is read whole by each search and has %s, of which memory holds %s: searches will wait for the disk; "
            "index 'small' needs %s",
            path,
            gb(size),
            gb(available_ram_bytes()),
            gb(plan("small", len(rows), rows.shape[1]).ram_bytes),
        )
    if rows is not None and rows.dtype != np.float32 and max_norm is not None:
        return SlicedSearch(index, rows, max_norm)
    mapped = size if rows is not None else _refining_bytes(index)
    return FaissSearch(index, mapped_bytes=mapped, host_bytes=size - mapped)


def _refining_bytes(index: Any) -> int:
    """Bytes of the rows that refine a result; they stay in the file."""
    refine = getattr(index, "refine_index", None)
    return int(refine.sa_code_size() * refine.ntotal) if refine is not None else 0


def _has_room(rows: np.ndarray, engine: str) -> bool:
    try:
        check_gpu_memory(len(rows), int(rows.shape[1]), free_gpu_bytes(engine))
    except UserError as error:
        logger.warning("searching on CPU: %s", error)
        return False
    return True
