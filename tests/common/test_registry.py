"""The options of objects that are chosen by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trl_search.common.errors import UserError
from trl_search.common.registry import check_options


def without() -> None: ...


def with_paths(*paths: str, depth: int = 3) -> None: ...


def with_others(corpus: str, **more: Any) -> None: ...


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (without, "wiki: got an unexpected keyword argument 'wrod'; it has no options"),
        (with_paths, "wiki: got an unexpected keyword argument 'wrod'; its options are: depth"),
        (with_others, "wiki: missing a required argument: 'corpus'; its options are: corpus"),
    ],
)
def test_wrong_options_are_answered_with_those_that_can_be_given(make: Callable[..., None], told: str) -> None:
    """`*paths` and `**more` were listed as if they were options, and without any the sentence had no end."""
    with pytest.raises(UserError) as error:
        check_options("wiki", make, {"wrod": 1})
    assert str(error.value) == told
