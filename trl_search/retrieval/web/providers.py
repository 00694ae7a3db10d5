"""The search engines of the `web` retriever: how to send a request to each, and how to read its answer.

| provider  | key                        | where                                              |
|-----------|----------------------------|----------------------------------------------------|
| `ddgs`    | none                       | DuckDuckGo and others, through the package `ddgs`  |
| `serper`  | `SERPER_API_KEY`           | https://google.serper.dev                          |
| `tavily`  | `TAVILY_API_KEY`           | https://api.tavily.com                             |
| `brave`   | `BRAVE_API_KEY`            | https://api.search.brave.com                       |
| `searxng` | none; `SEARXNG_URL`        | an instance with `json` among its formats      |

Keys are sent in headers, which are not logged, and are removed from a server's message before it enters an error.
"""

from __future__ import annotations

import asyncio
import html
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from trl_search.common.credentials import bearer_token, from_environment
from trl_search.common.errors import UserError, unknown_name
from trl_search.common.extras import import_extra
from trl_search.retrieval.base import RetrievalError, add_part, body_text, is_address, retry_after_s

_TAG = re.compile(r"</?\w[^<>]*>")


@dataclass(frozen=True, slots=True)
class WebHit:
    """One search result."""

    title: str
    url: str
    snippet: str


