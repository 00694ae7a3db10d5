"""Golden answers in the formats of public datasets are unpacked exactly, or refused with their type."""

from __future__ import annotations

import datetime
import json
import math
from typing import Any

import numpy as np
import pytest

from trl_search.common.errors import UserError
from trl_search.rewards.golden_answers import golden_list

TRIVIAQA = {
    "value": "Sinclair Lewis",
    "aliases": ["Harry Sinclair Lewis", "Sinclair Lewis"],
    "normalized_aliases": ["harry sinclair lewis"],
    "type": "WikipediaEntity",
}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Paris", ["Paris"]),
        (["Paris", None, math.nan], ["Paris"]),
        (("Paris", None), ["Paris"]),
        (np.array(["Paris", "Paname"]), ["Paris", "Paname"]),
        (np.array("Paris"), ["Paris"]),
        (np.str_("Paris"), ["Paris"]),
        (None, []),
        (math.nan, []),
        (np.float64("nan"), []),
        ([], []),
        (1969, ["1969"]),
        (1998.0, ["1998"]),
        (np.float32(1998.0), ["1998"]),
        ([0.5, 1e21], ["0.5", "1000000000000000000000"]),
        (b"Z\xc3\xbcrich", ["Zürich"]),
        ([b"Lyon"], ["Lyon"]),
        (TRIVIAQA, ["Sinclair Lewis", "Harry Sinclair Lewis"]),
        ({**TRIVIAQA, "aliases": np.array(["H. S. Lewis"])}, ["Sinclair Lewis", "H. S. Lewis"]),
        ({"text": ["Lyon", "Lyon", "in Lyon"], "answer_start": [1, 1, 0]}, ["Lyon", "in Lyon"]),
        ([{"text": "Lyon", "answer_start": 17}, {"text": "Paris", "answer_start": 30}], ["Lyon", "Paris"]),
        ({"target": np.array(["2,718"])}, ["2,718"]),
        ('["politician", "political leader"]', ["politician", "political leader"]),
        ("['politician', \"O'Hara\"]", ["politician", "O'Hara"]),
        (['["a", "b"]', "c"], ["a", "b", "c"]),
        ("[]", []),
        ('["politician", null]', ["politician"]),
        # Columns of structs, and of tuples, that pandas wrote as csv: as text they matched no answer, in silence.
        (json.dumps(TRIVIAQA), ["Sinclair Lewis", "Harry Sinclair Lewis"]),
        (str({"text": ["Lyon", "in Lyon"], "answer_start": [1, 0]}), ["Lyon", "in Lyon"]),
        ("('Lyon', 'Lugdunum')", ["Lyon", "Lugdunum"]),
        # Answers that only look like lists.
        ("[1]", ["[1]"]),
        ("[sic]", ["[sic]"]),
        ("(1, 2)", ["(1, 2)"]),
        ("()", ["()"]),
        ('("Weird Al" Yankovic)', ['("Weird Al" Yankovic)']),
        ("{a}", ["{a}"]),
        ('["Heroes" is the album]', None),
    ],
)
def test_known_formats_are_unpacked(value: Any, expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(UserError, match="look like a list or a struct but do not parse"):
            golden_list(value)
        return
    assert golden_list(value) == expected
    assert golden_list(expected) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "True, of type bool"),
        ([False], "False, of type bool"),
        (math.inf, "inf, of type float"),
        (b"\xff\xfe", "bytes that are not UTF-8"),
        ({"answer": "Lyon"}, "a struct with the fields answer"),
        ([{"name": "Lyon"}], "a struct with the fields name"),
        ([["Lyon", "Lugdunum"], ["Paris"]], "a nested list"),
        (np.array([["Lyon"], ["Paris"]]), "a nested list"),
        (datetime.date(1998, 1, 1), "of type date"),
        ({"a"}, "of type set"),
        ("{'text': array(['Lyon'], dtype=object), 'answer_start': array([1])}", "look like a list or a struct but do"),
        ("{'Lyon', 'Lugdunum'}", "look like a list or a struct but do not parse"),
        ('{"answer": "Lyon"}', "a struct with the fields answer"),
        ("['a' 'b']", "look like a list or a struct but do not parse"),
    ],
)
def test_other_formats_are_refused_by_type(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        golden_list(value)
