"""Checks before a model is loaded that the trackers of `report_to` can be used; transformers finds out afterwards."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Sequence

import huggingface_hub
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from trl_search.common.errors import UserError, unknown_name

# In another process, in which W&B cannot ask for a key. Silent, it does not ask its server who the user is.
_LOG_IN = "import sys, wandb\ntry: wandb.login(verify=False)\nexcept wandb.errors.Error as error: sys.exit(str(error))"

# Their callbacks print one when they are deleted, if the package is missing.
_PRINT_A_TRACEBACK = {"mlflow": "mlflow", "dagshub": "mlflow", "neptune": "neptune"}


def refuse_trackers(names: Sequence[str], trackio_space_id: str | None) -> None:
    """Raises `UserError` if a tracker is unknown or not installed, or if its service would refuse the run."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown_name("report_to", name, [*INTEGRATION_TO_CALLBACK, "none"])
        package = _PRINT_A_TRACEBACK.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(f"report_to: {name} needs {package}: pip install {package}, or leave it out of report_to")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError, ValueError) as error:
            raise UserError(f"report_to: {name}: {error} Or leave it out of report_to") from error
        if name == "wandb":
            _refuse_wandb_without_key()
    space = trackio_space_id or os.environ.get("TRACKIO_SPACE_ID")
    if "trackio" in names and space and huggingface_hub.get_token() is None:
        raise UserError(f"report_to: trackio: its Space {space} needs a login: hf auth login, or set HF_TOKEN")


@functools.cache  # an error is not cached
def _refuse_wandb_without_key() -> None:
    import wandb

    if wandb.run is not None:
        return
    environment = {**os.environ, "WANDB_SILENT": "true"}
    asked = subprocess.run(
        [sys.executable, "-P", "-c", _LOG_IN],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if asked.returncode and not _is_logged_in_here():
        said = " ".join(asked.stderr.split())[-300:]
        raise UserError(f"report_to: wandb: {said} Or set WANDB_MODE=offline, or --report_to none")


def _is_logged_in_here() -> bool:
    """Whether this process has a key that it could not save, in a home that is read-only."""
    import wandb

    if "prompt" not in inspect.signature(wandb.login).parameters:  # before wandb 0.31, it would ask
        return False
    return bool(wandb.login(prompt=False, verify=False))
