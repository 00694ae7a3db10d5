"""Protocols: how the policy writes a search call, and how the environment writes the reply.

| protocol      | the policy writes                                | the environment replies                       |
|---------------|--------------------------------------------------|-----------------------------------------------|
| `qwen_tools`  | `<tool_call>{"name": "search", ...}</tool_call>` | a tool message, rendered by the chat template |
| `qwen_inline` | the same, or a bare query inside `<tool_call>`   | `<tool_response>` in the same assistant turn  |
| `search_r1`   | `<search> query </search>`                       | `<information>` in the same assistant turn    |

In each of them, the policy answers with `<answer> ... </answer>`.
"""

from __future__ import annotations

from trl_search.protocols.base import Protocol
from trl_search.protocols.calls import MAX_QUERY_CHARS
from trl_search.protocols.fair_limit import MIN_DOCUMENT_TOKENS, fair_limit
from trl_search.protocols.qwen import QwenInline, QwenTools
from trl_search.protocols.registry import PROTOCOLS, load_protocol, protocol_names
from trl_search.protocols.search_r1 import SearchR1
from trl_search.protocols.search_tool import SEARCH_TOOL

__all__ = [
    "MAX_QUERY_CHARS",
    "MIN_DOCUMENT_TOKENS",
    "PROTOCOLS",
    "SEARCH_TOOL",
    "Protocol",
    "QwenInline",
    "QwenTools",
    "SearchR1",
    "fair_limit",
    "load_protocol",
    "protocol_names",
]
