"""The report page contains the data of the run, says what it left out, and runs no code from the data."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.report_runs import trajectory, write_run, write_trajectories
from trl_search.cli.main import main
from trl_search.common.errors import UserError
from trl_search.records.alarm_rules import RULES
from trl_search.records.folder import METRICS_FILE, read_run, read_trajectories, trajectory_file
from trl_search.records.report.page import build_page, write_report
from trl_search.records.report.trajectories import choose_steps, encode_tokens, page_trajectories, utf16_length

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>{{ 7 * 7 }}\u2028\x00\U0001f9ed"


def unpack(page: str, name: str) -> Any:
    """The data as the browser unpacks it."""
    found = re.search(rf'<script type="application/json" id="data-{name}">([A-Za-z0-9+/=]*)</script>', page)
    assert found is not None, name
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


class Elements(html.parser.HTMLParser):
    """Start tags with their attributes, and the text of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag, attributes = self.found[-1] if self.found else ("", {})
        if tag in ("script", "style") and attributes.get("type") != "application/json" and data.strip():
            self.inline.append((tag, data))


def test_the_page_contains_the_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    page = build_page([run])
    rows, meta = unpack(page, "rows"), unpack(page, "meta")
    table = read_trajectories(run)
    assert rows["step"] == table["step"].to_pylist() and len(rows["step"]) == 48
    assert rows["text"] == ["".join(tokens) for tokens in table["tokens"].to_pylist()]
    assert rows["reward"] == table["reward"].to_pylist() and rows["answer"] == table["answer"].to_pylist()
    assert rows["trained"] == table["model_tokens"].to_pylist()
    assert rows["masked"] == table["observation_tokens"].to_pylist()
    assert rows["correct"] == [int(answer == "Mira Talvane") for answer in rows["answer"]]
    assert {meta["prompts"][i] for i in rows["prompt"]} == set(table["prompt"].to_pylist())
    assert meta["rewards"] == ["em", "format"] and rows["rewards"][0] == [rows["reward"][0], 1.0]
    assert meta["runs"][0]["info"]["config"]["learning_rate"] == 1e-4 and not meta["runs"][0]["left_out"]
    charts = {chart["title"]: chart["lines"] for chart in meta["charts"]}
    reward = charts["Reward"][0]
    assert reward["steps"] == [1, 2, 3, 4, 5, 6] and reward["values"] == [row["reward"] for row in run.history]
    assert [line["label"] for line in charts["Exact match per dataset"]] == ["hotpotqa", "nq"]
    assert [line["label"] for line in charts["How trajectories end"]] == ["answer", "token budget"]
    assert [point["step"] for point in meta["runs"][0]["reflection"]["points"]] == [2, 4, 6]
    assert meta["runs"][0]["headline"].startswith("Held-out exact match rose from")


def test_a_golden_answer_in_a_tool_result_counts_as_retrieved(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=1)
    said = ("assistant", "<think> Mira Talvane </think>")
    texts = ["who knows", "by MIRA  talvane!", "Miranda Talvane"]
    rows = [trajectory(2, i, [said, ("tool", text)]) for i, text in enumerate(texts)]
    write_trajectories(folder, 2, [*rows, trajectory(2, 3, [said], golden_answers=[])])
    assert unpack(build_page([read_run(folder)]), "rows")["gold"][-4:] == [0, 1, 0, None]


def test_alarms_that_fired_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=2)
    with (folder / METRICS_FILE).open("a") as file:
        for step, rings in ((3, 0.0), (4, 1.0), (5, 1.0)):
            file.write(json.dumps({"step": step, "alarm/entropy_rise": rings, "alarm/kl": 0.0}) + "\n")
    meta = unpack(build_page([read_run(folder)]), "meta")
    rule = next(rule for rule in RULES if rule.name == "entropy_rise")
    rang = {"name": rule.name, "run": 0, "steps": [4, 5], "means": rule.means, "advice": rule.advice}
    assert meta["runs"][0]["alarms"] == [rang]
    assert {chart["title"]: chart["alarms"] for chart in meta["charts"] if chart["alarms"]} == {"Entropy": [rang]}


