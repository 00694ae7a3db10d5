"""Questions from files in common schemas (FlashRAG, Search-R1, verl), and the errors for bad files."""

from __future__ import annotations

import csv
import json
import logging
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import trl_search
from tests.support.fake_hub import fake_hub
from trl_search.common.errors import UserError
from trl_search.config.task import load_held_out
from trl_search.data import (
    EVALUATION_SETS,
    HUB_SETS,
    HubSet,
    QuestionFields,
    load_evaluation_questions,
    load_questions,
    question_key,
    sample_questions,
    without_overlap,
)
from trl_search.data.hub_sets import FLASHRAG as FLASHRAG_REPOSITORY
from trl_search.data.summary import summarize_questions
from trl_search.evaluation.sets import load_sets
from trl_search.rewards.answers import normalize_answer

ROOT = Path(trl_search.__file__).parents[1]

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


def asked(question: Any, source: str = "nq", **more: Any) -> dict[str, Any]:
    return {"question": question, "golden_answers": ["x"], "data_source": source, **more}


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
def test_every_schema_gives_the_same_rows(
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


def test_the_reward_model_may_be_json_in_a_string(tmp_path: Path) -> None:
    row = {**VERL, "reward_model": '{"ground_truth": {"target": ["Lyon"]}}', "extra_info": '{"question": "where?"}'}
    assert load_questions(write_parquet(tmp_path / "q.parquet", row))[0] == {
        "id": "0",
        "question": "where?",
        "golden_answers": ["Lyon"],
        "data_source": "hotpotqa",
    }
    path = write_jsonl(tmp_path / "q.jsonl", {**asked("where?"), "golden_answers": None, "reward_model": "Lyon"})
    with pytest.raises(UserError, match=r"q\.jsonl, line 1: reward_model is a string that is not JSON"):
        load_questions(path)


@pytest.mark.parametrize(
    ("row", "fields", "question", "golden"),
    [
        (
            {"question": "where?", "answer": {"value": "Lyon", "aliases": ["Lugdunum"], "type": "FreeForm"}},
            QuestionFields(answers="answer"),
            "where?",
            ["Lyon", "Lugdunum"],
        ),
        (
            {"question": "where?", "answers": {"text": ["Lyon"], "answer_start": [3]}},
            QuestionFields(answers="answers"),
            "where?",
            ["Lyon"],
        ),
        (
            {"question": "where?", "possible_answers": '["Lyon", "Lugdunum"]'},
            QuestionFields(answers="possible_answers"),
            "where?",
            ["Lyon", "Lugdunum"],
        ),
        ({"question": {"text": "where?"}, "golden_answers": b"Lyon"}, QuestionFields(), "where?", ["Lyon"]),
        ({"query": b"where?", "golden_answers": [b"Lyon"]}, QuestionFields(question="query"), "where?", ["Lyon"]),
        ({"question": "when?", "golden_answers": 1998.0}, QuestionFields(), "when?", ["1998"]),
    ],
    ids=["triviaqa", "squad", "popqa", "nq", "bytes", "float"],
)
def test_public_datasets_are_read_unchanged(
    tmp_path: Path, row: dict[str, Any], fields: QuestionFields, question: str, golden: list[str]
) -> None:
    loaded = load_questions(write_parquet(tmp_path / "q.parquet", row), fields=fields)[0]
    assert (loaded["question"], loaded["golden_answers"]) == (question, golden)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (asked("a", golden_answers=True), r"line 2: a golden answer is True, of type bool"),
        (asked("a", golden_answers=[["b"]]), r"line 2: a golden answer is a nested list"),
        (
            asked("a", golden_answers=[{"name": "b"}]),
            r"line 2: the golden answers are .* with the fields name",
        ),
        (asked("a", golden_answers=float("nan")), r"line 2: the question 'a' has no golden answer"),
        (asked(["a"]), r"line 2: the question is \['a'\], of type list"),
        (asked(True), r"line 2: the question is True, of type bool"),
        (asked(float("nan")), r"line 2: the question is empty"),
        (asked("a", id={"n": 1}), r"line 2: the id is .* of type dict"),
        (asked("a", golden_answers=None, reward_model=["b"]), r"line 2: reward_model is of type list"),
    ],
)
def test_a_question_that_is_not_text_is_refused_with_its_line_and_type(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"q\.jsonl, {message}"):
        load_questions(write_jsonl(tmp_path / "q.jsonl", asked("first"), row))


