"""The real W&B and trackio, offline: the content of their files after a run."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fakes import FixedRetriever
from tests.support.scripted_trainer import GOLD, answer, config, scripted_trainer, search
from trl_search.common.errors import UserError
from trl_search.records.folder import Run, read_run
from trl_search.records.run_log import name_for_trackers
from trl_search.records.trackers import log_results, mask_html, mask_text, stretches
from trl_search.types import Passage

pytestmark = pytest.mark.slow

EVIL = "<script>alert(1)</script> & \"quoted\" 'so'"
SECRET = "hf_abcdefghijklmnopqrstuvwxyz"


REPORT = "<!doctype html><title>a report</title>"


def finished(folder: Path) -> Run:
    """Adds evaluations before and after the training to the run in the folder."""
    before = {"em": 0.1, "f1": 0.2, "searches": 0.5, "questions": 20}
    return replace(read_run(folder), results={"search, before GRPO": before, "search, after GRPO": {"em": 0.9}})


def report_file(folder: Path) -> Path:
    path = folder / "report.html"
    path.write_text(REPORT)
    return path


def evil_ways(number: int, prompt: str) -> list[str]:
    """A model and a web page that try to inject HTML into the page."""
    return [search("the book"), answer(GOLD if number % 2 else EVIL)]


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: a LevelDB log behind a header of seven bytes, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a complete record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_wandb_without_a_key_is_refused_in_one_line(tmp_path, monkeypatch):
    """wandb's own exception ended the run with a traceback."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_DIR", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / name))
    args = config(tmp_path, report_to="wandb")
    with pytest.raises(UserError, match=r"report_to: wandb: .*wandb login.* Or set WANDB_MODE=offline"):
        name_for_trackers(args, tmp_path, "2026-11-26T15:31:14+00:00")
    wandb.teardown()  # it would keep these settings


