"""In which encoding a page was written: its byte-order mark, its `Content-Type`, its `<meta>`, in this order.

    decode("你好".encode("gbk"), "text/html; charset=gb2312")  ->  "你好"

The order and the wider encodings in place of the narrow ones are those of browsers (https://encoding.spec.whatwg.org):
a page that calls itself gb2312 or iso-8859-1 is often written in a superset of it.
"""

from __future__ import annotations

import codecs
import re

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_HEADER = re.compile(r"charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_META = re.compile(rb"<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_SNIFFED_BYTES = 4096
# The names are Python's.
_SUPERSETS = {
    "iso8859-1": "cp1252",
    "ascii": "cp1252",
    "iso8859-9": "cp1254",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
}


def decode(body: bytes, content_type: str) -> str | None:
    """The text of a page, bytes that are no text replaced; `None` where nothing names an encoding that Python has."""
    named = [encoding for mark, encoding in _MARKS if body.startswith(mark)]
    if header := _HEADER.search(content_type):
        named.append(header.group(1))
    if meta := _META.search(body[:_SNIFFED_BYTES]):
        label = meta.group(1).decode("ascii", "replace")
        # A <meta> that was read as ASCII is in no UTF-16, whatever it says.
        named.append("utf-8" if label.lower().startswith("utf-16") else label)
    for label in named:
        try:
            name = codecs.lookup(label).name
            return body.decode(_SUPERSETS.get(name, name), "replace")
        except (LookupError, ValueError):  # no codec, or one like rot13 that is none of text
            continue
    return None
