"""Questions out of files in the schemas that people arrive with (FlashRAG, Search-R1, verl), errors for bad ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from trl_search import data
from trl_search.data import HUB_SETS, HubSet, load_questions
from trl_search.errors import UserError

FLASHRAG = {
    "id": "test_0",
    "question": "who got the first nobel prize in physics",
    "golden_answers": ["Wilhelm Conrad Röntgen"],
    "metadata": {"difficulty": 1},
}
SEARCH_R1 = {
    "id": "train_0",
    "question": "total number of death row inmates in the us?",
    "golden_answers": np.array(["2,718"]),
    "data_source": "nq",
    "prompt": [{"role": "user", "content": "Answer the given question. … Question: total number …?\n"}],
    "ability": "fact-reasoning",
    "reward_model": {"style": "rule", "ground_truth": {"target": np.array(["2,718"])}},
    "extra_info": {"split": "train", "index": 0},
}
VERL = {
    "data_source": "searchR1_hotpotqa",
    "prompt": [{"role": "system", "content": "…"}, {"role": "user", "content": "…"}],
    "ability": "fact-reasoning",
    "reward_model": {"style": "rule", "ground_truth": {"target": np.array(["Lyon", "Lugdunum"])}},
    "extra_info": {"index": 7, "question": "where was Mira born?", "split": "train"},
}


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, default=lambda array: array.tolist()) + "\n" for row in rows), "utf-8")
    return path


def write_parquet(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            FLASHRAG,
            {**{key: FLASHRAG[key] for key in ("id", "question", "golden_answers")}, "data_source": "questions"},
        ),
        (
            SEARCH_R1,
            {"id": "train_0", "question": SEARCH_R1["question"], "golden_answers": ["2,718"], "data_source": "nq"},
        ),
        (
            VERL,
            {
                "id": "0",
                "question": "where was Mira born?",
                "golden_answers": ["Lyon", "Lugdunum"],
                "data_source": "hotpotqa",
            },
        ),
    ],
    ids=["flashrag", "search-r1", "verl"],
)
def test_every_schema_comes_out_the_same(
    tmp_path: Path, kind: str, row: dict[str, Any], expected: dict[str, Any]
) -> None:
    write = write_jsonl if kind == "jsonl" else write_parquet
    questions = load_questions(write(tmp_path / f"questions.{kind}", row, row))
    assert questions.column_names == ["id", "question", "golden_answers", "data_source"]
    assert len(questions) == 2 and questions[0] == expected


@pytest.mark.parametrize("target", ["Lyon", ["Lyon"], {"target": "Lyon"}, {"target": ["Lyon", None, " "]}])
def test_the_target_may_be_a_string_or_a_list(tmp_path: Path, target: Any) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", {"question": "where?", "reward_model": {"ground_truth": target}})
    assert load_questions(path)[0]["golden_answers"] == ["Lyon"]


def test_golden_answers_go_before_the_reward_model(tmp_path: Path) -> None:
    row = {**SEARCH_R1, "golden_answers": ["this one"]}
    assert load_questions(write_jsonl(tmp_path / "q.jsonl", row))[0]["golden_answers"] == ["this one"]


def test_a_folder_holds_a_file_for_each_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "nq" / "test.parquet", FLASHRAG)
    assert load_questions(tmp_path / "nq", split="test")[0]["data_source"] == "nq"
    with pytest.raises(UserError, match=r"holds no train\.jsonl or train\.parquet, but: test\.parquet"):
        load_questions(tmp_path / "nq")


def test_a_limit_is_a_seeded_sample_in_order(tmp_path: Path) -> None:
    rows = [{**FLASHRAG, "id": str(index)} for index in range(100)]
    path = write_jsonl(tmp_path / "q.jsonl", *rows)
    ids = [int(identifier) for identifier in load_questions(path, limit=10, seed=3)["id"]]
    assert len(ids) == 10 and ids == sorted(ids) and ids != list(range(10))
    assert ids == [int(identifier) for identifier in load_questions(path, limit=10, seed=3)["id"]]
    assert ids != [int(identifier) for identifier in load_questions(path, limit=10, seed=4)["id"]]
    assert len(load_questions(path, limit=1000)) == 100
    with pytest.raises(UserError, match="limit is 0"):
        load_questions(path, limit=0)


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("\ufeff" + json.dumps(FLASHRAG) + "\n\n" + json.dumps(FLASHRAG), "utf-8")
    assert len(load_questions(path)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"q\.jsonl is empty"),
        (b"\n\n", r"q\.jsonl is empty"),
        (b'{"question": "a", "golden_answers": ["b"]}\n{"question": \n', r"q\.jsonl, line 2: not valid JSON"),
        (b'["a"]\n', r"q\.jsonl, line 1: a JSON object is needed, not list"),
        (b'{"query": "a", "golden_answers": ["b"]}\n', r"no column 'question' .* are: query, golden_answers\."),
        (b'{"question": "a", "answers": ["b"]}\n', r"no column 'golden_answers' .* are: question, answers\."),
        (b'{"question": "a", "golden_answers": []}\n', r"line 1: the question 'a' has no golden answer"),
        (b'{"question": "a", "golden_answers": null}\n', r"line 1: the question 'a' has no golden answer"),
        (b'{"question": "a", "reward_model": {}}\n', r"line 1: the question 'a' has no golden answer"),
        (b'{"question": " ", "golden_answers": ["b"]}\n', r"line 1: the question is empty"),
        (b'{"question": "\xff"}\n', r"not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_questions(path)


def test_a_bad_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match=r"cut\.parquet is not a parquet file"):
        load_questions(tmp_path / "cut.parquet")
    path = write_parquet(tmp_path / "q.parquet", {"question": "a", "answer": "b", "metadata": "c"})
    with pytest.raises(UserError, match=r"'golden_answers' .* are: question, answer, metadata"):
        load_questions(path)
    path = write_parquet(tmp_path / "q.parquet", FLASHRAG, {**FLASHRAG, "golden_answers": []})
    with pytest.raises(UserError, match=r"q\.parquet, row 2: .* has no golden answer"):
        load_questions(path)


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown dataset 'bambogle': did you mean 'bamboogle'\? There are: 2wiki"):
        load_questions("bambogle")
    with pytest.raises(UserError, match=r"there is no file .*q\.jsonl"):
        load_questions(tmp_path / "q.jsonl")
    with pytest.raises(UserError, match="there is no file data/nq"):
        load_questions("data/nq")
    (tmp_path / "q.csv").touch()
    with pytest.raises(UserError, match=r"give one of \.jsonl, \.parquet"):
        load_questions(tmp_path / "q.csv")


def test_hub_sets_are_the_published_ones() -> None:
    evaluation = {name: hub_set.split for name, hub_set in HUB_SETS.items() if hub_set.repository == data.FLASHRAG}
    assert evaluation == {
        "nq": "test",
        "triviaqa": "test",
        "popqa": "test",
        "hotpotqa": "dev",
        "2wikimultihopqa": "dev",
        "musique": "dev",
        "bamboogle": "test",
    }
    assert all(name == HUB_SETS[name].config for name in evaluation)
    assert HUB_SETS["nq_hotpotqa"] == HubSet("PeterJinGo/nq_hotpotqa_train", None, "train")


def test_hub_sets_are_read_with_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The hub is out of reach here, but load_dataset reads a local repository of the same layout in the same way.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    repository = tmp_path / "FlashRAG_datasets"
    write_parquet(repository / "nq" / "test.parquet", FLASHRAG)
    write_parquet(repository / "nq" / "dev.parquet", {**FLASHRAG, "id": "dev_0"})
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: nq\n  data_files:\n  - {split: test, path: nq/test.parquet}\n"
        "  - {split: dev, path: nq/dev.parquet}\n---\n"
    )
    monkeypatch.setitem(HUB_SETS, "nq", HubSet(str(repository), "nq", "test"))
    assert load_questions("nq")[0] == {
        "id": "test_0",
        "question": FLASHRAG["question"],
        "golden_answers": FLASHRAG["golden_answers"],
        "data_source": "nq",
    }
    assert load_questions("nq", split="dev")[0]["id"] == "dev_0"
    with pytest.raises(UserError, match=r"dataset 'nq' .* cannot be loaded from the hub: .*sideways"):
        load_questions("nq", split="sideways")


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path) -> None:
    program = "from trl_search.data import load_questions; load_questions('bamboogle')"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(data.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "UserError: dataset 'bamboogle' (RUC-NLPIR/FlashRAG_datasets) cannot be loaded" in done.stderr
    assert "bring its files here and give their path" in done.stderr