def test_a_named_column_that_one_file_lacks_says_how_to_write_both_alike(tmp_path: Path) -> None:
    """`--answers_field answer` is that of the training file, but a file for the evaluation has golden_answers."""
    pd.DataFrame({"question": ["who?"], "golden_answers": ["Ann"]}).to_csv(tmp_path / "test.csv")  # with its index
    with pytest.raises(UserError) as error:
        load_questions(tmp_path / "test.csv", fields=QuestionFields(answers="answer"))
    assert "no column 'answer', which answers_field names in every file" in str(error.value)
    assert "the columns are: '', question, golden_answers. " in str(error.value)
    assert "`trl-search data questions FILE --answers_field COLUMN --output NEW.jsonl`" in str(error.value)


def test_a_missing_column_names_the_option(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", {"question": "a", "answer": "b"})
    with pytest.raises(UserError, match=r"are: question, answer\. Name the one .* --answers_field COLUMN"):
        load_questions(path)
    with pytest.raises(UserError, match=r"no column 'aswer', .*; the columns are: question, answer\."):
        load_questions(path, fields=QuestionFields(answers="aswer"))
    with pytest.raises(UserError, match=r"no column 'number'.*--id_field COLUMN"):
        load_questions(path, fields=QuestionFields(answers="answer", id="number"))


@pytest.mark.parametrize(
    ("cell", "told"), [("Ann Lee|Lee", 1), ("Ann Lee; Lee", 1), ('["Ann|Lee", "Lee"]', 0), ("Ann Lee, Lee", 0)]
)
def test_answers_joined_in_one_cell_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cell: str, told: int
) -> None:
    """They were taken as one answer in silence, and every reward of the run was 0."""
    with (tmp_path / "q.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("Frage", "Antworten"), ("Wer?", cell), ("Wann?", "1900")])
    load_questions(tmp_path / "q.csv", fields=QuestionFields("Frage", "Antworten"))
    assert caplog.text.count(f"q.csv, line 2: {cell!r}; 1 of 2 rows). If these are several answers") == told


@pytest.mark.parametrize(("cell", "told"), [("1998.0", 1), ("1998", 0), ("1.05", 0), ('["1998.0"]', 0)])
def test_whole_numbers_as_pandas_writes_them_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cell: str, told: int
) -> None:
    """An answer of 1998 counted as wrong in silence."""
    (tmp_path / "q.csv").write_text(f'question,golden_answers\nWhen?,"{cell.replace(chr(34), chr(34) * 2)}"\n')
    load_questions(tmp_path / "q.csv")
    assert caplog.text.count(f"with .0 (%s, line 2: {cell!r}; 1 of 1 rows)" % (tmp_path / "q.csv")) == told


def test_golden_answers_take_precedence_over_the_reward_model(tmp_path: Path) -> None:
    row = {**SEARCH_R1, "golden_answers": ["this one"]}
    assert load_questions(write_jsonl(tmp_path / "q.jsonl", row))[0]["golden_answers"] == ["this one"]


def test_a_folder_contains_a_file_for_each_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "nq" / "test.parquet", FLASHRAG)
    assert load_questions(tmp_path / "nq", split="test")[0]["data_source"] == "nq"
    with pytest.raises(UserError, match=r"holds no train\{\.jsonl,.*\}, but: test\.parquet"):
        load_questions(tmp_path / "nq")


