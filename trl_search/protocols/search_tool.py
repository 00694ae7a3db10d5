"""The search tool, as chat templates show it to the policy."""

from __future__ import annotations

from typing import Any

SEARCH_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Searches an encyclopedia and returns the passages that fit each query best.",
        "parameters": {
            "type": "object",
            "properties": {
                "query_list": {
                    "type": "array",
                    "items": {"type": "string"},
                    "description": "Fully-formed semantic queries.",
                }
            },
            "required": ["query_list"],
        },
    },
}
