"""For mkdocstrings, which reads docstrings in Google's form, and ours are in TRL's: `Example:` is code, types have no
backticks, and [`~trl.GRPOTrainer`] is a name."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension


class TRLDocstrings(Extension):
    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Called by griffe with each object that it has read."""
        if obj.docstring is not None:
            text = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
            text = re.sub(r"\[`~?([^`\]]+)`\]", r"`\1`", text)
            obj.docstring.value = re.sub(r"(?m)^( +\w+ \()(.*?)(\):)", _plain_type, text)


def _plain_type(entry: re.Match[str]) -> str:
    return entry[1] + re.sub(r"[`*]", "", entry[2]) + entry[3]