def test_a_folder_with_the_name_of_a_hub_set_is_evaluated_on_its_test_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / "nq" / f"{split}.parquet", {**FLASHRAG, "question": f"{split}?"})
    monkeypatch.chdir(tmp_path)
    assert load_evaluation_questions("nq")[0]["question"] == "test?"
    assert load_held_out(["nq"], limit=1, seed=0)[0]["question"] == "test?"
    assert load_sets("nq", limit=None, seed=0)[0].rows[0]["question"] == "test?"


def test_a_limit_is_a_seeded_sample_in_order(tmp_path: Path) -> None:
    rows = [{**FLASHRAG, "id": str(index)} for index in range(100)]
    path = write_jsonl(tmp_path / "q.jsonl", *rows)
    ids = [int(identifier) for identifier in load_questions(path, limit=10, seed=3)["id"]]
    assert len(ids) == 10 and ids == sorted(ids) and ids != list(range(10))
    assert ids == [int(identifier) for identifier in load_questions(path, limit=10, seed=3)["id"]]
    assert ids != [int(identifier) for identifier in load_questions(path, limit=10, seed=4)["id"]]
    assert len(load_questions(path, limit=1000)) == 100
    with pytest.raises(UserError, match="limit=0 must be at least 1"):
        load_questions(path, limit=0)


def test_blank_lines_and_a_byte_order_mark_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("\ufeff" + json.dumps(FLASHRAG) + "\n\n" + json.dumps(FLASHRAG), "utf-8")
    assert len(load_questions(path)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            rb'{"question": "Who?", "golden_answers": ["\ud83d", "\ud83d\ude00"]}',
            r"line 1: '\\ud83d' holds half of a surrogate pair",
        ),
        (b"", r"q\.jsonl is empty"),
        (b"\n\n", r"q\.jsonl is empty"),
        (b'{"question": "a", "golden_answers": ["b"]}\n{"question": \n', r"q\.jsonl, line 2: not JSON"),
        (b'["a"]\n', r"q\.jsonl, line 1: expected a JSON object, got list"),
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
    with pytest.raises(UserError, match=r"cut\.parquet, after row 0: incomplete parquet file"):
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
    (tmp_path / "q.xlsx").touch()
    with pytest.raises(UserError, match=r"has an unknown format: give a file that ends in \.jsonl, \.ndjson, \.json"):
        load_questions(tmp_path / "q.xlsx")


def test_hub_sets_are_the_published_ones() -> None:
    """The counts are those of their repositories on the hub."""
    flashrag = {
        name: (held.split, held.rows) for name, held in HUB_SETS.items() if held.repository == FLASHRAG_REPOSITORY
    }
    assert flashrag["hotpotqa_train"] == ("train", 90_447) and HUB_SETS["hotpotqa_train"].evaluation_split == "dev"
    evaluation = {name: held for name, held in flashrag.items() if held[0] != "train"}
    assert evaluation == {
        "nq": ("test", 3_610),
        "triviaqa": ("test", 11_313),
        "popqa": ("test", 14_267),
        "hotpotqa": ("dev", 7_405),
        "2wikimultihopqa": ("dev", 12_576),
        "musique": ("dev", 2_417),
        "bamboogle": ("test", 125),
    }
    assert tuple(evaluation) == EVALUATION_SETS
    assert sum(HUB_SETS[name].rows or 0 for name in evaluation) == 51_713
    assert all(name == HUB_SETS[name].config for name in evaluation)
    mix = HUB_SETS["nq_hotpotqa"]
    assert (mix.repository, mix.config, mix.split) == ("PeterJinGo/nq_hotpotqa_train", None, "train")
    assert mix.splits == {"train": 79_168 + 90_447, "test": 51_713}


def hub_row(name: str, split: str) -> dict[str, Any]:
    return {**FLASHRAG, "id": f"{split}_0", "question": f"{FLASHRAG['question']} ({name}, {split})"}


