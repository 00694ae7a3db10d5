"""The wire protocol of trainers for search agents, `POST /retrieve`, as pure functions for server and client.

Search-R1 defined it; verl, SkyRL, slime and ASearcher copied it with variants. docs/serving.md describes those of a
request, all of which are supported, as are responses with `title`, `text` and `url`, or without ids.

Invalid messages raise a `WireError` that names the field and has an HTTP status: 400 if it is not JSON, 413 if it
exceeds the limits, 422 if a field is missing or wrong, 502 if an answer is not of this protocol.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl_search.common.bounds import check_minima
from trl_search.common.errors import UserError
from trl_search.common.files import NotJSON, parse_json
from trl_search.retrieval.corpus.passages import split_contents
from trl_search.types import Passage

_LONE_SURROGATES = dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


class WireError(ValueError):
    """A request or a response does not follow the protocol. `status` is the HTTP status to answer with, `field` the
    field at fault ("topk", "queries[3]") or, for the body itself, `None`."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.status, self.field = status, field


@dataclass(frozen=True)
class Limits:
    """Limits of one request. The defaults admit a whole training step of 2,560 rollouts in one request.

    Args:
        max_queries (`int`): Queries per request.
        max_query_chars (`int`): Characters per query; a question has a hundred.
        max_topk (`int`): Passages per query.
        max_body_bytes (`int`): Size of a request, enforced while it is read.
        default_topk (`int`): Passages per query if the request does not say.
    """

    max_queries: int = 10_000
    max_query_chars: int = 20_000
    max_topk: int = 100
    max_body_bytes: int = 16 << 20
    default_topk: int = 3

    def __post_init__(self) -> None:
        check_minima(self, max_queries=1, max_query_chars=1, max_body_bytes=1)
        if not 1 <= self.default_topk <= self.max_topk:
            raise UserError(f"default_topk must lie between 1 and max_topk={self.max_topk}; got {self.default_topk}")


@dataclass(frozen=True, slots=True)
class RetrieveRequest:
    """A request that passed every check."""

    queries: tuple[str, ...]
    k: int
    return_scores: bool


def format_request(queries: Sequence[str], k: int, *, return_scores: bool = True) -> dict[str, Any]:
    """The body of a request. Lone surrogates, which no server can read, become U+FFFD."""
    return {
        "queries": [query.translate(_LONE_SURROGATES) for query in queries],
        "topk": k,
        "return_scores": return_scores,
    }


def format_single_request(query: str, k: int) -> dict[str, Any]:
    """The body of a request to a server that accepts one query but no list."""
    return {"query": query.translate(_LONE_SURROGATES), "topk": k, "return_scores": True}


def wants_one_query(data: Any) -> bool:
    """Whether the body of a 422 says that `query` is missing, as FastAPI does if a server accepts one query.

    Example:
        >>> wants_one_query({"detail": [{"type": "missing", "loc": ["body", "query"], "msg": "Field required"}]})
        True
    """
    problems = data.get("detail") if isinstance(data, dict) else None
    return isinstance(problems, list) and any(
        isinstance(problem, dict) and problem.get("loc") == ["body", "query"] for problem in problems
    )


def parse_request(body: bytes, limits: Limits) -> RetrieveRequest:
    """Reads the body of a request.

    Raises:
        WireError: with status 400, 413 or 422.

    Example:
        >>> parse_request(b'{"query": "who founded Orlune?"}', Limits())
        RetrieveRequest(queries=('who founded Orlune?',), k=3, return_scores=False)
    """
    if len(body) > limits.max_body_bytes:
        raise too_large(limits)
    try:
        request = parse_json(body)
    except NotJSON as error:
        raise WireError(400, f"the request is {error}") from None
    if not isinstance(request, dict):
        raise WireError(
            422, f'the request must be an object such as {{"queries": ["..."]}}, not {_type_name(request)}'
        )
    return RetrieveRequest(_queries(request, limits), _topk(request, limits), _return_scores(request))


def too_large(limits: Limits) -> WireError:
    """The error for a request beyond `max_body_bytes`."""
    return WireError(413, f"the request is larger than {limits.max_body_bytes:,} bytes; send fewer queries at once")


def format_response(results: Sequence[Sequence[Passage]], return_scores: bool) -> dict[str, Any]:
    """The body of a response: for each query, in the order of the request, a list with one item per passage."""
    return {"result": [format_passages(passages, return_scores) for passages in results]}


def format_passages(passages: Sequence[Passage], return_scores: bool) -> list[dict[str, Any]]:
    """The items of one query."""
    documents = [_document(passage) for passage in passages]
    if not return_scores:
        return documents
    return [
        {"document": document, "score": float(passage.score)}
        for document, passage in zip(documents, passages, strict=True)
    ]


