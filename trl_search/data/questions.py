"""Questions with golden answers, from the files and hub datasets that search agents are trained and judged on.

Whatever the source looked like, a row comes out as

    {"id": "test_0", "question": "who got the first nobel prize in physics",
     "golden_answers": ["Wilhelm Conrad Röntgen"], "data_source": "nq"}

Sources: FlashRAG rows (`id, question, golden_answers, metadata`), Search-R1 rows (the same and `data_source`, or the
answers in `reward_model.ground_truth.target`), verl's preprocessed rows (`data_source` prefixed with `searchR1_`, the
question in `extra_info`). Sets have one split each that published numbers were measured on; that one is the default.

Training questions that also stand in an evaluation set can be left out (`exclude=`, `without_overlap`): two questions
are one if their text is, normalised as answers are (case, punctuation, articles, spaces). A question in other words is
not found that way.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from trl_search.common.errors import UserError, unknown_name
from trl_search.rewards.answers import golden_list, normalize_answer

FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
SUFFIXES = (".jsonl", ".parquet")
SPLITS = ("train", "dev", "validation", "test")
# The only columns read: metadata and prompts can be a hundred times larger.
_COLUMNS = ("id", "question", "golden_answers", "data_source", "reward_model", "extra_info")
_FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "question": datasets.Value("string"),
        "golden_answers": datasets.List(datasets.Value("string")),
        "data_source": datasets.Value("string"),
    }
)


@dataclass(frozen=True, slots=True)
class HubSet:
    """A dataset on the hub: where it is, the split that is meant when none is named (published numbers are of that
    one), and how many questions each split had when they were published."""

    repository: str
    config: str | None
    split: str
    splits: Mapping[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int | None:
        return self.splits.get(self.split)


HUB_SETS: dict[str, HubSet] = {
    # Its test split is the seven sets below in one, by data_source.
    "nq_hotpotqa": HubSet("PeterJinGo/nq_hotpotqa_train", None, "train", {"train": 169_615, "test": 51_713}),
    "nq": HubSet(FLASHRAG, "nq", "test", {"train": 79_168, "dev": 8_757, "test": 3_610}),
    "triviaqa": HubSet(FLASHRAG, "triviaqa", "test", {"train": 78_785, "dev": 8_837, "test": 11_313}),
    "popqa": HubSet(FLASHRAG, "popqa", "test", {"test": 14_267}),
    "hotpotqa": HubSet(FLASHRAG, "hotpotqa", "dev", {"train": 90_447, "dev": 7_405}),
    "2wikimultihopqa": HubSet(FLASHRAG, "2wikimultihopqa", "dev", {"train": 15_000, "dev": 12_576}),
    "musique": HubSet(FLASHRAG, "musique", "dev", {"train": 19_938, "dev": 2_417}),
    "bamboogle": HubSet(FLASHRAG, "bamboogle", "test", {"test": 125}),
}
EVALUATION_SETS = tuple(name for name, held in HUB_SETS.items() if held.repository == FLASHRAG)
logger = logging.getLogger(__name__)


def load_questions(
    name_or_path: str | Path,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    exclude: Sequence[str | Path] = (),
) -> datasets.Dataset:
    """Loads questions and their golden answers.

    Args:
        name_or_path (`str` or `Path`):
            A `.jsonl` or `.parquet` file, a folder that holds one such file per split (`train.parquet`), or one of the
            names in `HUB_SETS`: the training mix `nq_hotpotqa`, or one of the seven evaluation sets.
        split (`str`, *optional*, defaults to the split that published numbers use):
            Split of a hub set, or name of the file in a folder (there, `"train"` by default).
        limit (`int`, *optional*):
            Keeps a random sample of that many rows, in their order.
        seed (`int`, *optional*, defaults to `0`):
            Seed of that sample.
        exclude (`Sequence`, *optional*):
            Evaluation sets, by name or path (of a folder: its test split), whose questions are left out before the
            sample is drawn. How many were is logged; `without_overlap` returns it.

    Returns:
        `datasets.Dataset`: columns `id`, `question`, `golden_answers` (a list of strings), `data_source`.

    Example:
        >>> load_questions("nq_hotpotqa", limit=1000, exclude=["nq", "hotpotqa"])
        >>> load_questions("data/bamboogle.jsonl")[0]
        {'id': 'test_0', 'question': 'Who was president …?', 'golden_answers': ['…'], 'data_source': 'bamboogle'}
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: give at least 1, or leave it out for every row")
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if from_hub := is_hub_set(name_or_path):
        origin, source, raw = f"dataset {name!r}", name, _read_hub(name, HUB_SETS[name], split)
    elif path.exists() or path.suffix or path.name != name:
        path = _find_file(path, split)
        # FlashRAG keeps its sets as nq/test.jsonl: there the folder says which set it is.
        source = path.resolve().parent.name if path.stem in SPLITS else path.stem
        origin, raw = str(path), _read_file(path)
    else:
        raise unknown_name("dataset", name, HUB_SETS)
    rows = [_question(row, index, where, source) for index, (where, row) in enumerate(raw)]
    if not rows:
        raise UserError(f"{origin} is empty: it holds no questions")
    if from_hub:
        _compare_with_published(name, split or HUB_SETS[name].split, len(rows))
    questions = datasets.Dataset.from_list(rows, features=_FEATURES)
    if exclude:
        questions = _excluding(questions, exclude, origin)
    return questions if limit is None else sample_questions(questions, limit, seed)