def published(tmp_path: Path) -> dict[str, dict[str, bytes]]:
    """The two question repositories in their real layout, with one row per split: FlashRAG's jsonl with configs in the
    README, Search-R1's parquet without."""
    card, flashrag = "---\nconfigs:\n", {}
    for name in EVALUATION_SETS:
        splits = list(HUB_SETS[name].splits)
        files = "".join(f'  - {{split: {split}, path: "{name}/{split}.jsonl"}}\n' for split in splits)
        card += f"- config_name: {name}\n  data_files:\n{files}"
        for split in splits:
            flashrag[f"{name}/{split}.jsonl"] = (json.dumps(hub_row(name, split)) + "\n").encode()
    mix = {
        f"{split}.parquet": write_parquet(
            tmp_path / f"{split}.parquet", {**SEARCH_R1, "id": f"{split}_0"}
        ).read_bytes()
        for split in ("train", "test")
    }
    flashrag["README.md"] = f"{card}---\n".encode()
    return {FLASHRAG_REPOSITORY: flashrag, "PeterJinGo/nq_hotpotqa_train": mix}


def test_every_hub_set_comes_from_its_repository_over_http(tmp_path: Path) -> None:
    """Only the address of the hub is replaced; our code and `datasets` are the real ones."""
    program = """
        import json
        from trl_search.data import HUB_SETS, load_questions
        print(json.dumps({name: load_questions(name)[0] for name in HUB_SETS}))
        print(json.dumps(load_questions("nq", split="train")[0]))
        load_questions("musique", split="sideways")
    """
    with fake_hub(published(tmp_path)) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
    every, train = map(json.loads, done.stdout.splitlines())
    assert list(every) == list(HUB_SETS)
    for name in EVALUATION_SETS:
        row = hub_row(name, HUB_SETS[name].split)
        del row["metadata"]
        assert every[name] == {**row, "data_source": name}
    assert every["nq_hotpotqa"] == {
        "id": "train_0",
        "question": SEARCH_R1["question"],
        "golden_answers": ["2,718"],
        "data_source": "nq",
    }
    assert train["id"] == "train_0"
    assert "nq (test) holds 1 questions, and published numbers are for 3,610: they are not comparable" in done.stderr
    assert "UserError: dataset 'musique' (RUC-NLPIR/FlashRAG_datasets) cannot be loaded from the hub: " in done.stderr
    assert "sideways" in done.stderr


def test_a_repository_laid_out_as_on_the_hub_is_read_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    repository = tmp_path / "FlashRAG_datasets"
    write_parquet(repository / "nq" / "test.parquet", FLASHRAG)
    write_parquet(repository / "nq" / "dev.parquet", {**FLASHRAG, "id": "dev_0"})
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: nq\n  data_files:\n  - {split: test, path: nq/test.parquet}\n"
        "  - {split: dev, path: nq/dev.parquet}\n---\n"
    )
    monkeypatch.setitem(HUB_SETS, "nq", HubSet(str(repository), "nq", "test"))
    assert load_questions("nq")[0]["data_source"] == "nq"
    assert load_questions("nq", split="dev")[0]["id"] == "dev_0"


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path) -> None:
    program = "from trl_search.data import load_questions; load_questions('bamboogle')"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1
    assert "UserError: dataset 'bamboogle' (RUC-NLPIR/FlashRAG_datasets) is not on this machine" in done.stderr
    assert "(HF_HUB_OFFLINE is set): give a path, or bring its files here" in done.stderr


# Training questions that are also in an evaluation set