class ProviderBusy(RetrievalError):
    """The provider refused a search or could not be reached; the same search may succeed later."""

    def __init__(self, message: str, *, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class Provider(Protocol):
    """A search engine. `identity` distinguishes its answers in the cache."""

    name: str
    identity: str
    rate_per_s: float

    async def search(self, client: httpx.AsyncClient, query: str, count: int) -> list[WebHit]:
        """Returns the first `count` results. Raises `ProviderBusy`, or `RetrievalError` for a lasting failure."""


@dataclass(frozen=True)
class Api:
    """How to query one provider over HTTP and read its answers.

    Args:
        key_variable (`str`, *optional*): The environment variable of the key; `None` if it needs none.
        base_url (`str`): Its address; `""` if the user must give it.
        rate_per_s (`float`): Searches per second allowed by its smallest plan.
        ask (`Callable`): `(base_url, key, query, count)` to the arguments of `httpx.AsyncClient.stream`.
        read (`Callable`): Reads hits from the decoded answer; raises `LookupError` or `TypeError` for another shape.
    """

    key_variable: str | None
    base_url: str
    rate_per_s: float
    ask: Callable[[str, str, str, int], dict[str, Any]]
    read: Callable[[Any], list[WebHit]]


def _ask_serper(base_url: str, key: str, query: str, count: int) -> dict[str, Any]:
    body = {"q": query, "num": min(count, 100)}
    return {"method": "POST", "url": f"{base_url}/search", "headers": {"X-API-KEY": key}, "json": body}


def _read_serper(answer: Any) -> list[WebHit]:
    if "searchParameters" in answer and not answer.get("organic"):  # only an answer box, or nothing was found
        return []
    return _hits(answer["organic"], "link", "snippet")


def _ask_tavily(base_url: str, key: str, query: str, count: int) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"}
    body = {"query": query, "max_results": min(count, 20), "search_depth": "basic"}
    return {"method": "POST", "url": f"{base_url}/search", "headers": headers, "json": body}


def _read_tavily(answer: Any) -> list[WebHit]:
    return _hits(answer["results"], "url", "content")


def _ask_brave(base_url: str, key: str, query: str, count: int) -> dict[str, Any]:
    headers = {"X-Subscription-Token": key, "Accept": "application/json"}
    # It rejects queries of more than 50 words.
    asked = {"q": " ".join(query.split()[:50]), "count": min(count, 20), "text_decorations": "false"}
    return {"method": "GET", "url": f"{base_url}/res/v1/web/search", "headers": headers, "params": asked}


def _read_brave(answer: Any) -> list[WebHit]:
    if answer["type"] == "search" and "web" not in answer:  # nothing was found
        return []
    return _hits(answer["web"]["results"], "url", "description")


def _ask_searxng(base_url: str, key: str, query: str, count: int) -> dict[str, Any]:
    return {"method": "GET", "url": f"{base_url}/search", "params": {"q": query, "format": "json"}}


def _read_searxng(answer: Any) -> list[WebHit]:
    silent = answer.get("unresponsive_engines")
    if not answer["results"] and silent:
        raise ProviderBusy(f"searxng: its engines did not answer: {str(silent)[:200]}")
    return _hits(answer["results"], "url", "content")


APIS = {
    "serper": Api("SERPER_API_KEY", "https://google.serper.dev", 5.0, _ask_serper, _read_serper),
    "tavily": Api("TAVILY_API_KEY", "https://api.tavily.com", 1.5, _ask_tavily, _read_tavily),
    "brave": Api("BRAVE_API_KEY", "https://api.search.brave.com", 1.0, _ask_brave, _read_brave),
    "searxng": Api(None, "", 2.0, _ask_searxng, _read_searxng),
}


class HttpProvider:
    """A provider that is queried over HTTP."""

    def __init__(self, name: str, api: Api, base_url: str, key: str) -> None:
        self.name, self.rate_per_s = name, api.rate_per_s
        self.identity = f"{name} {base_url}"
        self._api, self._base_url, self._key = api, base_url, key

    async def search(self, client: httpx.AsyncClient, query: str, count: int) -> list[WebHit]:
        try:
            content = bytearray()
            async with client.stream(**self._api.ask(self._base_url, self._key, query, count)) as response:
                async for part in response.aiter_bytes():
                    add_part(content, part, self.name)
        except httpx.TransportError as error:
            raise ProviderBusy(f"{self.name}: {type(error).__name__}: {self._clean(str(error))}") from error
        except httpx.DecodingError as error:
            raise RetrievalError(
                f"{self.name}: the answer is not compressed as its Content-Encoding says ({error})"
            ) from error
        status, said = response.status_code, self._clean(body_text(content)[:300])
        if status in (401, 403):
            remedy = (
                f"is {self._api.key_variable} right?" if self._api.key_variable else "is 'json' among its formats?"
            )
            raise RetrievalError(f"{self.name} answered {status}: {said}; {remedy}")
        if status == 429 or status >= 500:
            raise ProviderBusy(f"{self.name} answered {status}: {said}", wait_s=retry_after_s(response.headers))
        if status != 200:
            raise RetrievalError(f"{self.name} answered {status}: {said}")
        try:
            return self._api.read(json.loads(content))[:count]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise RetrievalError(f"{self.name} answered in an unexpected shape ({error!r}): {said}") from error

    def _clean(self, text: str) -> str:
        return " ".join((text.replace(self._key, "[key]") if self._key else text).split())


class DdgsProvider:
    """DuckDuckGo and others, without a key. `text(query, count)` is `DDGS().text`, on a thread."""

    name = identity = "ddgs"
    rate_per_s = 0.5  # it refuses after two or three searches in a row

    def __init__(self, text: Callable[[str, int], list[dict[str, str]]]) -> None:
        self._text = text

    async def search(self, client: httpx.AsyncClient, query: str, count: int) -> list[WebHit]:
        from ddgs.exceptions import DDGSException

        try:
            rows = await asyncio.to_thread(self._text, query, count)
        except DDGSException as error:
            if str(error) == "No results found.":  # no engine failed, and none found anything
                return []
            raise ProviderBusy(f"ddgs: {type(error).__name__}: {str(error)[:300]}") from error
        try:
            return _hits(rows, "href", "body")[:count]
        except TypeError as error:
            raise RetrievalError(f"ddgs answered in an unexpected shape: {error!r}") from error


def ddgs_text(query: str, count: int) -> list[dict[str, str]]:
    from ddgs import DDGS

    found: list[dict[str, str]] = DDGS(timeout=10).text(query, max_results=count)
    return found


def load_provider(name: str, base_url: str | None = None) -> Provider:
    """The named provider, with its key from the environment.

    Raises:
        UserError: for an unknown name, or a missing key, address or package.
    """
    if name == "ddgs":
        if base_url is not None:
            raise UserError("ddgs has no base_url, because it queries several engines: leave it out")
        import_extra("ddgs", "the default provider", "web")
        return DdgsProvider(ddgs_text)
    if name not in APIS:
        raise unknown_name("web provider", name, ["ddgs", *APIS])
    api = APIS[name]
    where = base_url or api.base_url or os.environ.get("SEARXNG_URL", "")
    if not where:
        raise UserError('searxng needs base_url="https://your.instance", or SEARXNG_URL in the environment')
    if not is_address(where):
        raise UserError(f"{where!r} is not the address of {name}: write it as https://your.instance")
    key = ""
    if api.key_variable is not None:
        given = from_environment(api.key_variable)
        if given is None:
            raise UserError(f"{name} needs a key: set the environment variable {api.key_variable}")
        key = bearer_token(given, api.key_variable)
    return HttpProvider(name, api, where.rstrip("/"), key)


def _hits(rows: Any, url: str, snippet: str) -> list[WebHit]:
    """The results that have a title and an address; engines mix in others. A missing snippet becomes "".

    Raises:
        TypeError: if there are results but none qualifies, which means an unexpected shape.
    """
    if not isinstance(rows, list):
        raise TypeError(f"a list of results was expected, not {str(rows)[:200]}")
    there = [row for row in rows if isinstance(row, dict)]
    named = [row for row in there if isinstance(row.get("title"), str) and isinstance(row.get(url), str) and row[url]]
    if rows and not named:
        raise TypeError(f"results with a title and a {url} were expected, not {str(rows[0])[:200]}")
    # Engines mark the words of the query with tags, and escape the rest.
    texts = [row[snippet] if isinstance(row.get(snippet), str) else "" for row in named]
    return [WebHit(_plain(row["title"]), row[url], _plain(text)) for row, text in zip(named, texts, strict=True)]


def _plain(text: str) -> str:
    return " ".join(html.unescape(_TAG.sub("", text)).split())
