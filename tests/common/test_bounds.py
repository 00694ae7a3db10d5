from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from trl_search.common.bounds import (
    check_at_least,
    check_minima,
    check_not_negative,
    check_positive,
    check_positive_share,
    check_share,
)
from trl_search.common.errors import UserError


def test_a_value_below_its_bound_is_named() -> None:
    settings = SimpleNamespace(limit=None, depth=3, share=math.nan)
    check_minima(settings, limit=1, depth=3)
    with pytest.raises(UserError, match="depth=3 must be at least 4"):
        check_minima(settings, depth=4)
    with pytest.raises(UserError, match="share=nan must be at least 0"):
        check_minima(settings, share=0)


def test_numbers_outside_of_their_bounds_are_named() -> None:
    check_at_least(1, limit=1, depth=None)
    check_positive(timeout_s=0.1, k1=None)
    check_not_negative(k1=0, temperature=None)
    check_share(b=0, share=1.0, min_p=None)
    check_positive_share(top_p=1.0)
    with pytest.raises(UserError, match="limit=0 must be at least 1"):
        check_at_least(1, depth=1, limit=0)
    for value in (0, -1, math.inf, math.nan):
        with pytest.raises(UserError, match=f"timeout_s={value} must be a finite number above 0"):
            check_positive(timeout_s=value)
    for value in (-0.1, math.inf, math.nan):
        with pytest.raises(UserError, match=f"k1={value} must be a finite number, at least 0"):
            check_not_negative(k1=value)
    for value in (0, 1.1, math.nan, None):
        with pytest.raises(UserError, match=f"top_p={value} must be more than 0 and at most 1"):
            check_positive_share(top_p=value)
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(UserError, match=f"share={value} must be a number from 0 to 1"):
            check_share(share=value)
