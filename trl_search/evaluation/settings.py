"""`settings.json` records every setting that defines the result. An evaluation resumes only with the same settings.

It compares what an answer depends on: the hash of the weights, the prompt that the policy reads, the content of the
index and the text of the questions, but not their paths. Versions, machine and concurrency are recorded per session
and may change, because they should not change an answer. Sets and modes may be added or left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_search.common.differences import differences
from trl_search.common.errors import UserError
from trl_search.common.files import read_object
from trl_search.common.hub import cached_folder
from trl_search.common.provenance import without_secrets
from trl_search.config.agent import AgentSettings
from trl_search.environment import Environment, SearchEnvironment
from trl_search.evaluation.evaluate import mode_protocol, rag_messages
from trl_search.policies.adapters import read_adapter
from trl_search.policies.loading import read_config
from trl_search.retrieval.index.contents import index_folder
from trl_search.retrieval.index.folder import MANIFEST, read_manifest
from trl_search.types import Passage

FORMAT = 1
SETTINGS = "settings.json"
# Settings that affect the result.
_COMPARED = ("format", "model", "backend", "dtype", "sampling", "agent", "prompts", "retriever")
# The files of a model. Its folder may also hold logs, results and optimizer states.
_MODEL_FILES = re.compile(
    r".*\.safetensors|(pytorch|adapter)_model.*\.bin|.*\.index\.json|.*\.model|(adapter_|generation_)?config\.json"
    r"|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|chat_template.*"
)
_SHOWN = 60  # characters of a value in a message about different settings
_PLACEHOLDER = Passage("0", "{title}", "{text}")


def describe_model(name: str) -> dict[str, Any]:
    """Identifies a model by its content: the hash of a folder's files, or name and revision of a hub repository."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        read_config(name)  # which brings it into the cache
        cached = cached_folder(name)
        return {"name": name, "revision": None if cached is None else cached.name}
    adapter = read_adapter(folder)
    base = {} if adapter is None else {"adapter_of": describe_model(adapter["base_model_name_or_path"])}
    return {"sha256": model_sha256(folder), **base}


def model_sha256(folder: Path) -> str:
    """A hash of the files of a model: weights, configuration, tokenizer."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and _MODEL_FILES.fullmatch(path.name))
    files += sorted(folder.glob("additional_chat_templates/*.jinja"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as content:
            digest.update(f"{path.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def describe_retriever(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Describes a retriever: its kind, its options without secrets, and the manifest of every index in them."""
    return {"kind": kind, "options": without_secrets(options), "indexes": [*_indexes(options)]}


def prompts_of(
    modes: Sequence[str], tokenizer: PreTrainedTokenizerBase, environment: Environment, agent: AgentSettings
) -> dict[str, str]:
    """The prompt of each mode as the policy reads it, with `{question}` in place of the question."""
    prompts = {}
    for mode in modes:
        written = mode_protocol(mode, tokenizer, environment, agent)
        messages = written.messages("{question}")
        if mode == "rag":
            assert isinstance(environment, SearchEnvironment)
            messages = rag_messages(written, environment, "{question}", [_PLACEHOLDER])
        prompts[mode] = written.decode(written.prompt_ids(messages))
    return prompts


def settings_hash(settings: Mapping[str, Any]) -> str:
    """A hash of the settings that define the result."""
    compared = {**dict.fromkeys(_COMPARED), **_without_paths(settings)}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:16]


def read_settings_file(folder: Path) -> dict[str, Any] | None:
    """The settings recorded in a folder; `None` for a new folder.

    Raises:
        UserError: if the folder holds anything but an evaluation.
    """
    path = folder / SETTINGS
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(not one.name.startswith(".") for one in folder.iterdir())):
            raise UserError(f"{folder} holds other files than an evaluation: give --output a new folder")
        return None
    settings = read_object(path, "give another --output, or remove this folder")
    if "sets" not in settings:
        raise UserError(f"{path} is not the settings file of an evaluation: give another --output")
    return settings


