"""Detects the encoding of a page from its byte-order mark, its `Content-Type` or its `<meta>`, in this order.

    decode("你好".encode("gbk"), "text/html; charset=gb2312")  ->  "你好"

As in browsers (https://encoding.spec.whatwg.org), some encodings are replaced by a superset: a page that declares
gb2312 or iso-8859-1 often uses more characters.
"""

from __future__ import annotations

import codecs
import re

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_HEADER = re.compile(r"charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_META = re.compile(rb"<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_SNIFFED_BYTES = 4096
# Encodings of Python that pages do not use. Punycode takes time quadratic in the page.
_NOT_OF_PAGES = {"punycode", "idna", "unicode-escape", "raw-unicode-escape"}
# The values are Python's names.
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
    """The text of a page, with invalid bytes replaced; `None` if no encoding of pages is declared."""
    named = [encoding for mark, encoding in _MARKS if body.startswith(mark)]
    if header := _HEADER.search(content_type):
        named.append(header.group(1))
    if meta := _META.search(body[:_SNIFFED_BYTES]):
        label = meta.group(1).decode("ascii", "replace")
        # A <meta> that could be read as ASCII rules out UTF-16, whatever it declares.
        named.append("utf-8" if label.lower().startswith("utf-16") else label)
    for label in named:
        try:
            name = codecs.lookup(label).name
            if name in _NOT_OF_PAGES:
                continue
            return body.decode(_SUPERSETS.get(name, name), "replace")
        except (LookupError, ValueError):  # unknown, or not a text encoding (rot13)
            continue
    return None
