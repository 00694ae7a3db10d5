"""The wire protocol: what is parsed and written; any bytes are parsed, or refused with the name of the field."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trl_search.retrieval.remote.wire import (
    Limits,
    RetrieveRequest,
    WireError,
    format_request,
    format_response,
    parse_request,
    parse_response,
)
from trl_search.types import Passage

ORLUNE = Passage("17", "Orlune", "Orlune is a harbour town.\nIn Vesk.", 0.875)
LIMITS = Limits(max_queries=4, max_query_chars=100, max_topk=10, max_body_bytes=2000)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
title = text.map(lambda drawn: " ".join(drawn.splitlines()))
score = st.floats(allow_nan=False, allow_infinity=False)
passages = st.builds(Passage, text.filter(bool), title, text, score, st.none() | text.filter(bool))
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    [
        "queries",
        "query",
        "topk",
        "return_scores",
        "result",
        "document",
        "score",
        "id",
        "contents",
        "title",
        "text",
        "url",
    ]
)
resembling = st.recursive(
    anything | st.sampled_from(["a", 3, True]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=12,
)


def refusal(body: Any, limits: Limits = LIMITS) -> WireError:
    with pytest.raises(WireError) as raised:
        parse_request(body if isinstance(body, bytes) else json.dumps(body).encode(), limits)
    return raised.value


def test_the_exact_format_of_requests_and_responses() -> None:
    body = b'{"queries": ["who?", "where?"], "topk": 2, "return_scores": true}'
    assert parse_request(body, LIMITS) == RetrieveRequest(("who?", "where?"), 2, True)
    document = {"id": "17", "contents": '"Orlune"\nOrlune is a harbour town.\nIn Vesk.', "url": ""}
    assert format_response([[ORLUNE], []], return_scores=True) == {
        "result": [[{"document": document, "score": 0.875}], []]
    }
    assert format_response([[ORLUNE], []], return_scores=False) == {"result": [[document], []]}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"query": "one string"}, RetrieveRequest(("one string",), 3, False)),
        ({"queries": [], "topk": 3, "return_scores": True}, RetrieveRequest((), 3, True)),
        ({"queries": ["a"], "topk": None, "return_scores": None}, RetrieveRequest(("a",), 3, False)),
        ({"queries": ["", "a", "a"], "topk": 10}, RetrieveRequest(("", "a", "a"), 10, False)),
        (
            {"queries": ["灯 \U0001f30a \0"], "topk": 1, "model": "e5"},
            RetrieveRequest(("灯 \U0001f30a \0",), 1, False),
        ),
    ],
)
def test_variants_of_a_request(body: dict[str, Any], expected: RetrieveRequest) -> None:
    assert parse_request(json.dumps(body).encode(), LIMITS) == expected


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b"queries=a", 400, None),
        (b'{"queries": ["\xff"]}', 400, None),
        ('{"queries": ["a"]}'.encode("utf-16"), 400, None),
        (b'{"query": "a", "topk": ' + b"9" * 1500 + b"}", 422, "topk"),
        ([], 422, None),
        ("a", 422, None),
        (None, 422, None),
        ({}, 422, "queries"),
        ({"queries": "a"}, 422, "queries"),
        ({"queries": None}, 422, "queries"),
        ({"queries": {"0": "a"}}, 422, "queries"),
        ({"queries": ["a"] * 5}, 413, "queries"),
        ({"queries": ["a", 3]}, 422, "queries[1]"),
        ({"queries": ["a", None]}, 422, "queries[1]"),
        ({"queries": [["a"]]}, 422, "queries[0]"),
        ({"queries": ["a", "x" * 101]}, 413, "queries[1]"),
        ({"queries": ["a", "\ud83c"]}, 422, "queries[1]"),
        ({"query": 3}, 422, "query"),
        ({"query": ["a"]}, 422, "query"),
        ({"query": "a", "queries": ["a"]}, 422, "query"),
        ({"query": "a", "topk": 0}, 422, "topk"),
        ({"query": "a", "topk": -1}, 422, "topk"),
        ({"query": "a", "topk": 11}, 422, "topk"),
        ({"query": "a", "topk": "3"}, 422, "topk"),
        ({"query": "a", "topk": 3.0}, 422, "topk"),
        ({"query": "a", "topk": True}, 422, "topk"),
        ({"query": "a", "return_scores": "yes"}, 422, "return_scores"),
        ({"query": "a", "return_scores": 1}, 422, "return_scores"),
        (b" " * 2001, 413, None),
    ],
)
def test_a_bad_request_has_its_status_and_names_its_field(body: Any, status: int, field: str | None) -> None:
    error = refusal(body)
    assert (error.status, error.field) == (status, field)
    assert str(error).startswith(field or "the request")


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 50_000, b'{"query": "a", "topk": ' + b"9" * 6000 + b"}"])
def test_invalid_json_is_a_bad_request(body: bytes) -> None:
    assert refusal(body, Limits()).status == 400


def test_a_query_of_a_hundred_thousand_characters_is_refused_and_named() -> None:
    error = refusal({"queries": ["a", "x" * 100_000]}, Limits())
    assert (error.status, error.field) == (413, "queries[1]")
    assert "100,000 characters; a query may have 20,000" in str(error)


def test_contradictory_limits_are_refused() -> None:
    for wrong in ({"max_queries": 0}, {"default_topk": 0}, {"default_topk": 11, "max_topk": 10}):
        with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
            Limits(**wrong)


@given(st.lists(text, min_size=1, max_size=4), st.integers(1, 10), st.booleans())
def test_a_request_is_parsed_as_it_was_sent(queries: list[str], k: int, return_scores: bool) -> None:
    body = json.dumps(format_request(queries, k, return_scores=return_scores)).encode()
    assert parse_request(body, Limits()) == RetrieveRequest(tuple(queries), k, return_scores)


def test_invalid_unicode_is_replaced_before_it_is_sent() -> None:
    assert format_request(["a\ud83cb"], 3)["queries"] == ["a\ufffdb"]


@given(st.lists(st.lists(passages, max_size=3), max_size=3))
def test_passages_are_parsed_as_they_were_sent(results: list[list[Passage]]) -> None:
    assert parse_response(json.loads(json.dumps(format_response(results, return_scores=True)))) == results


@given(st.lists(st.lists(passages, max_size=3), max_size=3))
def test_without_scores_everything_else_is_kept(results: list[list[Passage]]) -> None:
    found = parse_response(json.loads(json.dumps(format_response(results, return_scores=False))))
    assert found == [[Passage(p.id, p.title, p.text, 0.0, p.url) for p in passages] for passages in results]


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"id": 17, "title": "T", "text": "x", "url": "https://e.org"}, Passage("17", "T", "x", 0.0, "https://e.org")),
        ({"document": {"id": "17", "title": None, "text": "x"}, "score": 2}, Passage("17", "", "x", 2.0)),
        ({"document": {"id": "17", "contents": "only text"}, "score": None}, Passage("17", "", "only text")),
        ({"id": "17", "contents": 'T\n"x"', "score": -0.5}, Passage("17", "T", '"x"', -0.5)),
    ],
)
def test_variants_of_a_document(item: dict[str, Any], expected: Passage) -> None:
    assert parse_response({"result": [[item]]}) == [[expected]]


def test_documents_without_an_id_get_one_from_their_content() -> None:
    documents = [{"contents": '"A"\nx'}, {"title": "A", "text": "x"}, {"contents": '"A"\ny'}]
    ((same, again, other),) = parse_response({"result": [documents]})
    assert same == again and same.id != other.id and same.id


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"detail": "Internal Server Error"}, "'result'"),
        ([[]], "'result'"),
        ({"result": {}}, "result: "),
        ({"result": [{}]}, "result[0]: "),
        ({"result": [[], [None]]}, "result[1][0]: "),
        ({"result": [[{"document": "text"}]]}, "result[0][0].document: "),
        ({"result": [[{"document": {"id": "1"}}]]}, "'contents'"),
        ({"result": [[{"id": "1", "contents": 3}]]}, "result[0][0].contents: "),
        ({"result": [[{"id": [], "contents": "a"}]]}, "result[0][0].id: "),
        ({"result": [[{"document": {"id": "1", "text": "a"}, "score": "high"}]]}, "result[0][0].document.score: "),
        ({"result": [[{"document": {"id": "1", "text": "a"}, "score": math.nan}]]}, "score: "),
    ],
)
def test_an_answer_of_another_protocol_is_refused(data: Any, named: str) -> None:
    with pytest.raises(WireError) as raised:
        parse_response(data)
    assert raised.value.status == 502 and named in str(raised.value)


@given(st.binary(max_size=200) | resembling.map(lambda value: json.dumps(value).encode()))
@example(b'{"queries": []}')  # as in a turn without searches
def test_any_bytes_are_a_request_or_a_wire_error(body: bytes) -> None:
    try:
        request = parse_request(body, LIMITS)
    except WireError as error:
        assert error.status in (400, 413, 422)
    else:
        assert 1 <= request.k <= 10
        assert all(len(query.encode()) <= 400 for query in request.queries)


@given(resembling)
def test_any_json_is_a_response_or_a_wire_error(data: Any) -> None:
    try:
        found = parse_response(data)
    except WireError as error:
        assert error.status == 502
    else:
        json.dumps(format_response(found, return_scores=True)).encode()
        assert all(passage.id and math.isfinite(passage.score) for passages in found for passage in passages)