def parse_response(data: Any) -> list[list[Passage]]:
    """Reads the decoded body of a response. A document without an id gets one from its content.

    Raises:
        WireError: with status 502.

    Example:
        >>> parse_response({"result": [[{"document": {"id": 17, "contents": '"Orlune"\\nA town.'}, "score": 0.5}]]})
        [[Passage(id='17', title='Orlune', text='A town.', score=0.5, url=None)]]
    """
    if not isinstance(data, dict) or "result" not in data:
        raise _not_ours(f"expected an object with a 'result', got {_excerpt(data)}")
    results = data["result"]
    if not isinstance(results, list):
        raise _not_ours(f"expected a list with a list for each query, got {_excerpt(results)}", "result")
    found = []
    for query, items in enumerate(results):
        if not isinstance(items, list):
            raise _not_ours(f"expected a list of documents, got {_excerpt(items)}", f"result[{query}]")
        found.append([_passage(item, f"result[{query}][{rank}]") for rank, item in enumerate(items)])
    return found


def _queries(request: dict[str, Any], limits: Limits) -> tuple[str, ...]:
    if "query" in request and "queries" in request:
        raise WireError(422, "there is also 'queries'; send one of the two", "query")
    if "query" in request:
        return (_query(request["query"], "query", limits),)
    if "queries" not in request:
        raise WireError(422, 'missing; send {"queries": ["..."], "topk": 3}', "queries")
    queries = request["queries"]
    if not isinstance(queries, list):
        raise WireError(422, f"must be a list of strings, not {_type_name(queries)}", "queries")
    if len(queries) > limits.max_queries:
        raise WireError(
            413, f"{len(queries):,} queries; a request may hold {limits.max_queries:,}, send several", "queries"
        )
    return tuple(_query(query, f"queries[{at}]", limits) for at, query in enumerate(queries))


def _query(query: Any, field: str, limits: Limits) -> str:
    if not isinstance(query, str):
        raise WireError(422, f"must be a string, not {_type_name(query)}", field)
    if len(query) > limits.max_query_chars:
        raise WireError(413, f"{len(query):,} characters; a query may have {limits.max_query_chars:,}", field)
    try:
        query.encode()
    except UnicodeEncodeError as error:
        raise WireError(
            422, f"half of a surrogate pair (a \\ud8xx escape) at character {error.start} is no text", field
        ) from None
    return query


def _topk(request: dict[str, Any], limits: Limits) -> int:
    topk = request.get("topk")
    if topk is None:
        return limits.default_topk
    if not isinstance(topk, int) or isinstance(topk, bool):
        raise WireError(422, f"must be an integer, not {_type_name(topk)}", "topk")
    if not 1 <= topk <= limits.max_topk:
        raise WireError(422, f"must lie between 1 and {limits.max_topk}, not at {_excerpt(topk)}", "topk")
    return topk


def _return_scores(request: dict[str, Any]) -> bool:
    return_scores = request.get("return_scores")
    if return_scores is None:
        return False
    if not isinstance(return_scores, bool):
        raise WireError(422, f"must be true or false, not {_type_name(return_scores)}", "return_scores")
    return return_scores


def _document(passage: Passage) -> dict[str, Any]:
    # Always with the quoted first line: without it, a client would take the first line of the text as the title.
    contents = f'"{" ".join(passage.title.splitlines())}"\n{passage.text}'
    return {"id": passage.id, "contents": contents, "url": passage.url or ""}


def _passage(item: Any, where: str) -> Passage:
    if not isinstance(item, dict):
        raise _not_ours(f"expected an object, got {_excerpt(item)}", where)
    document, score = item, item.get("score")
    if "document" in item:
        document, where = item["document"], f"{where}.document"
        if not isinstance(document, dict):
            raise _not_ours(f"expected an object, got {_excerpt(document)}", where)
    if "contents" in document:
        title, text = split_contents(_text(document, "contents", where))
    else:
        title = "" if document.get("title") is None else _text(document, "title", where)
        text = _text(document, "text", where)
    url = None if document.get("url") in (None, "") else _text(document, "url", where)
    return Passage(_identity(document, title, text, where), title, text, _score(score, where), url)


def _text(document: dict[str, Any], key: str, where: str) -> str:
    if key not in document:
        fields = ", ".join(map(repr, document))[:200] or "none"
        raise _not_ours(f"there is neither 'contents' nor 'text'; its fields are: {fields}", where)
    value = document[key]
    if not isinstance(value, str):
        raise _not_ours(f"expected a string, got {_excerpt(value)}", f"{where}.{key}")
    return value.translate(_LONE_SURROGATES)


def _identity(document: dict[str, Any], title: str, text: str, where: str) -> str:
    identity = document.get("id")
    if identity is None or identity == "":
        return hashlib.sha256(f"{title}\n{text}".encode()).hexdigest()[:16]
    if isinstance(identity, int) and not isinstance(identity, bool):
        return str(identity)
    return _text(document, "id", where)


def _score(score: Any, where: str) -> float:
    if score is None:
        return 0.0
    if not isinstance(score, (int, float)) or isinstance(score, bool):
        raise _not_ours(f"expected a number, got {_excerpt(score)}", f"{where}.score")
    try:
        value = float(score)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise _not_ours(f"expected a finite number, got {value}", f"{where}.score")
    return value


def _not_ours(message: str, where: str | None = None) -> WireError:
    return WireError(502, message if where else f"the response is not that of /retrieve: {message}", where)


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _excerpt(value: Any) -> str:
    try:
        written = json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # an integer of 5,000 digits
        return _type_name(value)
    return written if len(written) <= 80 else f"{written[:80]}..."
