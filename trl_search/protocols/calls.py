"""Parses the content of one call: the text between `<tool_call>` and `</tool_call>`, or `<search>` and `</search>`.

    {"name": "search", "arguments": {"query_list": ["birthplace of Mira Talvane"]}}     JSON
    birthplace of Mira Talvane                                                          a bare query, also accepted

A near-call is text that was meant as a call but is none: a code fence, `search(query="x")`, markup, `null`. It is
never searched as literal text. The policy gets a correction, and `search/near_calls` counts it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from trl_search.types import Action, Invalid, Search, ToolCall

MAX_QUERY_CHARS = 1000
NO_SUCH_TOOL = Invalid("there is no tool of that name")
# Every repetition is bounded, so that matching takes linear time.
_NOT_A_QUERY = re.compile(
    r"""```|</?[a-z_|]|\[/?[A-Z_]{2,20}\]|^[\w:]{0,20}search\s{0,3}(?:[({]|:\s{0,3}[{\["'])|^"[\[{]|^(?:null|none|undefined)$""",
    re.IGNORECASE,
)
# The JSON types that bare text is converted to.
_TYPES: dict[str, tuple[type, ...]] = {"number": (int, float), "integer": (int,), "boolean": (bool,)}
_UNTAGGED = re.compile(
    r"""["'](?:name|function)["']\s{0,9}:\s{0,9}["']search["']|["']query(?:_list)?["']\s{0,9}:"""
    r"""|\bsearch\((?:["'\[{]|query)|<function=|<\|?/?tool_call|\[TOOL_CALLS\]|<\|python_tag\|>""",
    re.IGNORECASE,
)


def read_call(content: str, tools: Collection[str] = ("search",)) -> Action:
    """The action of a call, or `Invalid` with the reason.

    Example:
        >>> read_call('{"name": "search", "arguments": {"query_list": ["a", "b"]}}')
        Search(queries=('a', 'b'))
    """
    raw = content.strip()
    if not raw.startswith(("{", "[")):
        return read_query(raw)
    call = _json(raw)
    if call is None:
        return Invalid("the call is not valid JSON")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return Invalid('the call must be {"name": ..., "arguments": {...}}')
    arguments = call.get("arguments")
    if isinstance(arguments, str):  # stringified, as OpenAI's API writes them
        arguments = _json(arguments)
    if not isinstance(arguments, dict):
        return Invalid("the call has no arguments")
    if call["name"] not in tools:
        return NO_SUCH_TOOL
    if call["name"] != "search":
        return ToolCall(call["name"], arguments)
    return search_for(arguments.get("query_list", arguments.get("query")))


def read_query(raw: str) -> Action:
    """A search for a query in plain text; `Invalid` if the text is markup, JSON or code."""
    raw = raw.strip()
    if raw.startswith(("{", "[")) or _NOT_A_QUERY.search(raw):
        return Invalid("the query must be plain words, without JSON, code or markup", near=True)
    return search_for(raw)


def search_for(queries: Any) -> Action:
    """A search for `queries`, untrusted model output of any type."""
    if isinstance(queries, str) and queries.lstrip().startswith("["):  # a stringified list
        queries = decoded if isinstance(decoded := _json(queries), list) else queries
    queries = [queries] if isinstance(queries, str) else queries
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        return Invalid("query_list must be a list of strings")
    stripped = tuple(query.strip() for query in queries if query.strip())
    if not stripped:
        return Invalid("the query is empty")
    if any(len(query) > MAX_QUERY_CHARS for query in stripped):
        return Invalid(f"a query may have at most {MAX_QUERY_CHARS} characters")
    return Search(stripped)


def with_types(call: ToolCall, schema: Any) -> ToolCall:
    """Converts a call's arguments to the types in the tool's schema, because some families write only bare text. Text
    that cannot be converted stays unchanged, and the environment handles it.

    Example:
        >>> with_types(ToolCall("add", {"a": "1"}), {"properties": {"a": {"type": "number"}}})
        ToolCall(name='add', arguments={'a': 1})
    """
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict):
        return call

    def typed(name: str, value: Any) -> Any:
        wanted = properties[name].get("type") if isinstance(properties.get(name), dict) else None
        types = _TYPES.get(wanted, ()) if isinstance(wanted, str) and isinstance(value, str) else ()
        return read if types and type(read := _json(value)) in types else value

    return ToolCall(call.name, {name: typed(name, value) for name, value in call.arguments.items()})


def call_of(action: Search | ToolCall) -> ToolCall:
    """The call for an action: the inverse of `read_call`.

    Example:
        >>> call_of(Search(("a", "b")))
        ToolCall(name='search', arguments={'query_list': ['a', 'b']})
    """
    return ToolCall("search", {"query_list": list(action.queries)}) if isinstance(action, Search) else action


def looks_like_a_call(text: str) -> bool:
    """Whether a turn without a call contains a near-call.

    Example:
        >>> looks_like_a_call('```json\\n{"name": "search", "arguments": {"query": "x"}}\\n```')
        True
    """
    return _UNTAGGED.search(text) is not None


def _json(text: str) -> Any:
    """The value, or `None` if the text is not JSON or too deeply nested."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
