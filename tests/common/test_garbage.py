"""The garbage collector skips objects that existed before: it sees only newer ones."""

from __future__ import annotations

import gc
import sys

import pytest

from trl_search.common.garbage import sparing_what_is_loaded


def test_loaded_objects_are_skipped_inside_the_context() -> None:
    loaded = [["made before"]]
    before = gc.get_freeze_count()
    with sparing_what_is_loaded():
        made = [["made inside"]]
        seen = {id(held) for held in gc.get_objects()}
        assert id(loaded) not in seen and id(made) in seen and gc.get_freeze_count() > before
    assert id(loaded) in {id(held) for held in gc.get_objects()}


def test_the_context_ends_after_an_exception_too() -> None:
    with pytest.raises(RuntimeError), sparing_what_is_loaded():
        raise RuntimeError
    assert id(sys.modules) in map(id, gc.get_objects())
