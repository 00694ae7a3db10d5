"""Scores from a reranking server, over either of the two common APIs.

    "jina": Jina, Cohere (v1 and v2), vLLM, Infinity
        -> {"model": "...", "query": "who founded Orlune?", "documents": ["...", "..."], "top_n": 2}
        <- {"results": [{"index": 1, "relevance_score": 0.98}, {"index": 0, "relevance_score": 0.02}], ...}
    "tei": Hugging Face's text-embeddings-inference
        -> {"query": "who founded Orlune?", "texts": ["...", "..."], "raw_scores": true, "truncate": true}
        <- [{"index": 1, "score": 4.2}, {"index": 0, "score": -3.9}]

A request holds one query and its documents, and the response must score every document once. A request that ends in a
lost connection, 429, 502, 503 or 504 is tried three times in all, since scoring changes nothing on the server. After
the last try, or on any other error, the search raises a `RetrievalError`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from trl_search.common.bounds import check_at_least, check_positive
from trl_search.common.credentials import authorization
from trl_search.common.errors import UserError, unknown_name
from trl_search.common.retrying import repeated
from trl_search.retrieval.base import (
    KEEP_ALIVE_S,
    RetrievalError,
    Unavailable,
    body_text,
    failure,
    is_address,
    read_answer,
)


class HttpScorer:
    """Queries one reranking server, with up to `concurrency` requests at a time. For the arguments see `rerank.load`.

    Raises:
        UserError: for an invalid address or option.
    """

    def __init__(
        self,
        url: str,
        *,
        api: str = "jina",
        model: str | None = None,
        batch_size: int | None = None,
        concurrency: int = 16,
        timeout_s: float = 20.0,
        token_env: str | None = None,
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        if api not in _WIRES:
            raise unknown_name("reranking api", api, _WIRES)
        if api == "tei" and model is not None:
            raise UserError(
                f"a text-embeddings-inference server has one model and no name for it; leave out {model!r}"
            )
        if not is_address(url):
            raise UserError(f"{url!r}: give the address of a reranking server, such as http://localhost:8080/rerank")
        check_at_least(1, concurrency=concurrency, batch_size=batch_size)
        check_positive(timeout_s=timeout_s)
        self._url, self._model, self._fields = url, model, dict(fields or {})
        self._request, self._read, most = _WIRES[api]
        self._batch_size = batch_size or most
        self._concurrency, self._timeout_s = concurrency, timeout_s
        self._headers = authorization(token_env)
        self._start()

    def _start(self) -> None:
        """Creates the state of one process; a forked child calls it again."""
        self._pid = os.getpid()
        # Ignore proxies of the environment: they cannot resolve the hosts of a cluster.
        self._client = httpx.Client(
            headers=self._headers,
            timeout=self._timeout_s,
            limits=httpx.Limits(max_keepalive_connections=self._concurrency, keepalive_expiry=KEEP_ALIVE_S),
            trust_env=False,
        )

    def score(self, candidates: Sequence[tuple[str, tuple[str, ...]]]) -> list[list[float]]:
        """One score for each text of each query, in order."""
        if self._pid != os.getpid():
            self._start()
        requests = [
            (row, query, texts[start : start + (self._batch_size or len(texts))])
            for row, (query, texts) in enumerate(candidates)
            for start in range(0, len(texts), self._batch_size or len(texts))
        ]
        if not requests:
            return [[] for _ in candidates]
        with ThreadPoolExecutor(min(self._concurrency, len(requests))) as pool:
            futures = [pool.submit(self._ask, query, texts) for _, query, texts in requests]
            try:
                answers = [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)  # else each remaining request would be tried three times
                raise
        scores: list[list[float]] = [[] for _ in candidates]
        for (row, _, _), answer in zip(requests, answers, strict=True):
            scores[row].extend(answer)
        return scores

    def close(self) -> None:
        self._client.close()

    def _ask(self, query: str, texts: Sequence[str]) -> list[float]:
        body = {**self._request(query, texts, self._model), **self._fields}
        content = repeated(lambda: self._post(body), on=Unavailable)
        try:
            return _in_order(self._read(json.loads(content)), len(texts))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise RetrievalError(
                f"{self._url} did not return a reranking of {len(texts)} documents "
                f"({type(error).__name__}: {error}): {body_text(content)[:200]!r}; is api right?"
            ) from error

    def _post(self, body: dict[str, Any]) -> bytes:
        started = time.monotonic()
        try:
            with self._client.stream("POST", self._url, json=body) as response:
                parts = response.iter_bytes()
                content = read_answer(parts, self._url, timeout_s=self._timeout_s, started=started)
        except httpx.TransportError as error:
            raise Unavailable(f"{self._url}: {type(error).__name__}: {error or 'connection lost'}") from error
        except httpx.DecodingError as error:
            raise RetrievalError(
                f"{self._url}: the answer is not compressed as its Content-Encoding says ({error})"
            ) from error
        if response.status_code == 200:
            return content
        said = body_text(content)[:300]
        raise failure(response.status_code, f"{self._url} answered {response.status_code}: {said}")


def _jina_request(query: str, texts: Sequence[str], model: str | None) -> dict[str, Any]:
    body: dict[str, Any] = {"query": query, "documents": list(texts), "top_n": len(texts)}
    return body if model is None else {"model": model, **body}


def _jina_scores(answer: Any) -> list[tuple[int, float]]:
    return [(row["index"], row["relevance_score"]) for row in answer["results"]]


def _tei_request(query: str, texts: Sequence[str], _model: str | None) -> dict[str, Any]:
    # raw_scores: after a sigmoid all good passages would score 1.0. truncate: one long passage would fail the search.
    return {"query": query, "texts": list(texts), "raw_scores": True, "truncate": True}


def _tei_scores(answer: Any) -> list[tuple[int, float]]:
    return [(row["index"], row["score"]) for row in answer]


def _in_order(scored: list[tuple[int, float]], count: int) -> list[float]:
    """The scores in order of their indexes, each of which must occur once."""
    scores = dict(scored)
    if len(scored) != count or len(scores) != count:
        raise ValueError(f"the indexes are {[index for index, _ in scored][:40]}")
    return [float(scores[index]) for index in range(count)]


Wire = tuple[
    Callable[[str, Sequence[str], str | None], dict[str, Any]], Callable[[Any], list[tuple[int, float]]], int | None
]
_WIRES: dict[str, Wire] = {"jina": (_jina_request, _jina_scores, None), "tei": (_tei_request, _tei_scores, 32)}
