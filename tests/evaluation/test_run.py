"""The parts of `trl-search eval`: records that survive a kill, compared settings, published rows, the table."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from datasets import Dataset

from tests.evaluation.test_outcomes import outcome
from trl_search.common.errors import UserError
from trl_search.common.files import write_json
from trl_search.config.agent import AgentSettings
from trl_search.environment import AnswerOnly, SearchEnvironment
from trl_search.evaluation.answers_file import Records
from trl_search.evaluation.backends import Backend
from trl_search.evaluation.outcomes import macro, summarize
from trl_search.evaluation.published_scores import PUBLISHED, SETS, TITLES, rows_beside, size_class
from trl_search.evaluation.sets import MACRO, QuestionSet, check_names, load_sets
from trl_search.evaluation.settings import (
    SETTINGS,
    check_same,
    compared_settings,
    describe_model,
    describe_retriever,
    prompts_of,
    read_settings_file,
    settings_hash,
    with_left_out,
)
from trl_search.evaluation.table import results_markdown
from trl_search.retrieval.index.contents import with_contents
from trl_search.retrieval.index.folder import MANIFEST, build_index

# Records


def test_records_are_read_back_unchanged(tmp_path):
    records = Records(tmp_path, "search", "nq")
    written = {7: outcome(1.0, question="où?", answer="l'été\n "), 2: outcome(0.0)}
    for index, one in written.items():
        records.append(index, one)
    assert Records(tmp_path, "search", "nq").read() == written  # before it is closed, because a kill closes nothing
    assert Records(tmp_path, "rag", "nq").read() == Records(tmp_path, "search", "nq2").read() == {}


def test_a_record_is_written_whole_if_a_write_takes_only_a_part(tmp_path):
    """A disk that is nearly full; half a line would have been joined with the next one."""
    records = Records(tmp_path, "search", "nq")
    records.append(0, outcome(1.0))
    file = records._file

    class Nearly:
        def write(self, data: bytes) -> int:
            return file.write(data[:10])

    records._file = Nearly()
    records.append(1, outcome(1.0, id="1"))
    assert sorted(records.read()) == [0, 1]


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_truncated_line_is_ignored(tmp_path, cut):
    records = Records(tmp_path, "search", "nq")
    for index in range(3):
        records.append(index, outcome(1.0, id=str(index)))
    records.close()
    content = records.path.read_bytes()
    records.path.write_bytes(content[:-cut])
    assert sorted(records.read()) == [0, 1]
    again = Records(tmp_path, "search", "nq")
    again.append(2, outcome(1.0, id="2"))
    again.close()
    assert records.path.read_bytes() == content


def test_a_question_asked_again_replaces_its_failure(tmp_path):
    records = Records(tmp_path, "rag", "nq")
    records.append(0, outcome(failed="down"))
    records.append(0, outcome(1.0))
    assert records.read()[0].em == 1.0
    other = Records(tmp_path, "rag", "nq", rank=1)
    other.append(0, outcome(failed="down"))
    other.append(1, outcome(0.0))
    assert {index: one.failed for index, one in records.read().items()} == {0: False, 1: False}
    assert other.path.name == "rag-nq.rank1.jsonl"


def test_an_invalid_line_is_named(tmp_path):
    records = Records(tmp_path, "rag", "nq")
    records.path.write_text('{"index": 0}\n')
    with pytest.raises(UserError, match=r"rag-nq\.jsonl, line 1 is not a record"):
        records.read()


# Sets


def write_rows(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_set_is_named_after_its_data_source_and_sampled_with_the_seed(tmp_path):
    rows = [{"id": str(i), "question": f"q{i}", "golden_answers": ["a"]} for i in range(50)]
    path = write_rows(tmp_path / "nq" / "test.jsonl", *rows)
    (whole,), (ten,), (other,) = (
        load_sets(str(path), limit=limit, seed=seed) for limit, seed in ((None, 0), (10, 0), (10, 1))
    )
    assert (whole.name, whole.total, len(whole.rows)) == ("nq", 50, 50)
    assert (ten.total, len(ten.rows)) == (50, 10) and [row["id"] for row in ten.rows] != [
        row["id"] for row in other.rows
    ]
    assert len({whole.fingerprint, ten.fingerprint, other.fingerprint}) == 3
    assert load_sets(str(tmp_path / "nq"), limit=10, seed=0)[0].fingerprint == ten.fingerprint
    named = write_rows(tmp_path / "my mix.jsonl", *rows)
    assert load_sets(str(named), limit=None, seed=0)[0].name == "my_mix"


def test_a_file_with_several_sources_gives_several_sets(tmp_path):
    sources = ["nq"] * 30 + ["popqa"] * 10
    rows = [{"question": f"q{i}", "golden_answers": ["a"], "data_source": one} for i, one in enumerate(sources)]
    path = write_rows(tmp_path / "mixed.jsonl", *rows)
    nq, popqa = load_sets(str(path), limit=None, seed=0)
    assert [(one.name, one.total) for one in (nq, popqa)] == [("nq", 30), ("popqa", 10)]
    assert popqa.source == f"{path}, data_source popqa"
    assert [len(one.rows) for one in load_sets(str(path), limit=20, seed=0)] == [20, 10]


def test_the_training_mix_is_evaluated_on_its_test_split(monkeypatch):
    asked = []

    def load_dataset(repository, config, split):
        asked.append((repository, split))
        return Dataset.from_list([{"question": "q", "golden_answers": ["a"], "data_source": "nq"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("trl_search.data.hub_sets.refuse_unreachable_dataset", lambda *asked: None)
    (one,) = load_sets("nq_hotpotqa", limit=None, seed=0)
    assert asked == [("PeterJinGo/nq_hotpotqa_train", "test")]
    assert (one.name, one.source) == ("nq", "PeterJinGo/nq_hotpotqa_train test")


def test_invalid_sets_are_named(tmp_path):
    with pytest.raises(UserError, match=r"unknown dataset 'hotpot': did you mean 'hotpotqa'.*bamboogle.*world"):
        load_sets("hotpot", limit=None, seed=0)
    no_answers = write_rows(tmp_path / "x.jsonl", {"question": "who?", "golden_answers": []})
    with pytest.raises(UserError, match="line 1: the question 'who\\?' has no golden answer"):
        load_sets(str(no_answers), limit=None, seed=0)
    one = QuestionSet("nq", "a.jsonl", 0, [])
    with pytest.raises(UserError, match=r"a\.jsonl and b\.jsonl are both called 'nq'"):
        check_names([one, dataclasses.replace(one, source="b.jsonl")])
    with pytest.raises(UserError, match="are both called 'NQ'"):  # one file, where a disk ignores case
        check_names([one, dataclasses.replace(one, name="NQ")])
    for name in ("nq.rank1", "é" * 101):  # the answers of another process to nq; a name that no disk takes
        with pytest.raises(UserError, match="cannot name its files"):
            check_names([one, dataclasses.replace(one, name=name)])
    with pytest.raises(UserError, match="is called 'macro'"):
        check_names([dataclasses.replace(one, name=MACRO)])


# Settings


def make_settings(**changes):
    return compared_settings(
        **{
            "model": {"sha256": "ab"},
            "model_name": "runs/a",
            "backend": {"name": "transformers", "served_model": None},
            "sampling": {"temperature": 0.0, "seed": 0},
            "agent": {"protocol": "qwen_tools", "passages_per_query": 3},
            "prompts": {"search": "Answer: {question}"},
            "retriever": {"kind": "bm25", "options": {}, "indexes": []},
            "modes": ["search"],
            "sets": {"nq": {"source": "nq", "asked": 10, "total": 10, "fingerprint": "f"}},
        }
        | changes
    )


def test_each_difference_is_named(tmp_path):
    before = make_settings()
    check_same(tmp_path, before, make_settings(model_name="elsewhere"))
    now = make_settings(
        model={"sha256": "cd"},
        sampling={"temperature": 0.7, "seed": 0},
        prompts={"search": "Say: {question}"},
        sets={"popqa": {}},
    )
    with pytest.raises(UserError) as said:
        check_same(tmp_path, before, now)
    for difference in (
        'model.sha256: "ab" there, "cd" now',
        "sampling.temperature: 0.0 there, 0.7 now",
        'prompts.search: "Answer: {question}" there',
    ):
        assert difference in str(said.value)
    assert "seed" not in str(said.value) and "new folder" in str(said.value)
    assert settings_hash(before) == settings_hash(make_settings(model_name="elsewhere")) != settings_hash(now)


def test_long_values_are_shown_from_where_they_differ(tmp_path):
    head = "You are a helpful assistant. " * 9
    before, now = (make_settings(prompts={"search": f"{head}Today is the {day}th. {head}"}) for day in (11, 12))
    with pytest.raises(UserError, match=r"\.\.\..*Today is the 11th.*\.\.\. there, .*Today is the 12th.* now"):
        check_same(tmp_path, before, now)


def test_modes_and_sets_that_are_left_out_are_kept(tmp_path):
    before = make_settings(modes=["search", "direct"], prompts={"search": "x", "direct": "y"})
    now = make_settings(modes=["direct"], prompts={"direct": "y"}, retriever=None, sets={"popqa": {"asked": 1}})
    check_same(tmp_path, before, now)
    kept = with_left_out(before, now)
    assert kept["modes"] == ["search", "direct"] and list(kept["sets"]) == ["nq", "popqa"]
    assert kept["prompts"] == {"search": "x", "direct": "y"} and kept["retriever"] == before["retriever"]
    with pytest.raises(UserError, match=r'prompts\.search: "x" there, "z" now'):
        check_same(tmp_path, kept, {**before, "prompts": {"search": "z", "direct": "y"}})


def test_modes_and_sets_may_be_added(tmp_path):
    before = make_settings(modes=["direct"], prompts={"direct": "x"}, retriever=None)
    more = {**before["sets"], "popqa": {"asked": 1}}
    now = make_settings(modes=["search", "direct"], prompts={"direct": "x", "search": "y"}, sets=more)
    check_same(tmp_path, before, now)
    with pytest.raises(UserError, match=r'sets\.nq\.fingerprint: "f" there, "g" now'):
        check_same(tmp_path, before, {**now, "sets": {**more, "nq": {**more["nq"], "fingerprint": "g"}}})


def test_a_folder_with_other_content_is_not_changed(tmp_path):
    assert read_settings_file(tmp_path / "new") is None and read_settings_file(tmp_path) is None
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="holds other files than an evaluation"):
        read_settings_file(tmp_path)
    write_json(tmp_path / SETTINGS, make_settings())
    assert read_settings_file(tmp_path) == make_settings()
    (tmp_path / "settings.json").write_text('{"half')
    with pytest.raises(UserError, match="not JSON"):
        read_settings_file(tmp_path)


def test_a_model_is_identified_by_the_content_of_its_files(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights" if name != "c" else b"others")
        for other in ("run.json", "results.json", "optimizer.pt", "training_args.bin"):
            (tmp_path / name / other).write_text(name)
    a, b, c = (describe_model(str(tmp_path / name)) for name in "abc")
    assert a == b != c and set(a) == {"sha256"}
    named = "additional_chat_templates/tool_use.jinja"
    (tmp_path / "b" / named).parent.mkdir()
    for file in (
        "tokenizer.json",
        "chat_template.jinja",
        "adapter_model.safetensors",
        "generation_config.json",
        named,
    ):
        (tmp_path / "b" / file).write_text("x")
        assert a != (a := describe_model(str(tmp_path / "b")))
    a = describe_model(str(tmp_path / "a"))
    (tmp_path / "c" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "a")}))
    assert describe_model(str(tmp_path / "c"))["adapter_of"] == a


def test_a_retriever_is_identified_by_its_options_without_secrets_and_its_index(tmp_path, world):
    manifest = build_index(world.passages[:50], tmp_path / "index")
    inner = {"kind": "bm25", "index": str(tmp_path / "index")}
    described = describe_retriever(
        "hybrid", {"retrievers": [inner], "api_key": "s3cret", "url": "http://me:p4ss@host"}
    )
    assert "s3cret" not in str(described) and "p4ss" not in str(described)
    (index,) = described["indexes"]
    assert (index["kind"], index["passages"]) == ("bm25", 50) and len(index["manifest_sha256"]) == 64
    assert index["corpus"] == dataclasses.asdict(manifest.corpus)


def test_an_evaluation_can_be_resumed_after_everything_has_moved(tmp_path, world, monkeypatch):
    for name, size in (("here", 50), ("there", 50), ("other", 49)):
        build_index(world.passages[:size], tmp_path / name)
    shutil.copytree(tmp_path / "here", tmp_path / "copied")

    def searched(name, **options):
        inner = {"kind": "bm25", "index": str(tmp_path / name), **options}
        asked = {"nq": {"source": f"{name}/nq.jsonl", "asked": 10, "total": 10, "fingerprint": "f"}}
        return make_settings(retriever=describe_retriever("hybrid", {"retrievers": [inner, inner]}), sets=asked)

    check_same(tmp_path, searched("here"), searched("there"))
    assert settings_hash(searched("here")) == settings_hash(searched("there")) != settings_hash(searched("other"))
    with pytest.raises(UserError, match=r"\(retriever.options.retrievers.0.index.passages: 50 there, 49 now; retriev"):
        check_same(tmp_path, searched("here"), searched("other"))
    with pytest.raises(UserError, match=r"\(retriever.options.retrievers.0.threads: null there, 2 now; retriever"):
        check_same(tmp_path, searched("here"), searched("there", threads=2))
    check_same(tmp_path, searched("here"), searched("copied"))
    monkeypatch.setenv("HOME", str(tmp_path))
    under_home = make_settings(retriever=describe_retriever("bm25", {"index": "~/here"}))
    check_same(tmp_path, under_home, make_settings(retriever=describe_retriever("bm25", {"index": "~/there"})))
    with pytest.raises(UserError, match=r"\(retriever.options.index.passages: 50 there, 49 now"):
        check_same(tmp_path, under_home, make_settings(retriever=describe_retriever("bm25", {"index": "~/other"})))


def test_an_index_by_an_encoder_with_other_weights_differs(tmp_path, world):
    described = []
    for weights in ("first", "second"):  # the encoder was trained further, and the index rebuilt
        build_index(world.passages[:5], tmp_path / "index", overwrite=True)
        manifest = tmp_path / "index" / MANIFEST
        details = {"encoder": {"name": "models/encoder", "weights": weights}}
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "details": details}))
        options = {"index": str(tmp_path / "index")}
        described.append((describe_retriever("dense", options), with_contents(options)))
    (first, first_content), (second, second_content) = described
    with pytest.raises(UserError, match=r'\(retriever.options.index.encoder.weights: "first" there, "second" now\)'):
        check_same(tmp_path, make_settings(retriever=first), make_settings(retriever=second))
    assert first_content != second_content


def test_prompts_are_recorded_as_the_policy_reads_them(tokenizer, retriever):
    agent = AgentSettings(instruction="Look it up: ", system_prompt="You are an agent.")
    prompts = prompts_of(["search", "direct", "cot", "rag"], tokenizer, SearchEnvironment(retriever), agent)
    assert all("You are an agent." in text and "{question}" in text for text in prompts.values())
    assert "Look it up: {question}" in prompts["search"] and "Look it up" not in prompts["direct"]
    assert 'Doc 1(Title: "{title}") {text}\n\nAnswer' in prompts["rag"] and "<think>" in prompts["cot"]
    assert set(prompts_of(["direct"], tokenizer, AnswerOnly(), agent)) == {"direct"}


# Backends


def test_options_that_a_backend_would_ignore_are_refused():
    for backend, processes, said in (
        (Backend("vllm_server"), 1, "needs an address"),
        (Backend("transformers", server="http://x"), 1, "are for --backend vllm_server"),
        (Backend("transformers", engine_options={"a": 1}), 1, "are for --backend vllm"),
        (Backend("vllm"), 2, "runs in one process, but there are 2"),
    ):
        with pytest.raises(UserError, match=said):
            backend.check(processes)
    Backend("vllm_server", server="http://x").check(8)


# Published rows


def test_published_rows_have_the_published_averages():
    """The papers round to three digits; only Shin's average contradicts its own text."""
    for row in PUBLISHED:
        if row.em:
            assert len(row.em) == 7
            assert sum(row.em) / 7 == pytest.approx(row.average, abs=0.0011), row.label
    assert {row.title for row in PUBLISHED if not row.secondary} == {
        "Search-R1, 3B-it GRPO",
        "Search-R1 by Shin (2025), 3B-it",
    }


