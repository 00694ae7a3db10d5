"""The results table of a model card: from the run's own results, and from evaluations of `trl-search eval`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_search.common.errors import UserError
from trl_search.common.files import is_number, read_object
from trl_search.evaluation.outcomes import RESULTS_FILE
from trl_search.evaluation.sets import MACRO
from trl_search.evaluation.settings import model_sha256
from trl_search.records.folder import AFTER_ROW, BEST_ROW, section


@dataclass(frozen=True)
class Result:
    """One line of the results table: a policy, its questions, its scores."""

    policy: str
    dataset: str
    questions: int
    em: float
    em_ci95: float | None = None
    f1: float | None = None
    searches: float | None = None
    final: bool = False  # a result of the published model, which also goes into the card's metadata


def training_results(folder: Path, task: Mapping[str, Any], published: Path) -> list[Result]:
    """The results of `trl-search train`: before and after training, and of the best checkpoint. `published`, a run or
    a checkpoint, determines which line is final.

    Raises:
        UserError: if the folder holds results that are not of a training.
    """
    if not (folder / RESULTS_FILE).is_file():
        return []
    rows = read_object(folder / RESULTS_FILE, "move it away; the card then lacks these results").get("rows")
    if not isinstance(rows, dict):
        raise UserError(
            f"{folder / RESULTS_FILE} holds no results of a training: give the folder of a run, not of an evaluation"
        )
    dataset = dataset_names(task)
    own = AFTER_ROW if AFTER_ROW in rows else None  # a killed run has only the rows before training
    best = next((name for name in rows if name.startswith(BEST_ROW)), own)
    final = own if published.resolve() == folder.resolve() else best if published.name == "best" else None
    return [line for name, row in rows.items() for line in _line(name, dataset, row, final=name == final)]


def dataset_names(task: Mapping[str, Any]) -> str:
    """The held-out sets of a training, from `task` in the run's `run.json`."""
    sets = task.get("held_out_questions")
    return ", ".join(sets) if isinstance(sets, dict) and sets else "held-out questions"


def evaluation_results(folder: Path) -> list[Result]:
    """The results of `trl-search eval`: one line per mode and set, and the average. Lines of mode `search` are final.

    Raises:
        UserError: if the folder holds no results of an evaluation.
    """
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {RESULTS_FILE}: give the --output of a `trl-search eval` that has finished")
    modes = read_object(path, "run the evaluation again").get("results")
    if not isinstance(modes, dict) or not all(isinstance(sets, dict) for sets in modes.values()):
        raise UserError(f"{path} is not the result of an evaluation: give the --output of a `trl-search eval`")
    lines: list[Result] = []
    for mode, sets in modes.items():
        for name, row in sets.items():
            average = name == MACRO
            if not average or len(sets) > 2:  # the average of one set is that set
                label = f"average of {len(sets) - 1} sets" if average else name
                lines += _line(f"{mode}, evaluated", label, row, final=mode == "search" and not average)
    return lines


def refuse_another_model(evaluation: Path, published: Path, repo_id: str) -> None:
    """Checks that an evaluation is of the model that is published: its numbers become those of the card. An evaluation
    that does not record its model is accepted.

    Raises:
        UserError: if it is of another model.
    """
    report = read_object(evaluation / RESULTS_FILE, "run the evaluation again")
    settings = section(report, "settings")
    model = section(settings, "model")
    if "sha256" in model:  # noqa: SIM108 (one line would be a riddle)
        same = model["sha256"] == model_sha256(published)
    else:
        same = model.get("name", repo_id) == repo_id
    if not same:
        raise UserError(
            f"{evaluation} evaluated other weights ({settings.get('model_name', model.get('name'))}) than those in "
            f"{published}, so its scores do not belong in this card: evaluate {published}, or leave --eval out"
        )


def _line(policy: str, dataset: str, row: Any, *, final: bool) -> list[Result]:
    """One line, or none if the mean is not a number (if every search failed)."""
    em = _finite(row.get("em")) if isinstance(row, dict) else None
    if em is None:
        return []
    return [
        Result(
            policy=policy,
            dataset=dataset,
            questions=int(row.get("questions") or 0),
            em=em,
            em_ci95=_finite(row.get("em_ci95")),
            f1=_finite(row.get("f1")),
            searches=_finite(row.get("searches")),
            final=final,
        )
    ]


def _finite(value: Any) -> float | None:
    return float(value) if is_number(value) else None