def test_questions_of_evaluation_sets_are_dropped_and_counted(tmp_path: Path) -> None:
    train = write_jsonl(
        tmp_path / "train.jsonl",
        asked("Who wrote The Amber Mill?"),
        asked("who   wrote amber mill"),
        asked("Who painted the Amber Mill?"),
        asked("In which city was the author of The Amber Mill born?", "hotpotqa"),
        asked("???"),
    )
    nq = write_jsonl(tmp_path / "nq.jsonl", asked("WHO WROTE THE AMBER MILL"), asked("!!!"))
    hotpot = write_jsonl(
        tmp_path / "hotpot.jsonl",
        asked("who wrote the amber mill?", "hotpotqa"),
        asked('In which city was the author of "The Amber Mill" born?', "hotpotqa"),
    )
    popqa = write_jsonl(tmp_path / "popqa.jsonl", asked("what is Orlune?", "popqa"))
    kept, dropped = without_overlap(load_questions(train), *map(load_questions, (nq, hotpot, popqa)))
    assert kept["question"] == ["Who painted the Amber Mill?", "???"]
    assert dropped == {"nq": 2, "hotpotqa": 3, "popqa": 0}
    assert load_questions(train, exclude=[str(nq), hotpot])["question"] == kept["question"]


def test_questions_are_dropped_before_the_sample_is_drawn_and_this_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", *(asked(f"question {number}") for number in range(20)))
    held_out = tmp_path / "nq"  # for a folder, its test file counts, not the train file beside it
    write_parquet(held_out / "test.parquet", *(asked(f"Question {number}?") for number in range(15)))
    write_parquet(held_out / "train.parquet", asked("question 19"))
    with caplog.at_level(logging.INFO, "trl_search.data"):
        questions = load_questions(train, limit=5, exclude=[held_out])
    assert questions["question"] == [f"question {number}" for number in range(15, 20)]
    assert "train.jsonl: of 20 questions 15 are dropped: 15 in nq" in caplog.text
    with pytest.raises(UserError, match=r"every question is also in .*train\.jsonl, and none is left"):
        load_questions(train, exclude=[train])
    with pytest.raises(UserError, match=r"exclude must be a list of names or paths: \['nq'\]"):
        load_questions(train, exclude="nq")
    assert len(load_evaluation_questions(held_out)) == 15


@given(st.text(st.characters(codec="ascii", categories=("L", "N", "Z")), min_size=1))
def test_questions_are_compared_without_case_and_punctuation(text: str) -> None:
    assume(normalize_answer(text))
    assert question_key(f" The {text.upper()} ?") == question_key(text)


def test_a_limit_above_the_number_of_rows_gives_all_rows(tmp_path: Path) -> None:
    questions = load_questions(write_jsonl(tmp_path / "q.jsonl", FLASHRAG, FLASHRAG))
    assert len(sample_questions(questions, 3)) == 2 and len(sample_questions(questions, 1)) == 1


def test_the_summary_counts(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "q.parquet",
        asked("who wrote it?", id="a", golden_answers=["Mira Talvane", "Talvane", "M. Talvane", "x", "y"]),
        asked("Who wrote it", id="b", golden_answers=["Lyon"]),
        asked("is Orlune a town or a river in the north?", "hotpotqa", id="b", golden_answers=["Yes"]),
        asked("another one", "nq", id="b", golden_answers=["no", "nope"]),
    )
    summary = summarize_questions(load_questions(path), samples=10)
    assert (summary.rows, summary.sources) == (4, {"nq": 3, "hotpotqa": 1})
    assert (summary.yes_no, summary.repeated_questions, summary.repeated_ids) == (2, 1, 1)
    assert (summary.answers.least, summary.answers.median, summary.answers.greatest) == (1, 1.5, 5)
    assert summary.answers.mean == 9 / 4 and summary.question_words.greatest == 10
    assert (summary.answer_words.least, summary.answer_words.greatest) == (1, 2)
    said = summary.describe()
    assert "  nq                3\n  hotpotqa          1" in said
    assert "[nq] who wrote it?  ->  Mira Talvane | Talvane | M. Talvane | x | ..." in said
    assert len(summarize_questions(load_questions(path), samples=2).samples) == 2
