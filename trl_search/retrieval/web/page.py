"""Fetches the text of web pages. Every page is treated as hostile: a policy chooses the query, strangers write the
page.

- Only `http` and `https`, on ports 80 and 443, and only public addresses. A host name is looked up once,
  all of its addresses are checked, and the connection goes to one of them, with the name in `Host` and in the TLS
  check. So DNS rebinding, where a name later resolves to a different address, has no effect. Each redirect is checked
  in the same way.
- At most `max_bytes` are read, compressed or not, within at most `timeout_s` from the first request to the extracted
  text.
- trafilatura extracts the text from the HTML in a child process (`page_text.py`).

Proxies of the environment are ignored: a proxy would resolve the name again.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx

from trl_search.common.errors import UserError
from trl_search.common.tls import tls_context
from trl_search.retrieval.threads import on_daemon_thread
from trl_search.retrieval.web import page_text
from trl_search.retrieval.web.charset import decode

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]

READABLE = ("text/html", "application/xhtml+xml", "text/plain")
_HEADERS = {
    "User-Agent": "Mozilla/5.0 (compatible; trl-search)",
    "Accept": "text/html, text/plain;q=0.9",
    "Accept-Encoding": "gzip",
}
_REDIRECTS = {301, 302, 303, 307, 308}
_PASSING = {408, 425, 429}  # and all of 5xx
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Special ranges that this Python may not know yet: documentation (RFC 9637), segment routing (RFC 9602).
_RESERVED_LATELY = [ipaddress.ip_network(one) for one in ("3fff::/20", "5f00::/16")]


class PageError(RuntimeError):
    """A page could not be fetched, or has no text. The message says why.

    Args:
        passing (`bool`): Whether another attempt may succeed, because the reason was the network, the site or this
            machine, not the page.
    """

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


@dataclass(frozen=True)
class PageLimits:
    """Limits for fetching one page.

    Args:
        max_bytes (`int`): Decompressed bytes of the page; the rest is not read.
        timeout_s (`float`): From the first lookup to the extracted text.
        max_redirects (`int`): Redirects in a row.
        ports (`frozenset[int]`): Ports that may be connected to.
    """

    max_bytes: int = 2 << 20
    timeout_s: float = 10.0
    max_redirects: int = 5
    ports: frozenset[int] = frozenset({80, 443})


def is_public(address: Address) -> bool:
    """Whether an address belongs to the open internet: not private, loopback, link-local, multicast, reserved, ...

    An IPv6 address that embeds an IPv4 address (mapped, 6to4, Teredo, NAT64) is public only if both are.
    """
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        inner = [address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.is_site_local or any(address in one for one in _RESERVED_LATELY):
            return False
        if not all(is_public(one) for one in inner if one is not None):
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


async def look_up(host: str, port: int) -> list[str]:
    """The addresses of a host, from the operating system."""
    # Not on the loop's default threads, which read the store for all other searches: a dead name server takes 30 s.
    lookup, _ = on_daemon_thread(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    found = await lookup
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class GuardedTransport(httpx.AsyncBaseTransport):
    """Connects only to public addresses, and to exactly the address that was checked.

    Args:
        ports (`frozenset[int]`): Ports that may be connected to.
        resolve (`Callable`): `await resolve(host, port)` returns the addresses of a host.
        allowed (`Callable`): Whether an address may be connected to.
    """

    def __init__(
        self, ports: frozenset[int], *, resolve: Resolve = look_up, allowed: Callable[[Address], bool] = is_public
    ) -> None:
        self._ports, self._resolve, self._allowed = ports, resolve, allowed
        # No kept connections: the pool would reuse one by its address for a different host name.
        self._inner = httpx.AsyncHTTPTransport(
            verify=tls_context(), trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        port = url.port or {"http": 80, "https": 443}.get(url.scheme)
        if port is None:
            raise PageError(f"{url.scheme}: is neither http nor https")
        if port not in self._ports:
            raise PageError(f"{url.host}: port {port} is not one of {', '.join(map(str, sorted(self._ports)))}")
        host = url.raw_host.decode("ascii")
        address = await self._checked_address(host, port)
        extensions = request.extensions if _is_address(host) else {**request.extensions, "sni_hostname": host}
        # `Host` is in the headers already, with the name.
        pinned = httpx.Request(
            request.method,
            url.copy_with(host=address),
            headers=request.headers,
            stream=request.stream,
            extensions=extensions,
        )
        return await self._inner.handle_async_request(pinned)

    async def _checked_address(self, host: str, port: int) -> str:
        try:
            addresses = await self._resolve(host.strip("[]"), port)
        except (OSError, UnicodeError) as error:
            raise PageError(f"{host}: no such host ({error})", passing=True) from error
        for address in addresses:
            try:
                fine = self._allowed(ipaddress.ip_address(address))
            except ValueError:  # "fe80::1%eth0" in a form that this Python does not read
                fine = False
            if not fine:
                raise PageError(f"{host}: {address} is not a public address")
        if not addresses:
            raise PageError(f"{host}: no such host", passing=True)
        return addresses[0]

    async def aclose(self) -> None:
        await self._inner.aclose()


async def fetch_page(url: str, limits: PageLimits = PageLimits(), *, transport: GuardedTransport | None = None) -> str:
    """The text of a page.

    Raises:
        PageError: whatever goes wrong.
    """
    deadline = time.monotonic() + limits.timeout_s
    try:
        async with asyncio.timeout(limits.timeout_s):
            async with httpx.AsyncClient(
                transport=transport or GuardedTransport(limits.ports), trust_env=False, headers=_HEADERS, timeout=None
            ) as client:
                content_type, body = await _read(client, url, limits)
            text = await _text(content_type, body, deadline - time.monotonic())
    except TimeoutError:
        raise PageError(f"{url[:200]}: not read within {limits.timeout_s:.3g} s", passing=True) from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise PageError(f"{url[:200]}: {type(error).__name__}: {error}", passing=True) from error
    except page_text.TextError as error:
        raise PageError(f"{url[:200]}: {error}") from error
    except UnicodeError as error:  # httpx decodes a host such as xn--a on access
        raise PageError(f"{url[:200]}: its host is malformed ({error})") from error
    if not text:
        raise PageError(f"{url[:200]}: no text in it")
    return text


async def _text(content_type: str, body: bytes, within_s: float) -> str:
    decoded = decode(body, content_type)
    if _kind(content_type) == "text/plain":
        return (body.decode("utf-8", "replace") if decoded is None else decoded).strip()
    if decoded is not None:  # else trafilatura guesses
        body = decoded.encode("utf-8", "replace")
    # Not on the loop's default threads either.
    text, _ = on_daemon_thread(lambda: page_text.extract(body, within_s))
    try:
        return await text
    except ImportError as error:
        raise UserError(f"pages are read by trafilatura ({error}): pip install 'trl-search[web]'") from None


async def _read(client: httpx.AsyncClient, url: str, limits: PageLimits) -> tuple[str, bytes]:
    """Returns content type and body. Redirects are followed here, so that each is checked as a separate request."""
    request = client.build_request("GET", url)
    for _ in range(limits.max_redirects + 1):
        if request.url.userinfo:
            raise PageError(f"{request.url.host}: the URL carries a password")
        response = await client.send(request, stream=True, follow_redirects=False)
        try:
            if response.status_code in _REDIRECTS and "Location" in response.headers:
                request = client.build_request("GET", request.url.join(response.headers["Location"]))
                continue
            return await _read_body(response, limits.max_bytes)
        finally:
            await response.aclose()
    raise PageError(f"{url[:200]}: more than {limits.max_redirects} redirects")


async def _read_body(response: httpx.Response, max_bytes: int) -> tuple[str, bytes]:
    url = str(response.request.url)[:200]
    status = response.status_code
    if status != 200:
        raise PageError(f"{url}: answered {status}", passing=status in _PASSING or status >= 500)
    content_type = response.headers.get("Content-Type", "text/html")
    kind = _kind(content_type)
    if kind not in READABLE:
        raise PageError(f"{url}: is {kind[:80]}, which is not read")
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip"):  # with nested encodings, a kilobyte can unpack to gigabytes
        raise PageError(f"{url}: its Content-Encoding is {encoding[:80]!r}, and only gzip is read")
    unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS) if encoding == "gzip" else None
    body = bytearray()
    try:
        # httpx would unpack a whole chunk before its size is known.
        async for chunk in response.aiter_raw():
            left = max_bytes - len(body)
            body += chunk[:left] if unpacker is None else unpacker.decompress(chunk, left)
            if len(body) >= max_bytes or (unpacker is not None and unpacker.eof):
                break
    except zlib.error as error:
        raise PageError(f"{url}: is not the gzip that it says it is ({error})") from error
    return content_type, bytes(body)


def _kind(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
