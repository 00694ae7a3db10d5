from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from trl_search.common.bounds import check_least
from trl_search.common.errors import UserError


def test_a_value_below_its_bound_is_named() -> None:
    settings = SimpleNamespace(limit=None, depth=3, share=math.nan)
    check_least(settings, limit=1, depth=3)
    with pytest.raises(UserError, match="depth=3 must be at least 4"):
        check_least(settings, depth=4)
    with pytest.raises(UserError, match="share=nan must be at least 0"):
        check_least(settings, share=0)
