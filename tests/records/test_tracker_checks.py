"""A tracker that cannot be used is refused before the model is loaded. With the real W&B, without a network."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from tests.support.scripted_trainer import config
from trl_search import SearchGRPOTrainer
from trl_search.cli.main import main
from trl_search.common.errors import UserError
from trl_search.records.tracker_checks import _refuse_wandb_without_key, refuse_trackers
from trl_search.retrieval import load_retriever
from trl_search.types import Passage

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def nobody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_DIR", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    _refuse_wandb_without_key.cache_clear()


def test_wandb_without_a_key_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("was loaded"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"report_to: wandb: .*wandb.login.* Or set WANDB_MODE=offline"):
        SearchGRPOTrainer(
            model="tiny",
            args=config(tmp_path, report_to="wandb"),
            retriever=load_retriever("bm25", passages=[Passage("1", "Orlune", "A harbour town.")]),
        )
    assert main(["doctor", "quickstart", "--report_to", "wandb"]) == 1
    assert "report_to: wandb: " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("name", "value"), [("WANDB_MODE", "offline"), ("WANDB_API_KEY", KEY)])
def test_wandb_with_a_key_or_offline_is_fine(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv(name, value)
    refuse_trackers(["wandb"], None)


def test_a_key_that_is_only_in_this_process_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    if "prompt" not in inspect.signature(wandb.login).parameters:
        pytest.skip("needs wandb 0.31")
    monkeypatch.setenv("WANDB_SILENT", "true")  # else it asks its server who the user is
    wandb.teardown()  # reads the variable again
    wandb.login(key=KEY, verify=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "another"))
    try:
        refuse_trackers(["wandb"], None)
    finally:
        wandb.teardown()
        wandb.sdk.lib.wbauth.unauthenticate_session(update_settings=False)
    _refuse_wandb_without_key.cache_clear()
    with pytest.raises(UserError, match=r"wandb.login"):
        refuse_trackers(["wandb"], None)


def test_a_space_of_trackio_needs_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    refuse_trackers(["trackio"], None)
    with pytest.raises(UserError, match="its Space me/curves needs a login: hf auth login"):
        refuse_trackers(["trackio"], "me/curves")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    refuse_trackers(["trackio"], "me/curves")


def test_a_tracker_that_is_not_installed_is_named() -> None:
    with pytest.raises(UserError, match="report_to: dvclive: DVCLiveCallback requires dvclive to be installed"):
        refuse_trackers(["dvclive"], None)


def test_a_tracker_that_does_not_exist_is_named() -> None:
    """The trainer ended with KeyError: 'wandbb'."""
    with pytest.raises(UserError, match=r"report_to.*wandbb.*wandb"):
        refuse_trackers(["wandbb"], None)


@pytest.mark.filterwarnings("error")
def test_neptune_without_its_package_prints_no_traceback() -> None:
    with pytest.raises(UserError, match="report_to: neptune needs neptune: pip install neptune"):
        refuse_trackers(["neptune"], None)
