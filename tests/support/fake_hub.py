"""A small hub on loopback: dataset repositories of a few files, with the routes that huggingface_hub and datasets use.

    GET  /api/datasets/<repo>[/revision/<r>][?blobs=true]     its files, with sizes and SHA-256
    GET  /api/datasets/<repo>/tree/<r>/<folder>               the same for a folder
    POST /api/datasets/<repo>/paths-info/<r>                  for some paths
    HEAD /datasets/<repo>/resolve/<r>/<file>                  ETag, length, commit
    GET  the same                                             the bytes, or a range of them

`cut_after` closes the connections of the next downloads after these numbers of bytes; with `broken`, later downloads
fail; `stall_after` sends that many bytes of a file and then nothing until the hub is closed; with `ignores_ranges`,
files are only sent whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Event
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.servers import Asked, Said, Server, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Repository -> file name -> bytes."""

    repositories: dict[str, dict[str, bytes]]
    cut_after: list[int] = field(default_factory=list)
    broken: bool = False
    stall_after: dict[str, int] = field(default_factory=dict)
    ignores_ranges: bool = False
    wrong_bytes: set[str] = field(default_factory=set)
    server: Server | None = None
    closing: Event = field(default_factory=Event)

    @property
    def url(self) -> str:
        assert self.server is not None
        return self.server.url

    @property
    def ranges(self) -> list[tuple[str, str]]:
        """The downloads in order: file name and `Range` header."""
        assert self.server is not None
        gets = [asked for asked in self.server.asked if asked.method == "GET" and "/resolve/" in asked.target]
        return [(asked.target.rsplit("/", 1)[1], asked.headers.get("range", "")) for asked in gets]

    def answer(self, asked: Asked) -> Said:
        url = urlsplit(asked.target)
        path = unquote(url.path)
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            return self._about(match[1], blobs="blobs" in parse_qs(url.query))
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            return self._tree(match[1], match[2], recursive=parse_qs(url.query).get("recursive") == ["True"])
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/[^/]+", path):
            return self._paths(match[1], asked)
        if match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._file(match[1], match[2], asked)
        return _missing("RepoNotFound")

    def _about(self, repository: str, *, blobs: bool) -> Said:
        if repository not in self.repositories:
            return _missing("RepoNotFound", 401)
        siblings: list[dict[str, Any]] = []
        for name, content in self.repositories[repository].items():
            entry: dict[str, Any] = {"rfilename": name}
            if blobs:
                entry |= {"size": len(content), "blobId": "0" * 40, "lfs": _lfs(content)}
            siblings.append(entry)
        about = {"_id": "1", "id": repository, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        return Said({**about, "gated": False, "disabled": False, "downloads": 0, "likes": 0})

    def _tree(self, repository: str, folder: str, *, recursive: bool) -> Said:
        files = self.repositories.get(repository)
        if files is None:
            return _missing("RepoNotFound", 401)
        inside = {name: content for name, content in files.items() if name.startswith(f"{folder}/") or not folder}
        if not inside:
            return _missing("EntryNotFound")
        entries = [self._entry(name, content) for name, content in inside.items()]
        if not recursive:
            depth = folder.count("/") + 1 if folder else 0
            folders = {"/".join(name.split("/")[: depth + 1]) for name in inside if name.count("/") > depth}
            entries = [entry for entry in entries if entry["path"].count("/") == depth]
            entries += [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)]
        return Said(entries)

    def _paths(self, repository: str, asked: Asked) -> Said:
        files = self.repositories.get(repository)
        if files is None:
            return _missing("RepoNotFound", 401)
        form = asked.headers.get("content-type", "").startswith("application/x-www-form-urlencoded")
        wanted = parse_qs(asked.body.decode())["paths"] if form else json.loads(asked.body)["paths"]
        folders = {name.rsplit("/", depth)[0] for name in files for depth in range(1, name.count("/") + 1)}
        found = [self._entry(name, files[name]) for name in wanted if name in files]
        found += [{"type": "directory", "path": n, "size": 0, "oid": "0" * 40} for n in wanted if n in folders]
        return Said(found)

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(content), "oid": "0" * 40, "lfs": _lfs(content)}

    def _file(self, repository: str, name: str, asked: Asked) -> Said:
        content = self.repositories.get(repository, {}).get(name)
        if content is None:
            return _missing("EntryNotFound")
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if asked.method == "HEAD":
            return Said(b"", headers={**headers, "Content-Length": str(len(content))})
        if self.broken and not self.cut_after:
            return Said(b"out of order", 500)
        served = bytes(len(content)) if name in self.wrong_bytes else content
        start = int(match[1]) if (match := re.match(r"bytes=(\d+)-", asked.headers.get("range", ""))) else 0
        start = 0 if self.ignores_ranges else start
        body, status = served[start:], 206 if start else 200
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.cut_after:
            return _piece(body, status, headers, self.cut_after.pop(0))
        if name in self.stall_after:
            return _piece(body, status, headers, self.stall_after.pop(name), self.closing)
        return Said(body, status, headers)


def _piece(body: bytes, status: int, headers: dict[str, str], sent: int, wait: Event | None = None) -> Said:
    """Sends the first bytes of a response, then closes the connection, at once or after `wait`."""

    def write(socket: Any) -> None:
        lines = [f"HTTP/1.1 {status} OK", *(f"{name}: {value}" for name, value in headers.items())]
        head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "Connection: close", "", ""])
        socket.write(head.encode() + body[:sent])
        socket.flush()
        if wait is not None:
            wait.wait(60)

    return Said(by_hand=write)


def _lfs(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "oid": "0" * 64, "pointerSize": 134}


def _missing(code: str, status: int = 404) -> Said:
    return Said({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})


@contextlib.contextmanager
def fake_hub(repositories: dict[str, dict[str, bytes]]) -> Iterator[FakeHub]:
    hub = FakeHub(repositories)
    with serving(hub.answer) as server:
        hub.server = server
        try:
            yield hub
        finally:
            hub.closing.set()
