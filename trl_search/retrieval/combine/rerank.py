"""Reranks the passages of another retriever with a model that reads query and passage together.

    load_retriever("rerank", retriever={"kind": "bm25", "index": "indexes/wiki"},
                   model="cross-encoder/ms-marco-MiniLM-L6-v2")                          # on this machine
    load_retriever("rerank", retriever={...}, url="http://localhost:8080/rerank", api="tei")     # on a server

For each query, `depth` passages are fetched (or k, if that is more), and the best k of them are returned with the
reranker's scores. Each query is scored against its own passages only. Equal scores keep the retriever's order. A
reranker cannot add passages: raise `depth` for recall.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from trl_search.common.bounds import check_at_least
from trl_search.common.errors import UserError
from trl_search.common.extras import import_extra
from trl_search.common.hub import only_cached
from trl_search.common.vocabulary import refuse_empty_tokenizer
from trl_search.retrieval.base import RetrievalError, Retriever, check_search
from trl_search.retrieval.combine.parts import Part, load_parts
from trl_search.retrieval.combine.rerank_http import HttpScorer
from trl_search.retrieval.dense.encoder import loading_model
from trl_search.types import Passage

DEPTH = 20
# Scores of a local model are rounded, because batching changes their last bits and must not change a ranking.
DECIMALS = 4
MAX_QUERY_CHARS = 2_000  # a question has a hundred; a very long query would be tokenized once per passage

Candidates = tuple[str, tuple[str, ...]]  # a query, and the texts found for it


class Scorer(Protocol):
    """Scores texts for queries; higher is better. Thread-safe."""

    def score(self, candidates: Sequence[Candidates]) -> list[list[float]]:
        """One score for each text of each query, in order."""

    def close(self) -> None: ...


class RerankRetriever(Retriever):
    """Reorders what another retriever finds."""

    def __init__(self, retriever: Retriever, scorer: Scorer, *, depth: int = DEPTH) -> None:
        check_at_least(1, depth=depth)
        self._retriever, self._scorer, self._depth = retriever, scorer, depth

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        check_search(queries, k)
        self._check_open()
        if not queries:
            return []
        found = self._retriever.search(queries, max(k, self._depth))
        asked = [row for row, passages in enumerate(found) if passages]
        scored = self._scorer.score([_candidates(queries[row], found[row]) for row in asked])
        reranked: list[list[Passage]] = [[] for _ in queries]
        for row, scores in zip(asked, scored, strict=True):
            if not all(map(math.isfinite, scores)):
                # The message omits the query: servers log failures, and queries must not be logged.
                raise RetrievalError(
                    f"the reranker returned a score that is not a finite number for query {row + 1} of "
                    f"{len(queries)}; check its model"
                )
            best = sorted(zip(scores, found[row], strict=True), key=lambda scored: -scored[0])[:k]
            reranked[row] = [replace(passage, score=score) for score, passage in best]
        return reranked

    def take_metrics(self) -> dict[str, float]:
        return self._retriever.take_metrics()

    def close(self) -> None:
        super().close()
        self._scorer.close()
        self._retriever.close()


class CrossEncoderScorer:
    """A cross-encoder of sentence-transformers, run on this machine. All pairs of a search are scored in one call.

    Scores are the model's rounded logits: after a sigmoid, which many models apply, all good passages would score 1.0.
    For the arguments see [`load`].

    Raises:
        UserError: if the model cannot be loaded or is not a reranker.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        check_at_least(1, batch_size=batch_size)
        library = import_extra("sentence_transformers", "a local reranker", "dense", "; or name a server: url=")
        local = only_cached(model)
        with loading_model(f"the reranker {model!r}"):
            self.model = library.CrossEncoder(
                model,
                device=device,
                max_length=max_length,
                trust_remote_code=trust_remote_code,
                local_files_only=local,
            )
        refuse_empty_tokenizer(self.model.tokenizer, model)
        if self.model.num_labels != 1:
            raise UserError(
                f"{model!r} gives {self.model.num_labels} numbers per pair, and a reranker gives one; choose a model "
                "trained for reranking, such as cross-encoder/ms-marco-MiniLM-L6-v2"
            )
        self._batch_size = batch_size
        self._lock = threading.Lock()  # fast tokenizers raise if two threads use them at once

    def score(self, candidates: Sequence[Candidates]) -> list[list[float]]:
        import torch

        # A repeated pair is scored once, so that copies of a passage score the same to the bit and keep their order.
        pairs = list(dict.fromkeys((query, text) for query, texts in candidates for text in texts))
        if not pairs:
            return []
        with self._lock:
            logits = self.model.predict(
                pairs, batch_size=self._batch_size, show_progress_bar=False, activation_fn=torch.nn.Identity()
            )
        scores = {pair: round(float(logit), DECIMALS) for pair, logit in zip(pairs, logits, strict=True)}
        return [[scores[query, text] for text in texts] for query, texts in candidates]

    def close(self) -> None:
        """Does nothing: no resources are held."""


