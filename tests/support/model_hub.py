"""A small hub on loopback that accepts models, with the routes that huggingface_hub uses to create, fill and read one.

POST /api/repos/create                           creates it
GET  /api/models/<repo>                          whether it exists, whether it is private
POST /api/models/<repo>/preupload/main           which files use LFS: weights and images, as on the hub
POST /<repo>.git/info/lfs/objects/batch          where to upload them
PUT  /lfs/<sha256>                               their bytes
POST /api/models/<repo>/commit/main              all other files, and the list of LFS files
HEAD, GET /<repo>/resolve/main/<file>            reads a file
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.servers import Asked, Said, Server, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_the_tests_only"


@dataclass
class ModelHub:
    """`models` is repository -> file name -> bytes. `cards` has the metadata of the model cards."""

    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    refuse: int = 0
    objects: dict[str, bytes] = field(default_factory=dict)
    server: Server | None = None

    @property
    def url(self) -> str:
        assert self.server is not None
        return self.server.url

    @property
    def asked(self) -> list[tuple[str, str]]:
        assert self.server is not None
        return [(asked.method, urlsplit(asked.target).path) for asked in self.server.asked]

    def answer(self, asked: Asked) -> Said:
        path = unquote(urlsplit(asked.target).path)
        if asked.method == "PUT" and path.startswith("/lfs/"):
            self.objects[path.removeprefix("/lfs/")] = asked.body
            return Said(b"")
        if asked.headers.get("authorization") != f"Bearer {TOKEN}":
            return Said({"error": "Invalid username or password."}, 401)
        if self.refuse:
            return Said({"error": "You have no rights to it."}, self.refuse)
        if path == "/api/repos/create":
            return self._create(asked.json)
        if path == "/api/validate-yaml":
            return Said({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            return self._about(match[1])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            names = [file["path"] for file in asked.json["files"]]
            return Said({"files": [{"path": n, "uploadMode": _mode(n), "shouldIgnore": False} for n in names]})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return Said({"transfer": "basic", "objects": [self._place(one) for one in asked.json["objects"]]})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self._commit(match[1], asked.body)
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/tree/[^/]+/.+", path):  # a tree of folders; models here have none
            return _missing("EntryNotFound")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._file(match[1], match[2], asked.method)
        return _missing("RepoNotFound")

    def _create(self, wanted: dict[str, Any]) -> Said:
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        address = {"url": f"{self.url}/{name}", "name": name, "id": "1"}
        if name in self.models:
            return Said({**address, "error": "You already created this model repo"}, 409)
        self.models[name] = {}
        self.private[name] = wanted.get("private", False) or wanted.get("visibility") == "private"
        return Said(address)

    def _about(self, name: str) -> Said:
        if name not in self.models:
            return _missing("RepoNotFound")
        siblings = [{"rfilename": file} for file in self.models[name]]
        about = {"_id": "1", "id": name, "sha": COMMIT, "siblings": siblings, "private": self.private.get(name, False)}
        return Said({**about, "tags": [], "cardData": self.cards.get(name)})

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        put = {"href": f"{self.url}/lfs/{wanted['oid']}", "header": {}}
        return {"oid": wanted["oid"], "size": wanted["size"], "actions": {"upload": put}}

    def _commit(self, name: str, body: bytes) -> Said:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                self.models[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
                self.models[name][value["path"]] = content
        return Said({"commitUrl": f"{self.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})

    def _file(self, name: str, file: str, method: str) -> Said:
        content = self.models.get(name, {}).get(file)
        if content is None:
            return _missing("EntryNotFound" if name in self.models else "RepoNotFound")
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if method == "HEAD":
            return Said(b"", headers={**headers, "Content-Length": str(len(content))})
        return Said(content, headers=headers)


def _mode(name: str) -> str:
    return "lfs" if name.endswith((".safetensors", ".png", ".parquet")) else "regular"


def _missing(code: str) -> Said:
    return Said({"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": code})


@contextlib.contextmanager
def model_hub() -> Iterator[ModelHub]:
    hub = ModelHub()
    with serving(hub.answer) as server:
        hub.server = server
        yield hub
