"""A run's folder can be read in any state, and reading does not change it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from trl_search.common.errors import UserError
from trl_search.records.folder import TRAJECTORY_SCHEMA, Run, read_run, read_trajectories, step_of, trajectory_file

ROWS = [{"step": step, "reward": step / 10, "entropy": 1.5} for step in (1, 2, 3)]


def write_trajectories(folder: Path, step: int, rewards: tuple[str, ...] = ("em",), count: int = 2) -> Path:
    row = {"step": step, "id": "q", "tokens": ["a", "b"], "mask": [1, 0], "reward": 1.0, "golden_answers": ["x"]}
    row["turns"] = [{"role": "assistant", "start": 0, "end": 2}]
    table = pyarrow.Table.from_pylist([row] * count, schema=TRAJECTORY_SCHEMA)
    for name in rewards:
        table = table.append_column(f"rewards/{name}", pyarrow.array([0.5] * count, pyarrow.float64()))
    path = trajectory_file(folder, step)
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(table, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.json").write_text(json.dumps({"format": 1, "model": "m"}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for step in (3, 1, 2):
        write_trajectories(tmp_path, step)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(folder: Path) -> Run:
    before = contents(folder)
    run = read_run(folder)
    assert contents(folder) == before
    return run


def test_a_complete_run_is_read(folder):
    run = read(folder)
    assert run.info == {"format": 1, "model": "m"} and run.history == ROWS and run.problems == []
    assert [step_of(path) for path in run.trajectory_files] == [1, 2, 3]
    assert read_trajectories(run)["step"].to_pylist() == [1, 1, 2, 2, 3, 3]
    assert read_trajectories(run, steps=[2])["step"].to_pylist() == [2, 2]
    assert read_trajectories(run.folder).equals(read_trajectories(str(run.folder)))
    assert read_trajectories(run, steps=[9]).schema == TRAJECTORY_SCHEMA


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        read_run(tmp_path / "nothing")
    (tmp_path / "run.json").mkdir()
    with pytest.raises(UserError, match=r"not the folder of a run.*run\.json, metrics\.jsonl, results\.json"):
        read_run(tmp_path)


def test_an_older_run_has_only_results(tmp_path):
    history = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": float("nan")}]
    (tmp_path / "results.json").write_text(json.dumps({"seconds": 1, "rows": {}, "history": history}))
    run = read(tmp_path)
    assert run.info == {} and run.history == [{"step": 1, "reward": 0.5}, {"step": 2, "reward": None}]
    assert any("reward is not a finite number at step 2" in problem for problem in run.problems)
    assert any("no run.json" in problem for problem in run.problems)


def test_a_run_killed_before_its_first_log(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"format": 1}))
    run = read(tmp_path)
    assert run.history == [] and len(run.problems) == 1 and "before its first log" in run.problems[0]


def test_half_written_files_are_left_out_and_named(folder):
    (folder / "run.json").write_text('{"format": 1, "mod')
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    whole = write_trajectories(folder, 4)
    whole.write_bytes(whole.read_bytes()[:-20])
    parquet.write_table(pyarrow.table({"prompt": ["not ours"]}), folder / "trajectories" / "step_000005.parquet")
    (folder / "trajectories" / ".step_000006.parquet.77.tmp").write_bytes(b"PAR1")
    run = read(folder)
    assert run.info == {} and run.history == ROWS
    assert [step_of(path) for path in run.trajectory_files] == [1, 2, 3]
    named = ["run.json is not JSON", "metrics.jsonl line 4 is not JSON and was cut off", "step_000004.parquet cannot",
             "step_000005.parquet holds no trajectories: it has no step, group"]  # fmt: skip
    assert len(run.problems) == 4
    assert all(problem.find(start) >= 0 for problem, start in zip(run.problems, named, strict=True))


def test_invalid_rows_and_numbers_are_left_out(folder):
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "loss": NaN, "kl": null, "x": Infinity}\n{"loss": 1}\n[1]\n\n\xff\xfe{\n')
        file.write(b'{"step": 5, "kl": 0.1}\n')
    run = read(folder)
    assert run.history[3:] == [{"step": 4, "loss": None, "kl": None, "x": None}, {"step": 5, "kl": 0.1}]
    for problem in ("line 5 has no step", "line 6 has no step", "line 8 is not JSON", "loss is not a finite number"):
        assert sum(problem in said for said in run.problems) == 1


def test_a_newer_format_is_named(folder):
    (folder / "run.json").write_text('{"format": 2}')
    assert read(folder).problems == ["run.json has format 2, but this version reads format 1"]


def test_a_reward_is_null_at_steps_without_it(folder):
    write_trajectories(folder, 4, rewards=("em", "format"))
    table = read_trajectories(read(folder))
    assert table["rewards/format"].to_pylist() == [None] * 6 + [0.5] * 2


def test_damage_that_appears_only_when_reading_is_named(folder):
    path = write_trajectories(folder, 4, count=500)
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)  # damages the pages, not the footer
    path.write_bytes(bytes(data))
    run = read(folder)
    assert len(run.trajectory_files) == 4
    assert 4 not in read_trajectories(run)["step"].to_pylist()
    assert "step_000004.parquet cannot be read" in run.problems[-1]


@settings(max_examples=60)
@given(st.data())
def test_a_truncated_metrics_file_gives_its_complete_lines(data):
    text = "".join(json.dumps({**row, "note": "é日"}, ensure_ascii=False) + "\n" for row in ROWS).encode()
    cut = text[: data.draw(st.integers(0, len(text)))]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "metrics.jsonl").write_bytes(cut)
        run = read(Path(folder))
    # A line that lacks only its newline is complete.
    assert [row["step"] for row in run.history] == [1, 2, 3][: (cut + b"\n").count(b"}\n")]