def test_wandb_offline_has_config_git_state_and_tables_with_the_mask(tmp_path, random_model, tokenizer, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}
    for name, value in {**settings, "WANDB_DATA_DIR": str(tmp_path), "WANDB_CACHE_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    trainer = scripted_trainer(
        tmp_path, random_model, tokenizer, evil_ways, report_to="wandb", rewards=["em", "format"], max_steps=3,
        trajectory_table_steps=2, hub_token=SECRET, retriever=FixedRetriever([Passage("0", "T", EVIL)]),
    )  # fmt: skip
    trainer.run_log.task = {"questions": "world", "api_key": SECRET}
    trainer.train()
    log_results(trainer.args, finished(tmp_path), report_file(tmp_path))
    wandb.finish()
    wandb.teardown()  # it would reuse the folders of this run

    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    config: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    artifacts: list[dict[str, Path]] = []  # what `wandb sync` would upload: path -> file
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "run":
            names = (record.run.project, record.run.display_name)
        for item in (*record.run.config.update, *record.config.update):
            config[item.key] = json.loads(item.value_json)
        if record.WhichOneof("record_type") == "history":
            values = {".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.append(values)
        if record.WhichOneof("record_type") == "artifact":
            artifacts.append({entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents})
    # The config, including ours, and how the run was started.
    assert config["protocol"] == "qwen_tools" and config["max_observation_length"] == 200
    ours = config["trl_search"]
    assert ours["git"] == trainer.run_log.info["git"] and ours["run_folder"] == str(tmp_path)
    assert ours["task"] == {"questions": "world", "api_key": "<redacted>"} and ours["versions"]["trl"]
    assert SECRET.encode() not in file.read_bytes()
    # The metrics, at every step.
    assert [row["train/search/searches"] for row in history if "train/search/searches" in row] == [1, 1, 1]
    # The tables, at the first step and at every second.
    tables = [row for row in history if row.get("trajectories._type") == "table-file"]
    assert [row["train/global_step"] for row in tables] == [1, 2]
    assert len(artifacts) == 3
    # The final results and the report; project and run are named after the run.
    last = next(row for row in history if "results/em_after" in row)
    assert (last["results/em_before"], last["results/em_after"], last["train/global_step"]) == (0.1, 0.9, 3)
    results = json.loads(artifacts[2]["results.table.json"].read_text())
    assert results["columns"] == ["policy", "em", "f1", "searches", "questions"]
    assert results["data"][0] == ["search, before GRPO", 0.1, 0.2, 0.5, 20]
    assert results["data"][1] == ["search, after GRPO", 0.9, None, None, None]
    assert (file.parent / "files" / last["report.path"]).read_text() == REPORT
    started = trainer.run_log.info["started_at"][:19].replace("T", " ")
    assert names == ("trl-search", f"{tmp_path.name} {started}")
    table = json.loads(artifacts[0]["trajectories.table.json"].read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert len(rows) == 4 and {row["answer"] for row in rows} == {GOLD, EVIL}
    assert [row["rewards/em"] for row in rows] == [0, 1, 0, 1]
    assert all(row["golden_answers"] == GOLD and row["step"] == 1 for row in rows)
    one = artifacts[0][rows[0]["trajectory"]["path"]].read_text()
    assert "<script" not in one and one.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2
    masked = one.split('<span style="color:#888">')[1].split("</span>")[0]
    assert "&lt;tool_response&gt;" in masked and "&lt;script&gt;" in masked and "&lt;answer&gt;" not in masked
    page = (file.parent / "files" / tables[0]["trajectories_page.path"]).read_text()
    assert page.count("<details>") == 4 and "<script" not in page and masked in page


def test_trackio_has_config_git_state_and_tables_with_the_mask(tmp_path, random_model, tokenizer, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    storage, media = trackio.sqlite_storage, trackio.media
    folder = tmp_path / "trackio"
    for module in (trackio, trackio.utils, storage):  # already imported, so TRACKIO_DIR has no effect
        monkeypatch.setattr(module, "TRACKIO_DIR", folder)
    for module in (trackio.utils, media.utils, trackio.table, media.media):
        if hasattr(module, "MEDIA_DIR"):
            monkeypatch.setattr(module, "MEDIA_DIR", folder / "media")
    trainer = scripted_trainer(
        tmp_path, random_model, tokenizer, evil_ways, report_to="trackio", project="trl-search-tables", max_steps=3,
        trackio_static_space_id=False, trajectory_table_steps=2, hub_token=SECRET,
        retriever=FixedRetriever([Passage("0", "T", EVIL)]),
    )  # fmt: skip
    trainer.run_log.task = {"questions": "world", "api_key": SECRET}
    trainer.train()
    log_results(trainer.args, finished(tmp_path), report_file(tmp_path))

    (run,) = storage.SQLiteStorage.get_runs("trl-search-tables")
    config = storage.SQLiteStorage.get_run_config("trl-search-tables", run)
    assert config["protocol"] == "qwen_tools" and config["max_observation_length"] == 200
    assert config["trl_search"]["git"] == trainer.run_log.info["git"]
    assert config["trl_search"]["run_folder"] == str(tmp_path)
    assert config["trl_search"]["task"] == {"questions": "world", "api_key": "<redacted>"}
    assert SECRET not in json.dumps(config)
    logged = storage.SQLiteStorage.get_logs("trl-search-tables", run)
    assert len([row for row in logged if "train/search/searches" in row]) == 3
    tables = [row for row in logged if "trajectories" in row]
    assert [row["train/global_step"] for row in tables] == [1, 2]
    rows = tables[0]["trajectories"]["_value"]
    assert len(rows) == 4 and {row["answer"] for row in rows} == {GOLD, EVIL}
    masked = rows[0]["trajectory"].split("⟦")[1].split("⟧")[0]
    assert "<tool_response>" in masked and EVIL in masked and "<answer>" not in masked
    last = logged[-1]
    assert (last["results/em_before"], last["results/em_after"]) == (0.1, 0.9)
    assert [row["policy"] for row in last["results"]["_value"]] == ["search, before GRPO", "search, after GRPO"]
    assert run.startswith(f"{tmp_path.name} 20")
    pages = [path for path in sorted(folder.rglob("*.html")) if path.read_text() != REPORT]
    assert len(pages) == 2 and len(list(folder.rglob("*.html"))) == 3
    page = pages[0]
    text = page.read_text()
    assert "<script" not in text and text.count("<details>") == 4 and "&lt;script&gt;" in text


@pytest.mark.parametrize("every", [0, 4])
def test_tables_are_sent_on_request_and_with_the_next_rollout(tmp_path, random_model, tokenizer, monkeypatch, every):
    """Rollouts are made at steps 1, 3, 5: the table due at step 4 is sent at step 5."""
    from trl_search.records import trackers

    class Tracker:
        __name__, config, sent = "wandb", {}, []

        def Table(self, **data: Any) -> Any:
            return data

        def Html(self, text: str, inject: bool, data_is_not_path: bool) -> str:
            assert not inject and data_is_not_path
            return text

        def log(self, values: dict[str, Any]) -> None:
            self.sent.append(values["train/global_step"])

    class Config(dict):
        def update(self, values: Any, allow_val_change: bool) -> None:  # type: ignore[override]
            assert allow_val_change

    tracker = Tracker()
    Tracker.config, Tracker.sent = Config(), []
    monkeypatch.setattr(trackers, "running_trackers", lambda args: [tracker])
    trainer = scripted_trainer(
        tmp_path, random_model, tokenizer, trajectory_table_steps=every, num_iterations=2, max_steps=5
    )
    trainer.train()
    assert tracker.sent == ([1, 5] if every else [])


def test_only_trackers_in_report_to_are_imported(tmp_path, random_model, tokenizer, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    from trl_search.records.trackers import running_trackers

    trainer = scripted_trainer(tmp_path, random_model, tokenizer)
    assert running_trackers(trainer.args) == []


TEXTS = st.lists(st.tuples(st.text(max_size=5), st.integers(0, 1)), max_size=12)


@settings(max_examples=100)
@given(TEXTS)
def test_the_html_keeps_all_text_and_escapes_it(pairs):
    import html
    import re

    tokens, mask = [text for text, _ in pairs], [trained for _, trained in pairs]
    page = mask_html(tokens, mask)
    inner = re.fullmatch(r"<pre [^>]*>(.*)</pre>", page, re.DOTALL)[1]
    assert html.unescape(re.sub(r"<[^>]*>", "", inner)) == "".join(tokens)
    assert inner.count("<") == 2 * len(list(stretches(tokens, mask)))
    trained = "".join(text for text, one in pairs if one)
    assert "".join(text for one, text in stretches(tokens, mask) if one) == trained
    if all(mask):
        assert mask_text(tokens, mask) == trained
