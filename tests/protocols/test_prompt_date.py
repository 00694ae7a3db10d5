"""Templates that contain today's date get a fixed date, so that the prompt is the same as in training."""

from __future__ import annotations

import copy

import pytest

from trl_search.common.errors import UserError
from trl_search.protocols import load_protocol

TEMPLATE = (
    "{%- set today = date_string if date_string is defined else strftime_now('%d %b %Y') -%}"
    "Today: {{ today }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("options", "date"), [({}, "26 Jul 2024"), ({"chat_template_kwargs": {"date_string": "1 May 2031"}}, "1 May 2031")]
)
def test_a_prompt_is_the_same_tomorrow(tokenizer, options, date):
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = TEMPLATE
    protocol = load_protocol("search_r1", dated, instruction="", **options)
    assert f"Today: {date}\n" in protocol.decode(protocol.prompt_ids(protocol.messages("Who?")))


def test_a_date_that_would_change_from_day_to_day_is_refused(tokenizer):
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = TEMPLATE.replace("'%d %b %Y'", "'%d %b' ~ ' %Y'")
    with pytest.raises(UserError, match=r"today's date.*literal format"):
        load_protocol("search_r1", dated, instruction="")