def load(
    *,
    retriever: Part,
    model: str | None = None,
    url: str | None = None,
    depth: int = DEPTH,
    device: str | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    trust_remote_code: bool | None = None,
    api: str | None = None,
    concurrency: int | None = None,
    timeout_s: float | None = None,
    token_env: str | None = None,
    fields: Mapping[str, Any] | None = None,
) -> RerankRetriever:
    """`load_retriever("rerank", ...)`: with a model, or with a server.

    Args:
        retriever (`Retriever` or `dict`): Finds the candidates: a retriever, or its kind with its options.
        model (`str`, *optional*): A cross-encoder: a name on the hub or a folder. With `url`, the name of the model on
            the server.
        url (`str`, *optional*): The whole address of a server's endpoint: "http://localhost:8080/rerank".
        depth (`int`): Candidates per query, or k if that is larger.
        device (`str`, *optional*): Of a local model: "cuda:1", "cpu"; by default a GPU if there is one.
        batch_size (`int`, *optional*): Pairs per forward pass of a local model, 32 by default; or documents per
            request to a server, by default all of a query ("tei": 32, the default limit of its servers).
        max_length (`int`, *optional*): Of a local model: tokens that a pair is truncated to; by default the model's
            limit.
        trust_remote_code (`bool`, *optional*): Of a local model: runs Python code from its checkpoint.
        api (`str`, *optional*): The API of the server: "jina" (Jina, Cohere, vLLM, Infinity; the default) or "tei".
        concurrency (`int`, *optional*): Concurrent requests to the server, 16 by default.
        timeout_s (`float`, *optional*): Seconds until a request counts as failed, 20 by default.
        token_env (`str`, *optional*): The environment variable that holds the server's bearer token.
        fields (`Mapping`, *optional*): Extra fields of each request to the server: `{"truncate_prompt_tokens": -1}`
            for vLLM.

    Raises:
        UserError: for options that cannot be combined.
    """
    check_at_least(1, depth=depth)
    remote = {"api": api, "concurrency": concurrency, "timeout_s": timeout_s, "token_env": token_env, "fields": fields}
    local = {"device": device, "max_length": max_length, "trust_remote_code": trust_remote_code}
    if model is None and url is None:
        raise UserError('rerank needs model="cross-encoder/..." or url="http://.../rerank"')
    misplaced = [name for name, value in (remote if url is None else local).items() if value is not None]
    if misplaced:
        of = "a server, and there is no url" if url is None else "a local model, and url names a server"
        raise UserError(f"{', '.join(misplaced)}: of {of}")
    scorer: Scorer
    if url is not None:
        scorer = HttpScorer(url, model=model, batch_size=batch_size, **_given(remote))
    else:
        assert model is not None
        scorer = CrossEncoderScorer(model, **_given({**local, "batch_size": batch_size}))
    (part,) = load_parts([retriever], "rerank")
    return RerankRetriever(part, scorer, depth=depth)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _candidates(query: str, found: Sequence[Passage]) -> Candidates:
    texts = (passage.titled_text if passage.title else passage.text for passage in found)
    return _clean(query[:MAX_QUERY_CHARS]), tuple(map(_clean, texts))


def _clean(text: str) -> str:
    """The text without lone surrogates, which tokenizers and JSON reject."""
    return text.encode("utf-8", "replace").decode("utf-8")
