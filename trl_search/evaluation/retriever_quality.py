"""Measures a retriever: nDCG, recall and MRR against relevance judgements, or golden answers in the passages found.

    data/scifact/                a BEIR folder: queries.jsonl, and qrels/test.tsv with the relevant passages per query
    nq, data/mine.jsonl          a question set: a passage that contains a golden answer counts as relevant

A passage can contain the golden answer without answering the question, so the second measure is an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from trl_search.common.errors import UserError
from trl_search.common.extras import import_extra
from trl_search.common.table_files import read_rows, table_format, table_name
from trl_search.data import QuestionFields
from trl_search.data.questions import sampled_rows
from trl_search.evaluation.sets import load_sets
from trl_search.retrieval import Retriever
from trl_search.rewards.answers import contains_answer
from trl_search.types import Passage

BATCH = 64
CUTS = (1, 3, 5, 10, 20, 100)


@dataclass(frozen=True)
class JudgedQueries:
    """Queries, with the judgements or golden answers that determine which passages are relevant."""

    name: str
    queries: Mapping[str, str]  # text of each query, by id
    # Relevance of passages, by query id and passage id (qrels)
    judgements: Mapping[str, Mapping[str, int]] | None = None
    golden_answers: Mapping[str, Sequence[str]] | None = None  # golden answers, by query id


def load_judged(
    name_or_path: str, *, split: str, limit: int | None, seed: int, fields: QuestionFields | None = None
) -> list[JudgedQueries]:
    """Loads a BEIR folder, or the question sets of a name, a file or a folder."""
    folder = Path(name_or_path).expanduser()
    if (folder / "qrels").is_dir():
        return [_beir(folder, split, limit, seed)]
    return [
        JudgedQueries(
            one.name,
            {str(index): row["question"] for index, row in enumerate(one.rows)},
            golden_answers={str(index): row["golden_answers"] for index, row in enumerate(one.rows)},
        )
        for one in load_sets(name_or_path, limit=limit, seed=seed, fields=fields)
    ]


def measure(retriever: Retriever, judged: JudgedQueries, k: int) -> dict[str, float]:
    """Searches every query, and returns each measure by its name: `{"nDCG@10": 0.68, "R@10": 0.81, "RR@10": 0.65}`.

    Raises:
        UserError: if `ir-measures`, which computes nDCG, recall and MRR, is not installed.
    """
    found: dict[str, list[Passage]] = {}
    with tqdm(total=len(judged.queries), desc=judged.name, unit=" queries", disable=None) as bar:
        asked = list(judged.queries.items())
        for start in range(0, len(asked), BATCH):
            batch = asked[start : start + BATCH]
            # As in BEIR's own evaluation, a passage with the id of the query is the query itself, and is dropped.
            results = retriever.search([text for _, text in batch], k + (judged.judgements is not None))
            for (identity, _), passages in zip(batch, results, strict=True):
                kept = [one for one in passages if judged.judgements is None or one.id != identity]
                found[identity] = kept[:k]
            bar.update(len(batch))
    if judged.judgements is not None:
        return _against_judgements(found, judged.judgements, k)
    assert judged.golden_answers is not None
    return _against_answers(found, judged.golden_answers, k)


def answer_rank(passages: Sequence[Passage], golden_answers: Sequence[str]) -> int | None:
    """The rank, from 1, of the first passage that contains a golden answer; `None` if there is none."""
    return next(
        (
            rank
            for rank, passage in enumerate(passages, start=1)
            if contains_answer(passage.titled_text, golden_answers)
        ),
        None,
    )


def quality_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table with one row per retriever and one column per measure."""
    measures = list(dict.fromkeys(name for values in rows.values() for name in values))
    lines = [f"| retriever | {' | '.join(measures)} |", f"|---|{'---|' * len(measures)}"]
    lines += [f"| {name} | {' | '.join(f'{values[one]:.3f}' for one in measures)} |" for name, values in rows.items()]
    return "\n".join(lines)


def _beir(folder: Path, split: str, limit: int | None, seed: int) -> JudgedQueries:
    judgements: dict[str, dict[str, int]] = {}
    for where, row in read_rows(_file(folder / "qrels", split)):
        try:
            query, passage, relevance = (str(row[name]) for name in ("query-id", "corpus-id", "score"))
            judgements.setdefault(query, {})[passage] = int(relevance)
        except (KeyError, ValueError):
            raise UserError(f"{where}: needs the columns query-id, corpus-id and score (a whole number)") from None
    texts: dict[str, str] = {}
    for where, row in read_rows(_file(folder, "queries")):
        if not {"_id", "text"} <= row.keys():
            raise UserError(f"{where}: a query needs the fields _id and text; this one has {', '.join(row)}")
        texts[str(row["_id"])] = str(row["text"])
    if unknown := judgements.keys() - texts.keys():
        raise UserError(f"{folder}: qrels name the query {min(unknown)!r}, which is not in queries: fetch both again")
    known = [query for query in texts if query in judgements]
    if not known:
        raise UserError(f"{folder}: qrels/{split} judges no passage of any query: fetch it again")
    chosen = [known[index] for index in sampled_rows(len(known), limit, seed)]
    return JudgedQueries(folder.name, {query: texts[query] for query in chosen}, {q: judgements[q] for q in chosen})


def _file(folder: Path, name: str) -> Path:
    found = [file for file in folder.iterdir() if table_name(file) == name and table_format(file)]
    if len(found) != 1:
        there = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
        raise UserError(f"{folder} needs one file called {name}, but has {len(found)}; its files are: {there}")
    return found[0]


def _against_judgements(
    found: Mapping[str, Sequence[Passage]], judgements: Mapping[str, Mapping[str, int]], k: int
) -> dict[str, float]:
    ir_measures = import_extra("ir_measures", "the computation of nDCG, recall and MRR", "measures")
    # Ranks as scores keep the retriever's order if it gave the same score twice.
    run = {query: {one.id: float(-rank) for rank, one in enumerate(found[query])} for query in judgements}
    cut = min(k, 10)
    wanted = [ir_measures.nDCG @ cut, ir_measures.R @ cut, ir_measures.RR @ cut]
    wanted += [ir_measures.R @ k] if k > cut else []
    values = ir_measures.calc_aggregate(wanted, judgements, run)
    return {str(one): float(values[one]) for one in wanted}


def _against_answers(
    found: Mapping[str, Sequence[Passage]], golden_answers: Mapping[str, Iterable[str]], k: int
) -> dict[str, float]:
    ranks = [answer_rank(found[query], list(golden)) for query, golden in golden_answers.items()]
    cuts = sorted({cut for cut in CUTS if cut < k} | {k})
    return {f"answer@{cut}": sum(rank is not None and rank <= cut for rank in ranks) / len(ranks) for cut in cuts}