def test_the_page_contains_every_token_with_its_mask(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", steps=9, a_step=8))
    page = build_page([run])
    rows, meta = unpack(page, "rows"), unpack(page, "meta")
    blocks = [unpack(page, f"tokens-{i}") for i in range(2)]
    table = read_trajectories(run)
    for number, row in enumerate(table.to_pylist()):
        packed = blocks[number // meta["block"]][number % meta["block"]]
        assert slices(rows["text"][number], packed["lengths"]) == row["tokens"]
        assert unrolled(packed["mask"]) == row["mask"]
        assert [value / 1000 for value in packed["logprobs"]] == pytest.approx(row["logprobs"], abs=5e-4)
        assert packed["turns"] == [[turn["role"], turn["start"], turn["end"]] for turn in row["turns"]]


def slices(text: str, lengths: list[int]) -> list[str]:
    units = text.encode("utf-16-le", "surrogatepass")
    found, at = [], 0
    for length in lengths:
        found.append(units[2 * at : 2 * (at + length)].decode("utf-16-le", "surrogatepass"))
        at += length
    return found


def unrolled(mask: list[int]) -> list[int]:
    return [bit for i, length in enumerate(mask) for bit in [i % 2] * length]


@given(st.lists(st.tuples(st.text(max_size=5), st.integers(0, 1), st.floats(-50, 0)), max_size=30))
def test_tokens_are_unpacked_unchanged(drawn: list[tuple[str, int, float]]) -> None:
    tokens, mask, logprobs = ([item[i] for item in drawn] for i in range(3))
    packed = json.loads(json.dumps(encode_tokens({"tokens": tokens, "mask": mask, "logprobs": logprobs, "turns": []})))
    assert slices("".join(tokens), packed["lengths"]) == tokens
    assert unrolled(packed["mask"]) == mask
    assert sum(packed["lengths"]) == utf16_length("".join(tokens))


def test_the_text_of_a_model_is_never_markup(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=1, note=HOSTILE)
    row = trajectory(2, 0, [("assistant", HOSTILE)], question=HOSTILE, answer=HOSTILE, error=HOSTILE, prompt=HOSTILE)
    write_trajectories(folder, 2, [row | {"golden_answers": [HOSTILE], "stop_reason": HOSTILE, "id": HOSTILE}])
    harmless = Elements(build_page([read_run(write_run(tmp_path / "harmless", steps=2))]))
    page = build_page([read_run(folder)])
    hostile = Elements(page)
    assert "owned" not in page and "onerror" not in page
    assert [tag for tag, _ in hostile.found] == [tag for tag, _ in harmless.found]
    assert unpack(page, "rows")["text"][-1] == HOSTILE and unpack(page, "rows")["correct"][-1] == 1
    assert unpack(page, "meta")["runs"][0]["info"]["config"]["note"] == HOSTILE


def test_a_folder_with_a_hostile_name(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "<img src=x onerror=alert(1)>&amp;", steps=1)
    elements = Elements(build_page([read_run(folder)]))
    assert "img" not in {tag for tag, _ in elements.found}


def test_only_the_pages_own_scripts_and_styles_may_run(tmp_path: Path) -> None:
    page = build_page([read_run(write_run(tmp_path / "run", steps=1))])
    elements = Elements(page)
    policy = next(a["content"] or "" for _, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and "unsafe" not in policy and "*" not in policy
    for tag in ("script", "style"):
        hashes = [
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for kind, text in elements.inline
            if kind == tag
        ]
        assert sorted(rules[f"{tag}-src"].split()) == sorted(hashes) and hashes
    for _, attributes in elements.found:
        assert not {"src", "href", "srcset", "action", "style", "data"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(
        r"url\(|@import|innerHTML|document\.write|eval\(|fetch\(", "".join(t for _, t in elements.inline)
    )
    assert "Permission is hereby granted" in page  # uPlot's licence is included


def test_two_runs_share_the_charts(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", seed=0)
    second = write_run(tmp_path / "second", steps=3, seed=1, beta=0.01)
    page = build_page([read_run(first), read_run(second)])
    rows, meta = unpack(page, "rows"), unpack(page, "meta")
    assert [run["name"] for run in meta["runs"]] == ["first", "second"]
    assert [rows["run"].count(i) for i in (0, 1)] == [48, 24]
    reward = next(chart for chart in meta["charts"] if chart["title"] == "Reward: mean")["lines"]
    assert [(line["label"], len(line["steps"])) for line in reward] == [("first", 6), ("second", 3)]
    with pytest.raises(UserError, match="twice"):
        build_page([read_run(first), read_run(first)])


def test_a_limited_page_shows_whole_steps(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=20, a_step=8)
    kept = page_trajectories([read_run(folder)], 41)
    assert sorted(set(kept.rows["step"])) == [1, 6, 11, 15, 20] and len(kept) == 40
    assert kept.notes == ["40 of 160 trajectories are here: 5 of 20 steps, from oldest to newest"]
    assert set(page_trajectories([read_run(folder)], 3).rows["step"]) == {20}
    assert len(page_trajectories([read_run(folder)], 3)) == 3
    assert len(page_trajectories([read_run(folder)], 0)) == 0
    assert not page_trajectories([read_run(folder)], 160).notes[0]


@given(st.dictionaries(st.integers(0, 500), st.integers(1, 9), min_size=1), st.integers(0, 300))
def test_which_steps_are_shown(counts: dict[int, int], limit: int) -> None:
    chosen = choose_steps(counts, limit)
    assert chosen == sorted(set(chosen)) and set(chosen) <= set(counts) and max(counts) in chosen
    if len(chosen) > 1:
        assert min(counts) in chosen and sum(counts[step] for step in chosen) <= limit
    if sum(counts.values()) <= limit:
        assert chosen == sorted(counts)


def test_half_written_files_of_a_run_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / METRICS_FILE).open("a") as file:
        file.write('{"step": 7, "reward": NaN}\n{"step": 8, "rew')
    trajectory_file(folder, 3).write_bytes(trajectory_file(folder, 3).read_bytes()[:500])
    row = trajectory(7, 0, [("assistant", "<answer> x </answer>")])
    write_trajectories(folder, 7, [row | {"mask": [1]}, row])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["report", str(folder), "-o", str(tmp_path / "page.html")]) == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    page = (tmp_path / "page.html").read_text("utf-8")
    problems = unpack(page, "meta")["runs"][0]["problems"]
    said = capsys.readouterr()
    for part in ("step_000003", "cut off", "reward is not a finite number", "1 trajectories are left out"):
        assert any(part in problem for problem in problems) and part in said.err
    rows = unpack(page, "rows")
    assert 3 not in rows["step"] and rows["step"].count(7) == 1 and rows["step"].count(2) == 8
    reward = next(chart for chart in unpack(page, "meta")["charts"] if chart["title"] == "Reward")["lines"][0]
    assert (reward["steps"][-1], reward["values"][-1]) == (7, None)


def test_a_run_with_few_files_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"history": [{"step": 1, "reward": 0.5}]}))
    page = build_page([read_run(tmp_path)])
    assert unpack(page, "rows")["step"] == [] and unpack(page, "meta")["charts"][0]["title"] == "Reward"


