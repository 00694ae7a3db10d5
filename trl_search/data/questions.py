"""Loads questions with golden answers, from files and from the hub datasets that search agents are trained and
evaluated on.

    load_questions("nq")                                        a named set on the hub (hub_sets.py)
    load_questions("data/train.jsonl.gz")                       a file (formats: common/table_files.py)
    load_questions("popqa.tsv", fields=QuestionFields(answers="possible_answers"))

The columns are always `id`, `question`, `golden_answers` and `data_source` (question_rows.py). Training questions that
are also in an evaluation set can be left out (overlap.py).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path

import datasets

from trl_search.common.bounds import check_at_least
from trl_search.common.errors import UserError, unknown_name
from trl_search.common.table_files import FORMATS, read_rows, table_format, table_name
from trl_search.data.evidence import EVIDENCE, EVIDENCE_COLUMNS, evidence_of
from trl_search.data.hub_sets import HUB_SETS, is_hub_set, read_hub_set
from trl_search.data.overlap import without_overlap
from trl_search.data.question_rows import PASS_RATE, QuestionFields, joined_answers, question_row, rounded_answer

# A file with one of these names takes its data_source from its folder, as in FlashRAG's nq/test.jsonl.
SPLITS = ("train", "dev", "validation", "test")
_FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "question": datasets.Value("string"),
        "golden_answers": datasets.List(datasets.Value("string")),
        "data_source": datasets.Value("string"),
    }
)
logger = logging.getLogger(__name__)


def load_questions(
    name_or_path: str | Path,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    exclude: Sequence[str | Path] = (),
    fields: QuestionFields | None = None,
    evidence: bool = False,
) -> datasets.Dataset:
    """Loads questions and their golden answers.

    Args:
        name_or_path (`str` or `Path`): A file (`.jsonl`, `.json`, `.csv`, `.tsv`, compressed or not, or `.parquet`), a
            folder that holds one such file per split (`train.parquet`), or one of the names in `HUB_SETS`: the
            training mix `nq_hotpotqa`, or one of the seven evaluation sets.
        split (`str`, *optional*, defaults to the split that published numbers use):
            Split of a hub set, or name of the file in a folder (there, `"train"` by default).
        limit (`int`, *optional*): Keeps a random sample of that many rows, in their original order.
        seed (`int`, *optional*, defaults to `0`): Seed of that sample.
        exclude (`Sequence`, *optional*): Evaluation sets, by name or path (of a folder: its test split), whose
            questions are dropped before the sample is drawn. The log says how many; `without_overlap` returns the
            number.
        fields (`QuestionFields`, *optional*):
            The columns of files with an unknown schema, including files of `exclude`. The schemas of hub sets are
            known.
        evidence (`bool`, *optional*, defaults to `False`): Adds the columns `gold_ids` and `gold_titles`: the passages
            that hold the answer, if the source names them (see `trl_search.data.evidence`).

    Returns:
        `datasets.Dataset`: columns `id`, `question`, `golden_answers` (a list of strings), `data_source`, and
        `pass_rate` if the source has it.

    Raises:
        UserError: if something cannot be read; the message names the file and the row.

    Example:
        >>> load_questions("nq_hotpotqa", limit=1000, exclude=["nq", "hotpotqa"])
        >>> load_questions("data/bamboogle.jsonl")[0]
        {'id': 'test_0', 'question': 'Who was president …?', 'golden_answers': ['…'], 'data_source': 'bamboogle'}
    """
    if not isinstance(name_or_path, str | Path):
        raise UserError(f"questions must be given by a file, a folder or a name, not {name_or_path!r:.60}")
    check_at_least(1, limit=limit)
    name, path, columns = str(name_or_path), Path(name_or_path).expanduser(), fields or QuestionFields()

    def choose(names: Sequence[str], where: str) -> list[str]:
        return [*columns.choose(names, where), *(one for one in names if evidence and one in EVIDENCE_COLUMNS)]

    if is_hub_set(name_or_path):
        origin, source, columns = f"dataset {name!r}", name, QuestionFields()
        raw = read_hub_set(name, split or HUB_SETS[name].split, choose)
    elif path.exists() or path.suffix or path.name != name:
        path = _find_file(path, split)
        source = path.resolve().parent.name if table_name(path) in SPLITS else table_name(path)
        origin, raw = str(path), read_rows(path, choose)
    else:
        raise unknown_name("dataset", name, HUB_SETS)
    rows, joined, rounded = [], [], []
    for index, (where, row) in enumerate(raw):
        rows.append(
            {**question_row(row, index, where, source, columns), **(evidence_of(row, where) if evidence else {})}
        )
        if cell := joined_answers(row, columns):
            joined.append(f"{where}: {cell!r:.80}")
        if cell := rounded_answer(row, columns):
            rounded.append(f"{where}: {cell!r:.80}")
    if not rows:
        raise UserError(f"{origin} is empty: it holds no questions")
    if joined:
        logger.warning(
            'one answer holds a | or a ; (%s; %d of %d rows). If these are several answers, write a list, ["a", "b"], '
            "in the cell: else only the whole text counts as right",
            joined[0],
            len(joined),
            len(rows),
        )
    if rounded:
        logger.warning(
            "one answer is a whole number with .0 (%s; %d of %d rows), as pandas writes it beside missing values. "
            "Cells are compared as text, so the number without .0 counts as wrong: remove the .0",
            rounded[0],
            len(rounded),
            len(rows),
        )
    told = {name: datasets.List(datasets.Value("string")) for name in EVIDENCE} if evidence else {}
    if any(PASS_RATE in row for row in rows):
        told[PASS_RATE] = datasets.Value("float64")
        rows = [{PASS_RATE: None, **row} for row in rows]
    questions = datasets.Dataset.from_list(rows, features=datasets.Features({**_FEATURES, **told}))
    if exclude:
        questions = _excluding(questions, exclude, origin, fields)
    return questions if limit is None else sample_questions(questions, limit, seed)


def sample_questions(questions: datasets.Dataset, limit: int, seed: int = 0) -> datasets.Dataset:
    """Draws `limit` rows at random, in their original order."""
    return questions.select(sampled_rows(len(questions), limit, seed))


def sampled_rows(total: int, limit: int | None, seed: int) -> list[int]:
    """The sorted indexes of a random sample of `limit` of `total` rows; all rows without a limit."""
    if limit is None or limit >= total:
        return list(range(total))
    return sorted(random.Random(seed).sample(range(total), limit))


def load_evaluation_questions(
    name_or_path: str | Path, *, limit: int | None = None, seed: int = 0, fields: QuestionFields | None = None
) -> datasets.Dataset:
    """Loads questions for evaluation: the evaluation split of a hub set, or the `test` file of a folder."""
    name = str(name_or_path)
    split = HUB_SETS[name].evaluation_split if is_hub_set(name_or_path) else "test"
    questions = load_questions(name_or_path, split=split, limit=limit, seed=seed, fields=fields)
    return questions.remove_columns(PASS_RATE) if PASS_RATE in questions.column_names else questions


def _excluding(
    questions: datasets.Dataset, exclude: Sequence[str | Path], origin: str, fields: QuestionFields | None
) -> datasets.Dataset:
    if isinstance(exclude, (str, Path)):
        raise UserError(f"exclude must be a list of names or paths: [{str(exclude)!r}]")
    kept, dropped = without_overlap(questions, *(load_evaluation_questions(name, fields=fields) for name in exclude))
    told = ", ".join(f"{count:,} in {source}" for source, count in dropped.items())
    logger.info("%s: of %s questions %s are dropped: %s", origin, len(questions), len(questions) - len(kept), told)
    if not len(kept):
        raise UserError(f"{origin}: every question is also in {', '.join(map(str, exclude))}, and none is left")
    return kept


def _find_file(path: Path, split: str | None) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"there is no file {path}. Datasets known by name: {', '.join(HUB_SETS)}.")
        return path
    stem = split or "train"
    found = sorted(file for file in path.iterdir() if table_format(file) and table_name(file) == stem)
    if len(found) > 1:
        raise UserError(f"folder {path} holds {' and '.join(file.name for file in found)}: name the file itself")
    if not found:
        names = sorted(entry.name for entry in path.iterdir())
        held = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "") or "nothing"
        raise UserError(
            f"folder {path} holds no {stem}{{{','.join(FORMATS)}}}, but: {held}. Name the split, or the file itself."
        )
    return found[0]
