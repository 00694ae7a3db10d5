"""All protocols, by name. A new one is registered here, by a script, or by an installed package:

[project.entry-points."trl_search.protocols"]
lookup = "my_package.lookup:Lookup"
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl_search.common.errors import unknown_name
from trl_search.common.registry import Registry
from trl_search.protocols.base import Protocol
from trl_search.protocols.qwen import QwenInline, QwenTools
from trl_search.protocols.search_r1 import SearchR1

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A script may add its own class here; an installed package adds one through the entry-point group.
PROTOCOLS: dict[str, type[Protocol]] = {cls.name: cls for cls in (QwenTools, QwenInline, SearchR1)}
_INSTALLED = Registry("protocol", "trl_search.protocols", {})


def protocol_names() -> list[str]:
    """The names of all protocols: built-in ones, those that a script added, and those of installed packages."""
    return [*PROTOCOLS, *(name for name in _INSTALLED.names() if name not in PROTOCOLS)]


def load_protocol(name: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Protocol:
    """Creates the protocol with this name for a tokenizer; `options` are those of [`Protocol`].

    Raises:
        UserError: for an unknown name.

    Example:
        >>> protocol = load_protocol("qwen_tools", tokenizer)
        >>> protocol.parse('<tool_call>\\n{"name": "search", "arguments": {"query_list": ["x"]}}\\n</tool_call>')
        Search(queries=('x',))
    """
    if name not in protocol_names():
        raise unknown_name("protocol", name, protocol_names())
    made: Protocol = (PROTOCOLS.get(name) or _INSTALLED.get(name))(tokenizer, **options)
    return made
