"""Publishes the model of a run on the Hugging Face hub: selects the files and commits them.

Only listed files are uploaded: weights, tokenizer, card, `trl_search.json`, curves. Optimizer states, checkpoints,
logs and pickled arguments are not. Trajectories hold questions and passages of the training, so they are uploaded only
on request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from tqdm import tqdm

from trl_search.common.errors import UserError
from trl_search.common.files import read_object
from trl_search.common.hub import hub_http
from trl_search.config.agent import SETTINGS_FILE
from trl_search.policies.adapters import ADAPTER_CONFIG

HUB_NAME = re.compile(r"(?!runs/)\w[\w.-]*/\w[\w.-]*")  # not ./warm or runs/warm, which are folders
CARD = "README.md"
CURVES = "curves.png"
MODEL_FILES = (
    "config.json", "generation_config.json", ADAPTER_CONFIG, "*.safetensors", "*.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
TRAJECTORIES = "trajectories/*.parquet"


@dataclass(frozen=True)
class Upload:
    """The content of a commit: files of a folder under their own names, and texts written for the repository."""

    folder: Path
    files: tuple[str, ...]
    texts: Mapping[str, str]

    def lines(self) -> list[str]:
        """One readable line per file, with its size."""
        sizes = {name: (self.folder / name).stat().st_size for name in self.files}
        sizes |= {name: len(text.encode()) for name, text in self.texts.items()}
        return [f"  {name}  {tqdm.format_sizeof(size, 'B')}" for name, size in sorted(sizes.items())]


def plan_upload(folder: Path, texts: Mapping[str, str], *, with_trajectories: bool = False) -> Upload:
    """Selects the files of a run to upload, after all checks that need no network.

    Raises:
        UserError: if the folder holds no model, or an incomplete one.
    """
    patterns = [*MODEL_FILES, CURVES, *([TRAJECTORIES] if with_trajectories else [])]
    names = {str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    if with_trajectories and not any(name.startswith("trajectories/") for name in names):
        raise UserError(f"{folder} has no trajectories: train with log_trajectories, or leave --with_trajectories out")
    weights = {name for name in names if name.endswith(".safetensors")}
    if not weights:
        checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        hint = f"push the run's last checkpoint, {checkpoints[-1]}" if checkpoints else "give the output_dir of a run"
        raise UserError(f"{folder} holds no weights (*.safetensors): {hint}")
    if "adapter_model.safetensors" not in names and "config.json" not in names:
        raise UserError(f"{folder} has weights but no config.json: save the model again with model.save_pretrained")
    if not any(name.startswith("tokenizer") for name in names):
        raise UserError(f"{folder} has no tokenizer: save it there with tokenizer.save_pretrained")
    for name in names:
        if name.endswith(".index.json"):
            index = read_object(folder / name, "save the model again, or push another checkpoint")
            missing = set(index["weight_map"].values()) - weights
            if missing:
                raise UserError(
                    f"{folder} is incomplete: {', '.join(sorted(missing))}, listed in {name}, is missing: save the "
                    "model again, or push another checkpoint"
                )
    for name in weights:
        _check_weights(folder / name)
    return Upload(folder, tuple(sorted(names - set(texts))), dict(texts))


def publish(upload: Upload, repo_id: str, *, api: HfApi, public: bool = False) -> str:
    """Creates the repository if needed, and makes one commit. Returns the address of the commit. Unless `public`, a
    new repository is private and a public one is an error.

    Raises:
        UserError: if the hub does not answer or rejects the upload, or the repository is public and must not be.
    """
    operations = [CommitOperationAdd(name, upload.folder / name) for name in upload.files]
    operations += [CommitOperationAdd(name, text.encode()) for name, text in upload.texts.items()]

    def commit() -> str:
        api.create_repo(repo_id, private=not public, exist_ok=True)
        if not public and not api.repo_info(repo_id).private:
            raise UserError(f"{repo_id} is public, so everybody could see the upload: add --public to allow that")
        return str(api.create_commit(repo_id, operations, commit_message="Upload by trl-search push").commit_url)

    return ask_hub(commit, repo_id)


def license_of(base_model: str, api: HfApi) -> str | None:
    """The licence on the base model's card, which also binds the fine-tuned model; `None` if there is none."""
    card = ask_hub(lambda: api.model_info(base_model).card_data, base_model)
    found = card.get("license") if card is not None else None
    return found if isinstance(found, str) else None


def ask_hub(ask: Callable[[], Any], repo_id: str) -> Any:
    """Calls the hub and turns its errors into ones that name the remedy.

    Raises:
        UserError: if the hub cannot be reached, rejects the request, or the name is not a repository name.
    """
    try:
        return ask()
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set: unset it to push, or use --dry_run") from None
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is not the name of a repository: write it as owner/name ({error})") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = {
            401: "log in (`hf auth login`, or HF_TOKEN in the environment)",
            403: "use a token with the role 'write', and your own name or organization as the owner",
            404: "check the name, and that your token may see it",
        }.get(status, "try again later")
        said = (error.server_message or error.response.reason_phrase)[:300]
        raise UserError(f"the hub answered {status} for {repo_id} ({said}): {remedy}") from error
    except (hub_http().HTTPError, OSError) as error:
        raise UserError(f"the hub cannot be reached ({error}): check the network, or use --dry_run") from error


def settings_text(settings: Mapping[str, Any]) -> dict[str, str]:
    """The text of `trl_search.json`, keyed by the file's name."""
    return {SETTINGS_FILE: json.dumps(settings, indent=2, ensure_ascii=False) + "\n"}


def on_hub(name: str) -> bool:
    """Whether a name has the form of a hub model's name and is not a folder on this machine."""
    return HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def adapter_text(adapter: Mapping[str, Any], hub_base: str | None) -> dict[str, str]:
    """A new `adapter_config.json`, keyed by its name, if the run's base model is only on this machine.

    Raises:
        UserError: if the base model's name on the hub is unknown, so that others could not load the adapter.
    """
    if on_hub(base := adapter["base_model_name_or_path"]):
        return {}
    if hub_base is None:
        raise UserError(
            f"the base model of the adapter is {base}, which is only on this machine: name the same model on the hub "
            "with --base_model owner/name"
        )
    config = {**adapter, "base_model_name_or_path": hub_base}
    return {ADAPTER_CONFIG: json.dumps(config, indent=2, ensure_ascii=False) + "\n"}


def _check_weights(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):  # reads the header and checks the file's length against it
            pass
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or incomplete ({error}): save the model again") from None