def sample_questions(questions: datasets.Dataset, limit: int, seed: int = 0) -> datasets.Dataset:
    """Draws `limit` rows at random, and keeps their order; all of them where there are no more."""
    if limit >= len(questions):
        return questions
    return questions.select(sorted(random.Random(seed).sample(range(len(questions)), limit)))


def load_evaluation_questions(
    name_or_path: str | Path, *, limit: int | None = None, seed: int = 0
) -> datasets.Dataset:
    """Loads a set that is not trained on: a hub set in the split of published numbers, a folder's `test` file."""
    return load_questions(name_or_path, split=None if is_hub_set(name_or_path) else "test", limit=limit, seed=seed)


def is_hub_set(name_or_path: str | Path) -> bool:
    """Whether a name means a set of the hub: a file or folder of that name comes before it."""
    return str(name_or_path) in HUB_SETS and not Path(name_or_path).expanduser().exists()


def without_overlap(
    questions: datasets.Dataset, *evaluation: datasets.Dataset
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Leaves out the questions that also stand in an evaluation set.

    Args:
        questions (`datasets.Dataset`):
            The rows to train on, from `load_questions`.
        evaluation (`datasets.Dataset`):
            The sets to be judged on.

    Returns:
        `tuple`: the rows that stand in none of them, and for each `data_source` of the evaluation sets the number of
        rows that it cost (a row that stands in two sets counts for both).

    Example:
        >>> train, dropped = without_overlap(load_questions("train.parquet"), load_questions("nq"))
        >>> dropped
        {'nq': 3}
    """
    dropped = {source: 0 for held_out in evaluation for source in held_out.unique("data_source")}
    sources: dict[str, set[str]] = {}
    for held_out in evaluation:
        for question, source in zip(held_out["question"], held_out["data_source"], strict=True):
            sources.setdefault(question_key(question), set()).add(source)
    kept = []
    for index, question in enumerate(questions["question"]):
        found = sources.get(question_key(question))
        if found is None:
            kept.append(index)
            continue
        for source in found:
            dropped[source] += 1
    return questions.select(kept), dropped


def question_key(question: str) -> str:
    """Two questions of one key are one question.

    Example:
        >>> question_key("Who wrote  The Amber Mill?")
        'who wrote amber mill'
    """
    # "???" and "The A" have no word left: they are themselves, and not all one question.
    return normalize_answer(question) or question.strip()


def _excluding(questions: datasets.Dataset, exclude: Sequence[str | Path], origin: str) -> datasets.Dataset:
    if isinstance(exclude, (str, Path)):
        raise UserError(f"exclude is a list of names or paths: [{str(exclude)!r}]")
    kept, dropped = without_overlap(questions, *map(load_evaluation_questions, exclude))
    told = ", ".join(f"{count:,} in {source}" for source, count in dropped.items())
    logger.info("%s: of %s questions %s are left out: %s", origin, len(questions), len(questions) - len(kept), told)
    if not len(kept):
        raise UserError(f"{origin}: every question stands in {', '.join(map(str, exclude))}, and none is left")
    return kept


def _compare_with_published(name: str, split: str, rows: int) -> None:
    published = HUB_SETS[name].splits.get(split, rows)
    if rows != published:
        logger.warning(
            "%s (%s) holds %s questions, and published numbers are of %s: they do not compare",
            name,
            split,
            f"{rows:,}",
            f"{published:,}",
        )


def _question(row: Mapping[str, Any], index: int, where: str, source: str) -> dict[str, Any]:
    """One row in our columns. `where` places it in its source, for errors: "questions.jsonl, line 3"."""
    _check_columns(row, where)
    question = str(row.get("question") or _dig(row, "extra_info", "question") or "").strip()
    if not question:
        raise UserError(f"{where}: the question is empty: write one, or remove the row")
    truth = _dig(row, "reward_model", "ground_truth")
    target = truth.get("target") if isinstance(truth, Mapping) else truth
    answers = golden_list(row.get("golden_answers")) or golden_list(target)
    golden = [answer for answer in answers if answer.strip()]
    if not golden:
        raise UserError(f"{where}: the question {question!r} has no golden answer: add one, or remove the row")
    identifier = row.get("id")
    return {
        "id": str(index if identifier is None else identifier),
        "question": question,
        "golden_answers": golden,
        "data_source": str(row.get("data_source") or source).removeprefix("searchR1_"),
    }


def _check_columns(columns: Collection[str], where: str) -> None:
    for column, alternative in (("question", "extra_info"), ("golden_answers", "reward_model")):
        if column not in columns and alternative not in columns:
            raise UserError(
                f"{where}: there is no column {column!r} (nor {alternative!r}, where verl keeps it); the columns are: "
                f"{', '.join(columns) or 'none'}. Rename the one that holds it."
            )


def _dig(row: Mapping[str, Any], *keys: str) -> Any:
    """`row[key][key]…`, or `None` where a level is missing."""
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _find_file(path: Path, split: str | None) -> Path:
    if path.is_dir():
        candidates = [path / f"{split or 'train'}{suffix}" for suffix in SUFFIXES]
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        held = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
        names = " or ".join(candidate.name for candidate in candidates)
        raise UserError(f"folder {path} holds no {names}, but: {held}. Name the split, or the file itself.")
    if not path.is_file():
        raise UserError(f"there is no file {path}. Datasets known by name: {', '.join(HUB_SETS)}.")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is of no kind that questions are read from: give one of {', '.join(SUFFIXES)}")
    return path


def _read_file(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return _read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # utf-8-sig: a file saved by a spreadsheet begins with a byte-order mark.
    with path.open(encoding="utf-8-sig") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}, line {number}: a JSON object is needed, not {type(row).__name__}")
                yield f"{path}, line {number}", row
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno})") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, after line {number}: not UTF-8 text: convert the file to UTF-8") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        _check_columns(names, str(path))
        table = pyarrow.parquet.read_table(path, columns=[name for name in names if name in _COLUMNS])
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a parquet file, or was cut off while it was copied: {error}") from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path}, row {number}", row


def _read_hub(name: str, hub_set: HubSet, split: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        dataset = datasets.load_dataset(hub_set.repository, hub_set.config, split=split or hub_set.split)
    except Exception as error:  # the hub's client raises the errors of half a dozen libraries
        raise UserError(
            f"dataset {name!r} ({hub_set.repository}) cannot be loaded from the hub: {error}. Without a network, "
            "bring its files here and give their path."
        ) from error
    _check_columns(dataset.column_names, f"dataset {name!r}")
    columns = [column for column in dataset.column_names if column in _COLUMNS]
    for number, row in enumerate(dataset.select_columns(columns), start=1):
        yield f"dataset {name!r}, row {number}", row