@pytest.mark.parametrize(
    ("name", "parameters", "size"),
    [
        ("Qwen/Qwen2.5-3B-Instruct", None, "3B"),
        ("runs/qwen3b", None, "3B"),
        ("runs/qwen3b", 3_500_000, None),  # its name says nothing about its size
        ("runs/a", 3_085_938_688, "3B"),
        ("Qwen/Qwen2.5-7B", None, "7B"),
        ("Qwen/Qwen2.5-0.5B-Instruct", None, None),
        ("Qwen/Qwen2.5-72B", None, None),
        ("tiny", None, None),
    ],
)
def test_models_are_compared_with_rows_of_their_size(name, parameters, size):
    assert size_class(name, parameters) == size


def test_only_published_rows_with_these_sets_are_shown():
    assert len(rows_beside(SETS, "3B")) == 11 and len(rows_beside(SETS, "7B")) == 2
    assert "3B base PPO" not in [row.label for row in rows_beside(["nq"], "3B")]  # only its average is published
    assert rows_beside(["world"], "3B") == rows_beside(SETS, None) == rows_beside(SETS, "none") == []
    assert len(rows_beside(SETS, "all")) == len(PUBLISHED)


# The table


def make_results(names, size="3B", asked=10, totals=None):
    sets = {name: {"source": name, "asked": asked, "total": (totals or {}).get(name, asked)} for name in names}
    settings = make_settings(
        sets=sets,
        sampling={"temperature": 0.0, "top_p": 1.0},
        agent={"protocol": "qwen_tools", "passages_per_query": 3, "max_searches": 4},
    )
    groups = {name: [outcome(1.0), outcome(0.0, failed="down" if i == 1 else "")] for i, name in enumerate(names)}
    results = {"search": {**{name: summarize("search", group) for name, group in groups.items()}}}
    results["search"][MACRO] = macro("search", groups)
    return results_markdown(settings, results, size=size)


