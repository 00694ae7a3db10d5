"""What a word on a command line means as something to search. `serve`, `search`, `eval` and `chat` all ask here.

indexes/wiki             an index folder                 bm25, dense, web ...   a kind, with its options
http://localhost:8000    a server                        world                  the embedded encyclopedia
runs/qwen3b              what that run searched, by its run.json
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
WORLD_SIZE = (2000, 0)  # its passages, and its seed


@dataclass(frozen=True)
class Searched:
    """A kind of retriever with its options.

    Attributes:
        world_size (`tuple[int, int]`, *optional*): The passages and the seed of the embedded world, where that is
            what is searched.
    """

    kind: str
    options: dict[str, Any]
    world_size: tuple[int, int] | None = None

    @cached_property
    def world(self) -> World | None:
        from trl_search.data.world import generate_world

        return None if self.world_size is None else generate_world(*self.world_size)

    def load(self) -> Retriever:
        """Opens it. An index is read now, a server is asked later."""
        return load_retriever(self.kind, **self.load_options())

    def load_options(self) -> dict[str, Any]:
        """The options of the kind, with the world's passages among them."""
        return self.options if self.world is None else {**self.options, "passages": self.world.passages}

    def described(self) -> dict[str, Any]:
        """The options as a record of settings holds them: the world by its size."""
        if self.world_size is None:
            return self.options
        return {**self.options, "passages": f"of the world: {self.world_size[0]}, seed {self.world_size[1]}"}

    def content(self) -> dict[str, Any]:
        """The same by what is in it: an index folder by its corpus and options, wherever it lies; no secrets."""
        return {"kind": self.kind, "options": with_contents(without_secrets(self.described()))}


def resolve_searched(
    word: str,
    options: Mapping[str, Any] | None = None,
    *,
    world_size: tuple[int, int] = WORLD_SIZE,
    in_world: bool = False,
) -> Searched:
    """What a word means as something to search. Nothing is opened yet.

    Args:
        options (`Mapping`, *optional*): Further options of the kind. They overrule those that a run has recorded.
        world_size (`tuple[int, int]`): Passages and seed of the embedded world.
        in_world (`bool`): The questions are the world's. A kind without a corpus of its own then searches the world.

    Raises:
        UserError: where the word means nothing, or names a run that has not recorded what it searched.

    Example:
        >>> resolve_searched("runs/quickstart")
        Searched(kind='bm25', options={}, world_size=(2000, 0))
    """
    if word == WORLD:
        return Searched("bm25", dict(options or {}), world_size)
    # An index may lie in the folder of a run, where a checkpoint lies, too.
    is_index = (Path(word).expanduser() / MANIFEST).is_file()
    if not is_index and (record := run_record(word)) is not None:
        return _recorded(word, record, options or {})
    kind, resolved = resolve_retriever(word, options)
    takes_passages = "passages" in inspect.signature(RETRIEVERS.get(kind)).parameters
    of_world = in_world and takes_passages and not {"index", "corpus", "faiss_file"} & resolved.keys()
    return Searched(kind, resolved, world_size if of_world else None)


def run_record(word: str) -> dict[str, Any] | None:
    """What the run that a word names recorded of its questions and retriever; `None` where the word names no run."""
    info = read_run_file(word)
    if info is None:
        return None
    return info["task"] if isinstance(info.get("task"), dict) else {}


def _recorded(word: str, task: Mapping[str, Any], options: Mapping[str, Any]) -> Searched:
    """What the run searched, by the keys of its recipe."""
    kind = task.get("retriever")
    if not isinstance(kind, str) or kind == word:
        raise UserError(
            f"{word} has not recorded what it searched: its trainer was given a retriever object; say what to search "
            "with --retriever, an index folder, the address of a server or a kind"
        )
    recorded = parse_object(task.get("retriever_options") or "{}", f"{word}: retriever_options", "{}")
    merged = {**recorded, **options}
    if secret := [name for name, value in merged.items() if REDACTED in str(value)]:
        raise UserError(
            f"{word} searched {kind} with a secret that no run records: give it again, "
            f"--retriever_options '{{\"{secret[0]}\": ...}}'"
        )
    size = (int(task.get("world_passages", WORLD_SIZE[0])), int(task.get("world_seed", WORLD_SIZE[1])))
    return resolve_searched(kind, merged, world_size=size, in_world=task.get("questions") == WORLD)
