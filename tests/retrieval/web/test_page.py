"""Fetching pages: addresses that are never connected to, limits, and the extracted text."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import ssl
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.servers import Asked, Said, Server, serving
from trl_search.retrieval.web.page import (
    Address,
    GuardedTransport,
    PageError,
    PageLimits,
    fetch_page,
    is_public,
    look_up,
)

pytest.importorskip("trafilatura")

HERE = "127.0.0.2"  # only the tests' server is allowed in addition; the real rule applies to everything else
SENTENCE = "The lantern festival of Orlune is held on the first night of the harvest month. "
PAGE = f"<html><head><title>Orlune</title></head><body><nav>Home</nav><article><p>{SENTENCE * 5}</p></article></body>"


def html(text: str = PAGE, **headers: str) -> Said:
    return Said(text.encode(), headers={"Content-Type": "text/html; charset=utf-8", **headers})


def to(location: str) -> Said:
    return Said(b"", 302, {"Location": location})


def fetch(
    server: Server,
    url: str | None = None,
    *,
    allowed: Callable[[Address], bool] | None = None,
    resolve: Callable[..., Any] = look_up,
    **limits: Any,
) -> str:
    def or_here(address: Address) -> bool:
        return str(address) == HERE or is_public(address)

    limit = PageLimits(ports=frozenset({80, 443, server.port}), **{"timeout_s": 5.0, **limits})
    transport = GuardedTransport(limit.ports, resolve=resolve, allowed=allowed or or_here)
    return asyncio.run(fetch_page(url or server.url, limit, transport=transport))


def test_the_main_text_of_a_page_is_extracted() -> None:
    with serving(lambda asked: html(), host=HERE) as server:
        text = fetch(server)
    assert text.startswith("The lantern festival") and "Home" not in text and "<p>" not in text


def test_plain_text_and_compressed_pages_are_read() -> None:
    packed = Said(gzip.compress(PAGE.encode()), headers={"Content-Type": "text/html", "Content-Encoding": "gzip"})
    plain = Said(b"  just words \n", headers={"Content-Type": "text/plain"})
    with serving(lambda asked: packed if asked.target == "/packed" else plain, host=HERE) as server:
        assert fetch(server) == "just words"
        assert "lantern festival" in fetch(server, f"{server.url}/packed")
        assert {asked.headers["accept-encoding"] for asked in server.asked} == {"gzip"}


WORDS = "灯笼节在奥伦举行，每年秋天都有很多人来。"
LATIN = "Das Lampionfest in Örlune – jedes Jahr für alle “Gäste” von überall her. "
META = '<meta http-equiv="Content-Type" content="text/html; charset={}">'


@pytest.mark.parametrize(
    ("words", "encoding", "header", "meta"),
    [
        (WORDS, "gbk", "; charset=gb2312", ""),
        (WORDS, "gb18030", "", "gbk"),
        (WORDS, "big5", '; charset="Big5"', "utf-8"),  # the header takes precedence over the page
        (WORDS, "utf-8-sig", "; charset=iso-8859-1", "gbk"),  # and a byte-order mark over both
        (WORDS, "utf-16", "", ""),
        (WORDS, "utf-8", "; charset=nonsense", "rot13"),
        (WORDS, "utf-8", "; charset=punycode", "unicode_escape"),
        ("ランタン祭りは毎年秋にオルルンで開かれます。①", "cp932", "; charset=Shift_JIS", ""),
        (LATIN, "cp1252", "; charset=ISO-8859-1", ""),
        ("Фестиваль фонарей проходит в Орлуне каждую осень. ", "koi8-r", "", "koi8-r"),
    ],
)
@pytest.mark.parametrize("kind", ["text/html", "text/plain"])
def test_a_page_is_decoded_with_its_encoding(words: str, encoding: str, header: str, meta: str, kind: str) -> None:
    words = words.replace("灯", "燈").replace("笼", "籠").replace("节", "節") if encoding == "big5" else words
    words = "".join(letter for letter in words if letter.encode(encoding, "ignore"))
    head = META.format(meta) if meta else ""
    page = f"<html><head>{head}</head><body><article><p>{words * 8}</p></article></body></html>"
    said = Said(
        (page if kind == "text/html" or meta else words * 8).encode(encoding), headers={"Content-Type": kind + header}
    )
    with serving(lambda asked: said, host=HERE) as server:
        assert words.strip() in fetch(server)


REFUSED = [
    "http://127.0.0.1:{port}/",
    "http://169.254.169.254/latest/meta-data/",
    "http://[::1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://2130706433:{port}/",  # 127.0.0.1 as a number
    "http://0x7f.1:{port}/",
    "http://0:{port}/",
    "http://localhost:{port}/",
    "http://10.0.0.1/",
    "http://[fd00::1]/",
    "http://224.0.0.1/",
    "//127.0.0.1:{port}/",
]


@pytest.mark.parametrize("target", REFUSED)
def test_no_private_address_is_contacted_directly_or_by_redirect(target: str) -> None:
    with serving(lambda asked: html(), host="127.0.0.1") as private:
        port = private.port
        with serving(lambda asked: to(target.format(port=port)), host=HERE) as server:
            limits = PageLimits(ports=frozenset({80, 443, port, server.port}), timeout_s=5.0)

            def or_here(address: Address) -> bool:
                return str(address) == HERE or is_public(address)

            for url in (server.url, target.format(port=port) if target.startswith("http") else server.url):
                with pytest.raises(PageError, match="not a public address"):
                    transport = GuardedTransport(limits.ports, allowed=or_here)
                    asyncio.run(fetch_page(url, limits, transport=transport))
            assert len(server.asked) in (1, 2)
        assert private.asked == []


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://example.org/", "gopher://example.org/", "data:,hi"])
def test_other_schemes_are_refused(target: str) -> None:
    with serving(lambda asked: to(target), host=HERE) as server:
        for url in (server.url, target):
            with pytest.raises(PageError):
                fetch(server, url)


def test_other_ports_are_refused() -> None:
    with serving(lambda asked: to("http://8.8.8.8:22/"), host=HERE) as server:
        with pytest.raises(PageError, match="port 22 is not one of"):
            fetch(server)
        with pytest.raises(PageError, match=f"port {server.port} is not one of 80, 443"):
            asyncio.run(fetch_page(server.url))


def test_a_password_in_the_url_is_refused() -> None:
    with serving(lambda asked: html(), host=HERE) as server:
        with pytest.raises(PageError, match="carries a password"):
            fetch(server, server.url.replace("http://", "http://user:word@"))
        assert server.asked == []


def test_a_name_is_resolved_once_and_that_address_is_used() -> None:
    answers = [[HERE], ["127.0.0.1"]]  # the second lookup gives the attacker's address
    names: list[str] = []

    async def rebinding(host: str, port: int) -> list[str]:
        names.append(host)
        return answers.pop(0)

    with serving(lambda asked: html(), host=HERE) as server:
        url = f"http://rebind.example:{server.port}/page"
        assert "lantern" in fetch(server, url, resolve=rebinding)
        assert names == ["rebind.example"]
        assert server.asked[0].headers["host"] == f"rebind.example:{server.port}"
        with pytest.raises(PageError, match=r"rebind.example: 127.0.0.1 is not a public address"):
            fetch(server, url, resolve=rebinding)


def test_one_private_address_among_public_ones_is_enough_to_refuse() -> None:
    async def both(host: str, port: int) -> list[str]:
        return [HERE, "192.168.0.1"]

    with serving(lambda asked: html(), host=HERE) as server:
        with pytest.raises(PageError, match=r"192.168.0.1 is not"):
            fetch(server, f"http://both.example:{server.port}/", resolve=both)
        assert server.asked == []


def test_a_hanging_lookup_delays_neither_other_searches_nor_the_end(monkeypatch: Any) -> None:
    answers = threading.Event()

    def hang(host: str, *_: Any, **__: Any) -> list[Any]:
        answers.wait(20)
        raise OSError("timed out")

    async def fetch_many() -> int:
        limits = PageLimits(timeout_s=0.2)
        pages = [asyncio.create_task(fetch_page(f"http://{at}.example/", limits)) for at in range(40)]
        await asyncio.sleep(0)
        read = await asyncio.to_thread(lambda: 7)  # as the store is read
        outcomes = await asyncio.gather(*pages, return_exceptions=True)
        assert all("not read within 0.2 s" in str(outcome) for outcome in outcomes)
        return read

    monkeypatch.setattr("socket.getaddrinfo", hang)
    started = time.monotonic()
    try:
        assert asyncio.run(fetch_many()) == 7
        assert time.monotonic() - started < 15
    finally:
        answers.set()


def test_a_name_without_an_address_is_an_error() -> None:
    async def nowhere(host: str, port: int) -> list[str]:
        raise OSError("Name or service not known")

    with serving(lambda asked: html(), host=HERE) as server, pytest.raises(PageError, match="no such host"):
        fetch(server, "http://nowhere.example/", resolve=nowhere)


def test_tls_is_verified_for_the_name_not_the_address(tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[str | None] = []
    certificate, key = self_signed("page.example", tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.sni_callback = lambda connection, name, context: seen.append(name)

    async def here(host: str, port: int) -> list[str]:
        return [HERE]

    with serving(lambda asked: html(), host=HERE) as server:
        server._listener.socket = context.wrap_socket(server._listener.socket, server_side=True)
        with pytest.raises(PageError, match="CERTIFICATE_VERIFY_FAILED"):  # self-signed
            fetch(server, f"https://page.example:{server.port}/", resolve=here)
    assert seen == ["page.example"]


def self_signed(name: str, folder: Path) -> tuple[Path, Path]:
    import datetime

    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(certificate.public_bytes(encoding))
    (folder / "key.pem").write_bytes(
        key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


def test_redirects_are_followed_up_to_a_limit() -> None:
    def answer(asked: Asked) -> Said:
        left = int(asked.target.strip("/") or 0)
        return to(f"/{left - 1}") if left else html()

    with serving(answer, host=HERE) as server:
        assert "lantern" in fetch(server, f"{server.url}/3", max_redirects=3)
        with pytest.raises(PageError, match="more than 3 redirects"):
            fetch(server, f"{server.url}/4", max_redirects=3)


def endless(wfile: Any, pause_s: float, chunk: bytes) -> None:
    wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html><body><article>")
    until = time.monotonic() + 120
    while time.monotonic() < until:
        wfile.write(chunk)
        time.sleep(pause_s)


def test_an_endless_page_is_truncated_and_its_beginning_read() -> None:
    def write(wfile: Any) -> None:
        endless(wfile, 0.0, f"<p>{SENTENCE * 20}</p>".encode())

    with serving(lambda asked: Said(by_hand=write), host=HERE) as server:
        started = time.monotonic()
        text = fetch(server, max_bytes=50_000)
        assert time.monotonic() - started < 60
    assert "lantern" in text and len(text) <= 50_000


def test_a_decompression_bomb_is_truncated() -> None:
    bomb = gzip.compress(b"<html><body><p>" + b"word " * 10_000_000)
    assert len(bomb) < 200_000
    said = Said(bomb, headers={"Content-Type": "text/html", "Content-Encoding": "gzip"})
    with serving(lambda asked: said, host=HERE) as server:
        assert len(fetch(server, max_bytes=20_000)) <= 20_000


def test_a_decompression_bomb_uses_little_memory() -> None:
    bomb = gzip.compress(bytes(64 << 20))  # 64 KB, which may arrive in one read
    said = Said(bomb, headers={"Content-Type": "text/plain", "Content-Encoding": "gzip"})
    with serving(lambda asked: said, host=HERE) as server:
        tracemalloc.start()
        try:
            assert len(fetch(server, max_bytes=20_000)) == 20_000
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("encoding", ["gzip, gzip", "br", "deflate", "zstd"])
def test_other_content_encodings_are_refused_by_name(encoding: str) -> None:
    bomb = gzip.compress(gzip.compress(bytes(1 << 20)))
    said = Said(bomb, headers={"Content-Type": "text/plain", "Content-Encoding": encoding})
    refused = pytest.raises(PageError, match=f"Content-Encoding is '{encoding}'")
    with serving(lambda asked: said, host=HERE) as server, refused:
        fetch(server)


@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_page_that_arrives_slowly_ends_at_the_timeout(part: str) -> None:
    stop = threading.Event()

    def drip(wfile: Any) -> None:
        if part == "body":
            wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n")
        while not stop.wait(0.02):
            wfile.write(b"H")
            wfile.flush()

    with serving(lambda asked: Said(by_hand=drip), host=HERE) as server:
        started = time.monotonic()
        with pytest.raises(PageError, match=r"not read within 0.3 s"):
            fetch(server, timeout_s=0.3)
        assert time.monotonic() - started < 60
        stop.set()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (Said(b"gone", 404), "answered 404"),
        (Said(b"%PDF", headers={"Content-Type": "application/pdf"}), "application/pdf, which is not read"),
        (Said(b"", headers={"Content-Type": "text/html"}), "no text"),
        (Said(b"x" * 99, headers={"Content-Type": "text/html", "Content-Encoding": "gzip"}), "is not the gzip"),
        (Said(b"", 302, {"Location": "http://a:bad"}), "InvalidURL|port"),
        (Said(by_hand=lambda wfile: wfile.write(b"no http at all\r\n\r\n")), "ProtocolError"),
    ],
)
def test_other_content_is_an_error(said: Said, message: str) -> None:
    with serving(lambda asked: said, host=HERE) as server, pytest.raises(PageError, match=message):
        fetch(server)


@pytest.mark.parametrize(
    ("said", "passing"),
    [
        (Said(b"", 404), False),
        (Said(b"", 403), False),
        (Said(b"%PDF", headers={"Content-Type": "application/pdf"}), False),
        (Said(b"", headers={"Content-Type": "text/html"}), False),
        (to("http://10.0.0.1/"), False),
        (Said(b"", 429), True),
        (Said(b"", 503), True),
        (Said(by_hand=lambda wfile: None), True),
        (Said(by_hand=lambda wfile: time.sleep(1)), True),
        (to("http://nowhere.invalid/"), True),
    ],
)
def test_temporary_and_permanent_errors_are_distinguished(said: Said, passing: bool) -> None:
    async def look(host: str, port: int) -> list[str]:
        if host == "nowhere.invalid":
            raise OSError("Temporary failure in name resolution")
        return [host]

    with serving(lambda asked: said, host=HERE) as server, pytest.raises(PageError) as raised:
        fetch(server, resolve=look, timeout_s=0.5 if said.by_hand else 60.0)
    assert raised.value.passing == passing


NOT_PUBLIC = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.2.0/24",
    "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    "::/128", "::1/128", "::ffff:0:0/104", "::ffff:7f00:0/104", "64:ff9b::a00:0/104", "64:ff9b::7f00:0/104",
    "100::/64", "3fff::/20", "5f00::/16",
    "2001:db8::/32", "2002:7f00::/24", "2002:c0a8::/32", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
]  # fmt: skip


@pytest.mark.parametrize("host", ["xn--a", "xn--0", "xn--a:81", "user:p@xn--a", "a..b", "[::1", "\ud800"])
def test_a_malformed_host_is_an_error(host: str) -> None:
    with pytest.raises(PageError):
        asyncio.run(fetch_page(f"http://{host}/"))


@given(st.data())
def test_no_address_of_a_special_range_is_public(data: st.DataObject) -> None:
    network = ipaddress.ip_network(data.draw(st.sampled_from(NOT_PUBLIC)))
    offset = data.draw(st.integers(0, network.num_addresses - 1))
    assert not is_public(network[offset])


@given(st.ip_addresses(v=4))
def test_an_embedded_address_is_as_public_as_the_plain_one(plain: ipaddress.IPv4Address) -> None:
    mapped = ipaddress.IPv6Address(f"::ffff:{plain}")
    translated = ipaddress.IPv6Address(int(ipaddress.IPv6Address("64:ff9b::")) + int(plain))
    sixtofour = ipaddress.IPv6Address((0x2002 << 112) | (int(plain) << 80))
    assert is_public(mapped) == is_public(plain)
    assert is_public(translated) <= is_public(plain)
    assert is_public(sixtofour) <= is_public(plain)
    assert is_public(plain) <= plain.is_global


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:2800:220:1::1", "::ffff:8.8.8.8"])
def test_ordinary_addresses_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))
