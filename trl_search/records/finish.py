"""Finishes a training: writes curves, report and model card, and sends results and report to the trackers."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import TrainingArguments

from trl_search.common.errors import UserError
from trl_search.config.run_file import shown_path
from trl_search.records.folder import read_run
from trl_search.records.publish.card_facts import read_facts
from trl_search.records.publish.model_card import write_card
from trl_search.records.publish.upload import CARD, CURVES
from trl_search.records.report.figures import draw_curves
from trl_search.records.report.page import write_report
from trl_search.records.trackers import log_results

logger = logging.getLogger(__name__)

REPORT = "report.html"


def finish_run(folder: Path, args: TrainingArguments) -> None:
    """
    Writes `curves.png`, `report.html` and `README.md` of a finished training, and sends its results to the trackers.
    """
    draw_curves(folder, folder / CURVES)
    run, report = read_run(folder), None
    try:
        report = write_report([run], folder / REPORT)
    except UserError as error:  # report.html exists and is a file of the user
        logger.warning("the report was not written: %s", error)
    facts = read_facts(folder, args.hub_model_id or shown_path(folder))
    (folder / CARD).write_text(str(write_card(facts)), encoding="utf-8")
    log_results(args, run, report)