class OtherSettings(UserError):
    """The folder holds an evaluation with other settings; `differences` lists them in words."""

    def __init__(self, folder: Path, differences: str) -> None:
        self.differences = differences
        super().__init__(
            f"{folder} holds an evaluation with other settings ({differences}): use the same settings, or "
            "give --output a new folder"
        )


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Checks that an evaluation is resumed with the settings recorded in its folder.

    Modes and sets may be added or left out; those that are evaluated again must be the same.

    Raises:
        OtherSettings: with the settings that differ.
    """
    old, new = _without_paths(before), _without_paths(now)
    for key in new.keys() & {"prompts", "sets"}:
        both = old[key].keys() & new[key].keys()
        old[key], new[key] = ({name: one[key][name] for name in sorted(both)} for one in (old, new))
    # A retriever is compared only if some mode searched before and some mode searches now.
    left_out = {"retriever"} if None in (before["retriever"], now["retriever"]) else set()
    told = [
        f"{name}: {_told_apart(*values)}"
        for key in new
        if key not in left_out
        for name, *values in differences(old.get(key), new[key], key)
    ]
    if told:
        raise OtherSettings(folder, "; ".join(told))


def with_left_out(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of this session, with the earlier modes and sets that it leaves out."""
    if before is None:
        return dict(now)
    return {
        **now,
        "modes": list(dict.fromkeys([*before["modes"], *now["modes"]])),
        "sets": {**before["sets"], **now["sets"]},
        "prompts": {**before["prompts"], **now["prompts"]},
        "retriever": before["retriever"] if now["retriever"] is None else now["retriever"],
    }


def compared_settings(**values: Any) -> dict[str, Any]:
    """The settings after a round trip through JSON, so that they equal settings read from a file."""
    settings: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **values}))
    return settings


def _indexes(options: Any) -> Iterator[dict[str, Any]]:
    """Yields every index in the options, at any depth: hybrid and rerank contain other retrievers."""
    if isinstance(options, Mapping):
        for key, value in options.items():
            if (folder := index_folder(key, value)) is not None:
                manifest = read_manifest(folder)
                yield {
                    "path": str(value),
                    "manifest_sha256": hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest(),
                    "kind": manifest.kind,
                    "options": manifest.options,
                    "encoder": manifest.details.get("encoder"),
                    "passages": manifest.passages,
                    "corpus": asdict(manifest.corpus),
                }
            else:
                yield from _indexes(value)
    elif isinstance(options, list):
        for value in options:
            yield from _indexes(value)


def _without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that affect the result, without the paths of index and questions, which may move."""
    sets = {name: {key: one[key] for key in one if key != "source"} for name, one in settings["sets"].items()}
    affecting = {key: settings[key] for key in _COMPARED if key in settings}
    return {**affecting, "retriever": _searched(settings["retriever"]), "sets": sets}


def _searched(described: Mapping[str, Any] | None) -> Any:
    """The description of a retriever, with the content of each index in place of its path."""
    if described is None:
        return None
    held = {
        one["path"]: {
            **{fact: one[fact] for fact in ("kind", "options", "encoder", "passages")},
            "corpus": one["corpus"]["sha256"],  # its other facts change when the file is copied
        }
        for one in described["indexes"]
    }

    def by_content(options: Any) -> Any:
        if isinstance(options, dict):
            return {
                name: held.get(value, value) if name == "index" and isinstance(value, str) else by_content(value)
                for name, value in options.items()
            }
        return [by_content(value) for value in options] if isinstance(options, list) else options

    return {"kind": described["kind"], "options": by_content(described["options"])}


def _told_apart(old: Any, new: Any) -> str:
    """Two values in one line, each cut to the part where they differ."""
    texts = [json.dumps(value, ensure_ascii=False) for value in (old, new)]
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, same - _SHOWN // 2) if max(map(len, texts)) > _SHOWN else 0
    end = start + _SHOWN
    shown = ["..." * (start > 0) + text[start:end] + "..." * (len(text) > end) for text in texts]
    return f"{shown[0]} there, {shown[1]} now"
