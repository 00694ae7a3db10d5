"""Asks whether the Hugging Face hub can be reached, before its client is used.

If a file is not in the cache, the client of the hub tries for 23 s to reach it, and a tokenizer alone is up to ten
files. Before each configuration, tokenizer and model, the hub is therefore asked once: without an answer, only the
cache is read.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from trl_search.common.errors import UserError, first_line

_ANSWER_S, _CONNECT_S = 10.0, 5.0  # a slow network connects within 5 s
_WAITS_S = (0, 1)  # a name server may fail once


def only_cached(name: str) -> bool:
    """Whether only the cache can be read for a model, because the hub cannot be reached; false for a folder.

    It is the `local_files_only` of `from_pretrained`.

    Raises:
        UserError: if the model is not in the cache, either.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    if Path(name).expanduser().is_dir():
        return False
    try:
        folder = repo_folder_name(repo_id=name, repo_type="model")
    except HFValidationError:  # not a name of the hub, as loading it will report
        return False
    caches = filter(None, (constants.HF_HUB_CACHE, os.environ.get("SENTENCE_TRANSFORMERS_HOME")))
    cached = any(Path(cache, folder, "snapshots").is_dir() for cache in caches)
    remedy = f"bring {Path(constants.HF_HUB_CACHE, folder)} from a machine with a network (hf download {name})"
    return _hub_is_away(name, cached, remedy)


def cached_folder(name: str) -> Path | None:
    """The folder of a model in the cache, which has the name of its commit; `None` if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def refuse_unreachable_dataset(name: str, config: str | None, said: str) -> None:
    """Raises `UserError` if a dataset is neither a folder nor in the cache of `datasets`, and the hub cannot be
    reached. `said` is what the message calls it."""
    if not Path(name).is_dir():
        _hub_is_away(said, dataset_is_cached(name, config), "bring its files here from a machine with a network")


def dataset_is_cached(name: str, config: str | None) -> bool:
    """Whether a dataset of the hub (`owner/name`) is in the cache of `datasets`.

    Example:
        >>> dataset_is_cached("RUC-NLPIR/FlashRAG_datasets", "nq")  # in .../RUC-NLPIR___flash_rag_datasets/nq
        True
    """
    import datasets
    from datasets.naming import camelcase_to_snakecase

    *owner, last = name.split("/")
    folder = "___".join([*owner, camelcase_to_snakecase(last)])
    return Path(datasets.config.HF_DATASETS_CACHE, folder, config or "").is_dir()


def _hub_is_away(name: str, cached: bool, remedy: str) -> bool:
    """Whether the hub cannot be reached. If `name` is not cached either, the error ends with the remedy."""
    from huggingface_hub import constants

    for wait_s in (0,) if cached or constants.HF_HUB_OFFLINE else _WAITS_S:
        time.sleep(wait_s)
        if (reason := _why_away()) is None:
            return False
    if cached:
        return True
    raise UserError(
        f"{name} is not on this machine, neither as a folder nor in the cache, and the hub cannot be reached "
        f"({reason}): give a path, or {remedy}"
    )


def _why_away() -> str | None:
    """Why the hub cannot be reached; `None` if it can. A hub that is slow to answer is left to its client's
    timeouts."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    http = hub_http()
    timeout = http.Timeout(_ANSWER_S, connect=_CONNECT_S)
    try:
        get_session().head(constants.ENDPOINT, timeout=timeout, follow_redirects=False)
    except (http.ConnectError, http.ConnectTimeout, http.ProxyError) as error:
        return first_line(error)
    except http.HTTPError:
        return None
    return None


def hub_http() -> Any:
    """The library whose errors the client of the hub raises: httpx, or httpx2 from huggingface-hub 2 on."""
    from huggingface_hub.errors import HfHubHTTPError

    (error,) = (base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    return sys.modules[error.__module__.partition(".")[0]]
