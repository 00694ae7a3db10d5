"""A fixed date for chat templates that write today's date (Llama 3, gpt-oss), so that a prompt is the same every day.

The date is written into the template's text: from 5.24 on, transformers passes a template nothing that can be called.
"""

from __future__ import annotations

import datetime
import re

from trl_search.common.errors import UserError

# The default of Llama 3's template.
PROMPT_DATE = datetime.date(2024, 7, 26)
_CALL = re.compile(r"""\bstrftime_now\(\s*(?:format\s*=\s*)?(?:"([^"]*)"|'([^']*)')\s*\)""")


def with_fixed_date(template: str) -> str:
    """The template with `PROMPT_DATE` in place of today's date.

    Raises:
        UserError: if it computes the format of the date.

    Example:
        >>> with_fixed_date("Today: {{ strftime_now('%d %b %Y') }}")
        "Today: {{ '26 Jul 2024' }}"
    """
    fixed = _CALL.sub(lambda call: repr(PROMPT_DATE.strftime(call[1] or call[2] or "")), template)
    if "strftime_now(" in fixed:
        raise UserError(
            "the chat template writes today's date in a format that it computes, so prompts would change from day to "
            "day: set tokenizer.chat_template to one with a literal format, such as strftime_now('%d %b %Y')"
        )
    return fixed
