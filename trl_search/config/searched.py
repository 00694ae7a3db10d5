"""Resolves a word on the command line to a retriever, for `serve`, `search`, `eval` and `chat`.

indexes/wiki             an index folder                 bm25, dense, web ...   a kind, with its options
http://localhost:8000    a server                        world                  the embedded encyclopedia
runs/qwen3b              the retriever of that run, from its run.json
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_search.common.errors import UserError
from trl_search.common.files import parse_object
from trl_search.common.provenance import REDACTED, without_secrets
from trl_search.config.run_file import read_run_file
from trl_search.retrieval import Retriever, load_retriever, resolve_retriever
from trl_search.retrieval.index.build_folder import MANIFEST
from trl_search.retrieval.index.contents import with_contents
from trl_search.retrieval.registry import RETRIEVERS

if TYPE_CHECKING:
    from trl_search.data.world import World

WORLD = "world"
WORLD_SIZE = (2000, 0)  # passages, seed


@dataclass(frozen=True)
class Searched:
    """A kind of retriever with its options."""

    kind: str
    options: dict[str, Any]
    world_size: tuple[int, int] | None = None  # passages and seed of the embedded world, if it is the corpus

    @cached_property
    def world(self) -> World | None:
        if self.world_size is None:
            return None
        from trl_search.data.world import generate_world

        return generate_world(*self.world_size)

    def load(self) -> Retriever:
        """Opens the retriever. An index is read now; a server is contacted at the first search."""
        return load_retriever(self.kind, **self.load_options())

    def load_options(self) -> dict[str, Any]:
        """The options of the kind, including the world's passages."""
        return self.options if self.world is None else {**self.options, "passages": self.world.passages}

    def described(self) -> dict[str, Any]:
        """The options for a record of settings, which gives the world by its size."""
        if self.world_size is None:
            return self.options
        return {**self.options, "passages": f"of the world: {self.world_size[0]}, seed {self.world_size[1]}"}

    def content(self) -> dict[str, Any]:
        """Identifies the retriever by content, without secrets: an index by its corpus and options, not its path."""
        return {"kind": self.kind, "options": with_contents(without_secrets(self.described()))}


def resolve_searched(
    word: str,
    options: Mapping[str, Any] | None = None,
    *,
    world_size: tuple[int, int] = WORLD_SIZE,
    in_world: bool = False,
) -> Searched:
    """Resolves a word to a retriever, which is not opened yet. The options override those recorded by a run. With
    questions of the world (`in_world`), a kind without a corpus searches the world, of `world_size` passages and seed.

    Raises:
        UserError: if the word is unknown, or is a run that has not recorded its retriever.

    Example:
        >>> resolve_searched("runs/quickstart")
        Searched(kind='bm25', options={}, world_size=(2000, 0))
    """
    if word == WORLD:
        return Searched("bm25", dict(options or {}), world_size)
    # An index folder may lie within a run folder, as checkpoints do.
    is_index = (Path(word).expanduser() / MANIFEST).is_file()
    if not is_index and (record := run_record(word)) is not None:
        return _recorded(word, record, options or {})
    kind, resolved = resolve_retriever(word, options)
    takes_passages = "passages" in inspect.signature(RETRIEVERS.get(kind)).parameters
    of_world = in_world and takes_passages and not {"index", "corpus", "faiss_file"} & resolved.keys()
    return Searched(kind, resolved, world_size if of_world else None)


def run_record(word: str) -> dict[str, Any] | None:
    """The questions and retriever that a run recorded; `None` if `word` is not a run."""
    info = read_run_file(word)
    if info is None:
        return None
    return info["task"] if isinstance(info.get("task"), dict) else {}


def _recorded(word: str, task: Mapping[str, Any], options: Mapping[str, Any]) -> Searched:
    """The retriever of a run, from the recorded keys of its recipe."""
    kind = task.get("retriever")
    if not isinstance(kind, str) or kind == word:
        raise UserError(
            f"{word} has not recorded its retriever, because its trainer was given a retriever object: give "
            "--retriever, an index folder, the address of a server or a kind"
        )
    recorded = parse_object(task.get("retriever_options") or "{}", f"{word}: retriever_options", "{}")
    merged = {**recorded, **options}
    if secret := [name for name, value in merged.items() if REDACTED in str(value)]:
        raise UserError(
            f"{word} searched {kind} with a secret, which runs do not record: give it again with "
            f"--retriever_options '{{\"{secret[0]}\": ...}}'"
        )
    size = (int(task.get("world_passages", WORLD_SIZE[0])), int(task.get("world_seed", WORLD_SIZE[1])))
    return resolve_searched(kind, merged, world_size=size, in_world=task.get("questions") == WORLD)
