"""Makes untrusted text safe for a terminal: control characters could move the cursor, rename the window or reverse the
text."""

from __future__ import annotations

import re

# C0 and C1 except tab and newline, characters that change the direction of text, and halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with every control character as an escape.

    Example:
        >>> visible("\\x1b[2Jgone")
        '\\\\x1b[2Jgone'
    """
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
