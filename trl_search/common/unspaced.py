"""Scripts without spaces between words.

Chinese, Japanese, Thai, Lao, Khmer and Burmese have no spaces between words. Korean has spaces, but its endings are
part of the word ("서울은", *Seoul* as the topic). Code that splits text into words takes these letters one by one.
"""

from __future__ import annotations

import re

# The inside of a regular expression's character class. It omits vowel signs and tones, which are marks after a letter,
# and half-width and presentation forms, which NFKC maps to these letters.
UNSPACED_LETTERS = (
    "\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7a3\ud7b0-\ud7fb"  # Hangul
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # kana
    "\u3005-\u3007\u3021-\u3029\u3105-\u312f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46"  # Thai
    "\u0e81-\u0eb0\u0eb2\u0eb3\u0ebd\u0ec0-\u0ec6\u0edc-\u0edf"  # Lao
    "\u1780-\u17b3\u17d7\u17dc"  # Khmer
    "\u1000-\u102a\u103f\u1050-\u1055\u105a-\u105d\u1061\u1065\u1066\u106e-\u1070\u1075-\u1081"  # Burmese
)
UNSPACED = re.compile(f"[{UNSPACED_LETTERS}]")
