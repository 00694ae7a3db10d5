"""Garbage collection passes over what was there before: the collector sees only what was made since."""

from __future__ import annotations

import gc
import sys

import pytest

from trl_search.common.garbage import sparing_what_is_loaded


def test_what_is_loaded_is_spared_as_long_as_the_context_lasts() -> None:
    loaded = [["made before"]]
    before = gc.get_freeze_count()
    with sparing_what_is_loaded():
        made = [["made inside"]]
        seen = {id(held) for held in gc.get_objects()}
        assert id(loaded) not in seen and id(made) in seen and gc.get_freeze_count() > before
    assert id(loaded) in {id(held) for held in gc.get_objects()}


def test_it_ends_with_an_error_too() -> None:
    with pytest.raises(RuntimeError), sparing_what_is_loaded():
        raise RuntimeError
    assert id(sys.modules) in map(id, gc.get_objects())