def cells(markdown, label):
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {label}"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_table_of_all_seven_sets():
    markdown = make_results(SETS[::-1], totals={"bamboogle": 125})
    assert cells(markdown, "exact match") == [*TITLES.values(), "macro"]
    ours = cells(markdown, "**search**, measured here")
    assert re.fullmatch(r"0\.500 ± 0\.500", ours[0]) and ours[5].startswith("1.000")  # without a failed question
    assert cells(markdown, "3B RAG [2°]") == ".348 .544 .387 .255 .226 .047 .080 .270".replace(".", "0.").split()
    assert cells(markdown, "3B base GRPO [2°]")[-2:] == ["", "0.312"] and "7B" not in markdown
    assert "The macro average is over the seven sets." in markdown
    assert "**Bamboogle is a sample: 10 of 125 questions.**" in markdown
    assert "**NQ has 10 questions here, but 3,610 in published numbers.**" in markdown
    assert "the search of 1 of 14 questions failed (1 x down)" in markdown


def test_the_table_of_some_sets_names_them():
    markdown = make_results(["popqa", "nq"])
    assert cells(markdown, "Search-R1, 3B-it GRPO") == ["0.397", "0.391", "0.394"]
    assert "**The macro average is over these 2 sets, not over the seven.**" in markdown
    mixed = make_results(["nq", "mine"])
    assert cells(mixed, "3B RAG [2°]") == ["0.348", "", ""]  # no average over a set without published scores
    single = make_results(["mine"])
    assert cells(single, "exact match") == ["mine"] and "[2°]" not in single and "macro" not in cells(single, "search")
    assert "questions are resampled within each set" in mixed and "resampled" not in single


def test_the_documentation_has_the_published_rows():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    table = page.split("<!-- table: published -->")[1].split("<!-- end -->")[0]
    for row in PUBLISHED:
        expected = [*(f"{value:.3f}" for value in row.em or ())] or [""] * 7
        assert cells(table, row.title) == [*expected, f"{row.average:.3f}"]
    assert table.count("\n| ") == len(PUBLISHED) + 1
