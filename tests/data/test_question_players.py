"""Scripted players find a path to the answer, quote what they read, and answer only from what they were shown."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from trl_search.common.errors import UserError
from trl_search.common.event_loop import run_sync
from trl_search.data.evidence import check_corpus, evidence_of
from trl_search.data.question_plans import Gold, plan
from trl_search.data.question_players import UNKNOWN, QuestionPlayers, play_plan
from trl_search.data.questions import load_questions
from trl_search.data.quotes import QUOTE_WORDS, first_of, key_words, names, quote, sentences
from trl_search.environment import SearchEnvironment
from trl_search.protocols import PROTOCOLS, load_protocol
from trl_search.retrieval import Retriever, load_retriever
from trl_search.retrieval.base import RetrievalError
from trl_search.rollout import Job, Limits, run_batch
from trl_search.types import Answer, Passage, Sampling, Search, StopReason, Trajectory

PASSAGES = [
    Passage(
        "film", "The Amber Mill", "The Amber Mill is a 1931 drama film. It was directed by Mira O. Talvane in Oslo."
    ),
    Passage(
        "mira",
        "Mira O. Talvane",
        "Mira O. Talvane (4 May 1898 – 2 June 1970) was a director. She was born in Borgvik.",
    ),
    Passage("reed", "Reed Song", "Reed Song is a 1950 film directed by Jon Askel."),
    Passage("jon", "Jon Askel", "Jon Askel (9 July 1911 – 1 May 1999) was a Norwegian film director."),
    Passage("lake", "Borgvik", "Borgvik lies at a lake. Its harbour was built in 1702."),
    *(Passage(f"x{i}", f"Other {i}", f"Other {i} is a village with a mill and a song.") for i in range(20)),
]
BRIDGE = {
    "question": "Where was the director of The Amber Mill born?",
    "golden_answers": ["Borgvik"],
    "gold_ids": ["film", "mira"],
}
COMPARISON = {
    "question": "Which film has the director who was born earlier, The Amber Mill or Reed Song?",
    "golden_answers": ["The Amber Mill"],
    "gold_ids": ["film", "reed", "mira", "jon"],
}


@pytest.fixture(scope="module")
def corpus() -> Retriever:
    return load_retriever("bm25", passages=PASSAGES)


def attempt(
    row: dict[str, Any],
    retriever: Retriever,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    seed: int = 0,
    k: int = 2,
) -> Trajectory:
    protocol = load_protocol(name, tokenizer, instruction="")
    environment = SearchEnvironment(retriever, passages_per_query=k)
    players = QuestionPlayers(lambda queries: retriever.search(queries, k), protocol, max_searches=4)
    finished: dict[int, Trajectory] = {}
    prompt = protocol.prompt_ids(protocol.messages(row["question"]))
    run_sync(
        run_batch(
            [Job(prompt, row, key="0", policy=players.for_row(row, seed))],
            count=1,
            policy=None,
            environment=environment,
            protocol=protocol,
            limits=Limits(2048, 512, 768),
            sampling=Sampling(),
            on_finish=finished.__setitem__,
            progress=None,
        )
    )
    return finished[0]


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("row", [BRIDGE, COMPARISON], ids=["bridge", "comparison"])
def test_a_player_follows_what_it_reads_in_every_protocol(
    name: str, row: dict[str, Any], corpus: Retriever, tokenizer: PreTrainedTokenizerBase
) -> None:
    for seed in range(3):
        trajectory = attempt(row, corpus, tokenizer, name, seed=seed)
        assert trajectory.stop_reason is StopReason.ANSWER and not trajectory.malformed
        assert trajectory.actions[-1] == Answer(row["golden_answers"][0])
        found = {passage.id for passages in trajectory.passages for passage in passages}
        assert found >= set(row["gold_ids"])
        # Each thought after the first quotes an observation, or says that the player searches again.
        for before, turn in zip(trajectory.turns, trajectory.turns[1:], strict=False):
            if turn.role == "assistant":
                assert (
                    'says: "' in turn.text
                    or 'According to "' in turn.text
                    or "again" in turn.text
                    or "try" in turn.text
                )
                assert before.role == "tool"


def test_a_comparison_quotes_the_years_of_the_two_works(corpus: Retriever) -> None:
    steps = plan(
        COMPARISON["question"], COMPARISON["golden_answers"], Gold(frozenset(COMPARISON["gold_ids"])),
        lambda queries: corpus.search(queries, 1), max_searches=8, rng=random.Random(1),
    )  # fmt: skip
    script = play_plan(COMPARISON["question"], COMPARISON["golden_answers"], steps, random.Random(1))
    everything = " ".join(passage.text for passage in PASSAGES)
    thought, action = next(script)
    while isinstance(action, Search):
        thought, action = script.send(everything)
    assert "The Amber Mill (Mira O. Talvane) 1898" in thought and "Reed Song (Jon Askel) 1911" in thought


@pytest.mark.parametrize("golden, searches", [("Borgvik", 2), ("1702", 2)])
def test_without_gold_passages_it_tries_queries_until_one_finds_an_answer(
    golden: str, searches: int, corpus: Retriever, tokenizer: PreTrainedTokenizerBase
) -> None:
    question = (
        "Who directed The Amber Mill, and where?" if golden == "Borgvik" else "What of Mira Talvane's birthplace?"
    )
    row = {"question": question, "golden_answers": [golden]}
    trajectory = attempt(row, corpus, tokenizer, "search_r1", k=1)
    assert trajectory.actions[-1] == Answer(golden) and 1 <= trajectory.searches <= searches + 1


def test_a_yes_no_question_without_gold_passages_has_no_plan(corpus: Retriever) -> None:
    def search(queries: Any) -> Any:
        raise AssertionError("there should be no search")

    assert plan("Is it?", ["yes"], Gold(), search, max_searches=4, rng=random.Random(0)) is None


def test_it_answers_only_from_what_it_was_shown(corpus: Retriever) -> None:
    steps = plan(
        BRIDGE["question"], BRIDGE["golden_answers"], Gold(frozenset(BRIDGE["gold_ids"])),
        lambda queries: corpus.search(queries, 1), max_searches=4, rng=random.Random(0),
    )  # fmt: skip
    script = play_plan(BRIDGE["question"], BRIDGE["golden_answers"], steps, random.Random(0))
    next(script)
    assert script.send("an observation that was cut before its evidence")[1] == Answer(UNKNOWN)


def test_it_gives_up_when_no_path_is_found(corpus: Retriever, tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"question": "Who is Xyzzy Plugh?", "golden_answers": ["a wizard"], "gold_ids": ["nowhere"]}
    assert attempt(row, corpus, tokenizer, "search_r1").actions[-1] == Answer(UNKNOWN)


def test_a_retriever_that_fails_while_the_player_plans_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    class Broken(Retriever):
        def search(self, queries: Any, k: int) -> Any:
            raise RetrievalError("the server is down")

    with pytest.raises(UserError, match="the server is down"):
        attempt(BRIDGE, Broken(), tokenizer, "search_r1")


def test_names_key_words_sentences_and_quotes_are_extracted() -> None:
    assert names("Who directed the film Rogues' Regiment and Duke of Borg?") == ["Rogues' Regiment", "Duke of Borg"]
    assert names("It is by A. R. Rahman. The film of 4 May 1931 is Indian.") == ["A. R. Rahman"]
    assert key_words("Where was the director of Hatari! born?") == "director Hatari born"
    assert key_words("Where was the director of Hatari! born?", without="Hatari!") == "director born"
    assert sentences("Mr. A. Lee left. He came back.") == ["Mr. A. Lee left.", "He came back."]
    text = "First one. " + "word " * 60 + "the Needle " + "word " * 60 + "end."
    cut = quote(text, "the Needle")
    assert cut and "the Needle" in cut and cut in text and len(cut.split()) <= QUOTE_WORDS
    assert quote(text, "absent") is None
    assert first_of(["India"], "an Indian film director") == "India" and first_of(["Ind"], "Indian") is None


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_loader_returns_evidence_on_request(kind: str, tmp_path: Path) -> None:
    row = {"question": "q?", "golden_answers": ["a"], "metadata": {"gold_ids": ["p1", "p2"], "dataset": "musique"}}
    path = tmp_path / f"train.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps(row))
    else:
        import pyarrow as pa
        import pyarrow.parquet

        pa.parquet.write_table(pa.Table.from_pylist([row]), path)
    told = load_questions(path, evidence=True)[0]
    assert told["gold_ids"] == ["p1", "p2"] and told["gold_titles"] == [] and told["data_source"] == "musique"
    assert "gold_ids" not in load_questions(path)[0]


def test_evidence_is_read_in_the_format_of_each_set() -> None:
    facts = {"title": ["Lyon", "Lyon", "Rhône"], "sent_id": [0, 1, 0]}
    assert evidence_of({"metadata": {"supporting_facts": facts}}, "")["gold_titles"] == ["Lyon", "Rhône"]
    assert evidence_of({"supporting_facts": [["Lyon", 0], ["Rhône", 1]]}, "")["gold_titles"] == ["Lyon", "Rhône"]
    steps = [{"support_paragraph": {"title": "Lyon"}}, {"support_paragraph": None}]
    assert evidence_of({"metadata": {"question_decomposition": steps}}, "")["gold_titles"] == ["Lyon"]
    assert evidence_of({"question": "q"}, "") == {"gold_ids": [], "gold_titles": []}


@pytest.mark.parametrize(
    "row", [{"gold_ids": "p1"}, {"metadata": {"gold_ids": [None]}}, {"supporting_facts": ["Lyon"]}], ids=str
)
def test_unreadable_evidence_is_named_with_its_place(row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"q\.jsonl, line 3: .* correct the row"):
        evidence_of(row, "q.jsonl, line 3")


def test_a_corpus_without_the_gold_passages_is_refused(corpus: Retriever) -> None:
    def search(queries: Sequence[str]) -> list[list[Passage]]:
        return corpus.search(queries, 10)

    rows = [{"question": f"What is other {i}?", "gold_ids": [f"x{i}"], "gold_titles": []} for i in range(6)]
    check_corpus(rows, search)
    elsewhere = [{**row, "gold_ids": [f"wiki-{i}"]} for i, row in enumerate(rows)]
    with pytest.raises(UserError, match="finds no gold passage of 6 questions, such as 'wiki-0'; it has ids like 'x"):
        check_corpus(elsewhere, search)
    check_corpus(elsewhere[:4], search)  # too few to judge
    check_corpus([{**row, "gold_ids": [], "gold_titles": ["Jon Askel"]} for row in rows], search)


def test_a_corpus_with_few_gold_passages_gives_a_warning(corpus: Retriever, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"question": f"What is other {i}?", "gold_ids": [f"x{i}"], "gold_titles": []} for i in range(6)]
    mixed = [*rows[:1], *({**row, "gold_ids": [f"wiki-{i}"]} for i, row in enumerate(rows[1:]))]
    check_corpus(rows, lambda queries: corpus.search(queries, 10))
    assert not caplog.text
    check_corpus(mixed, lambda queries: corpus.search(queries, 10))
    assert "finds a gold passage of 17 % of 6 questions" in caplog.text