def test_a_failed_retrieval_is_neither_correct_nor_wrong(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=1)
    row = trajectory(2, 0, [("assistant", "<think> x")], answer=None, error="503", stop_reason="retrieval_failed")
    null = {"reward": None, "advantage": None, "rewards/em": None, "mask": [0] * len(row["mask"])}
    write_trajectories(folder, 2, [row | null | {"logprobs": [float("nan"), *row["logprobs"][1:]]}])
    page = build_page([read_run(folder)])
    rows = unpack(page, "rows")
    assert rows["correct"][-1] is None and rows["reward"][-1] is None and rows["trained"][-1] == 0
    assert unpack(page, "tokens-0")[-1]["logprobs"][0] is None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}  0.1 MB\n"
    assert main(["report", str(folder)]) == 0, "an existing report is replaced"
    capsys.readouterr()
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "results.json").write_text(json.dumps({"history": [{"step": 1, "reward": 0.5}]}))
    assert main(["report", str(tmp_path / "small"), "--figures", str(tmp_path / "png")]) == 0
    assert str(tmp_path / "png" / "overview.png") in capsys.readouterr().out
    assert (tmp_path / "png" / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_is_not_a_report_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", steps=1)
    other = tmp_path / "thesis.html"
    other.write_text("<!doctype html><p>three years of work")
    assert main(["report", str(folder), "-o", str(other)]) == 2
    assert "--overwrite" in capsys.readouterr().err and "three years" in other.read_text()
    assert main(["report", str(folder), "-o", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main(["report", str(folder), "-o", str(other), "--overwrite"]) == 0
    assert "three years" not in other.read_text("utf-8") and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "not a folder"),
        (["."], "not the folder of a run"),
        (["run", "--max_trajectories", "-1"], "--max_trajectories is -1"),
        (["run", "run"], "twice"),
    ],
)
def test_mistakes_are_reported_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", steps=1)
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(tmp_path.rglob("*.html"))


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", steps=2))
    first, second = (write_report([run], tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    when = re.compile(rb'id="data-meta">[^<]*<')
    assert when.sub(b"", first) == when.sub(b"", second)
