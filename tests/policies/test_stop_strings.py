"""When a turn ends at a stop string."""

from __future__ import annotations

from trl_search.policies.stop_strings import StopStrings


def test_the_token_that_completes_a_stop_string_is_found(tokenizer):
    stops = StopStrings(tokenizer)
    for stop in (("</search>", "</answer>"), ("だ",)):
        ids = tokenizer.encode(f"<search> who wrote it? {stop[0]} so", add_special_tokens=False)
        reached = [stops.is_reached(ids[:end], stop) for end in range(1, len(ids) + 1)]
        first = next(end for end in range(1, len(ids) + 1) if stop[0] in tokenizer.decode(ids[:end]))
        assert reached.index(True) == first - 1
    assert not stops.is_reached(ids, ())
