"""Collects attempts for a cold start: a policy answers training questions with real searches.

    questions ─► n samples each, by the policy itself or a teacher   ─► attempts.jsonl   one line per finished attempt
              ─► right, well-formed, searched; at most m per question ─► kept.parquet    `trainer/sft.py` trains on it

This is rejection sampling: the environment and the golden answers select among the samples, without demonstrations by
humans. The ids and the mask in both files are those of the rollout; nothing is re-encoded.

A line of attempts.jsonl (ids shortened):

    {"index": 0, "sample": 1, "id": "train_0", "data_source": "nq", "question": "who wrote The Amber Mill",
     "golden_answers": ["Mira Talvane"], "messages": [{"role": "assistant", "content": "<think> …"}, …],
     "answer": "Mira Talvane", "em": 1.0, "f1": 1.0, "format": 1.0, "searches": 1, "malformed": 0,
     "stop_reason": "answer", "prompt_ids": [5, 9], "ids": [2, 7, 31], "mask": [1, 1, 0]}

A stopped collection resumes. A folder belongs to the settings with which it was started (settings.json); other
settings are an error, and nothing is overwritten. The settings identify files and folders by content, so a collection
may be continued, or trained on, on another machine. The rules for keeping attempts may change at any time
(`select.py`).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from trl_search.common.differences import differences
from trl_search.common.errors import UserError
from trl_search.common.event_loop import run_sync
from trl_search.common.files import read_object, whole_lines, write_json
from trl_search.common.provenance import without_secrets
from trl_search.environment import Environment
from trl_search.evaluation.outcomes import score
from trl_search.policies.base import Policy
from trl_search.policies.server_tokenizer import PROBE
from trl_search.protocols import Protocol
from trl_search.rewards.tag_structure import format_score
from trl_search.rollout import Job, Limits, run_batch
from trl_search.types import Sampling, Trajectory

ATTEMPTS, SETTINGS, FORMAT = "attempts.jsonl", "settings.json", 2
# The share of failed attempts is computed as if there were at least this many attempts.
_MIN_JUDGED = 20


@dataclass(frozen=True, slots=True)
class Attempt:
    """One finished trajectory with its scores. `index` is the position of its question; `searches` counts calls of any
    tool."""

    index: int
    sample: int
    id: str
    data_source: str
    question: str
    golden_answers: Sequence[str]
    messages: list[dict[str, str]]
    answer: str | None
    em: float
    f1: float
    format: float
    searches: int
    malformed: int
    stop_reason: str
    prompt_ids: list[int]
    ids: list[int]
    mask: list[int]


@dataclass(frozen=True, slots=True)
class Collected:
    """The counts of one call of [`collect`]: new attempts, earlier ones, and failed ones."""

    new: int
    before: int
    failed: int


# Collecting


def collect(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    policy: Callable[[], Policy | None],
    environment: Environment,
    protocol: Protocol,
    limits: Limits,
    sampling: Sampling,
    samples: int,
    concurrency: int,
    settings: Mapping[str, Any],
    max_failed_share: float = 0.5,
    player: Callable[[Policy | None, Mapping[str, Any], int], Policy] | None = None,
) -> Collected:
    """Samples every question `samples` times, and appends each attempt to the folder as soon as it is finished; a
    failed one is not written, so the next call tries it again. `settings` is everything that defines an attempt
    besides the questions and the tokenizer. `policy` builds the policy, and is not called if no attempt is missing.
    `player` builds that of one attempt from it, the row and the attempt's seed: a script, or a policy with
    demonstrations.

    Raises:
        UserError: if the folder holds attempts made with other settings, or the retriever fails.
    """
    # Without data_source, which by default is the folder's name.
    unnamed = [{key: value for key, value in row.items() if key != "data_source"} for row in rows]
    hashes = {"questions_hash": _hash(unnamed), "tokenizer_hash": _hash(protocol.encode(PROBE))}
    claim(folder, {"format": FORMAT, **settings, **hashes})
    todo = missing(folder, len(rows), samples)
    before = samples * len(rows) - len(todo)
    if not todo:
        return Collected(0, before, 0)
    speaker = policy()
    failures: list[str] = []
    written = 0

    def finish(index: int, sample: int, trajectory: Trajectory, file: TextIO) -> None:
        nonlocal written
        if trajectory.failed:
            failures.append(trajectory.error)
        else:
            file.write(json.dumps(asdict(_attempt(index, sample, rows[index], trajectory)), ensure_ascii=False) + "\n")
            file.flush()
            written += 1
        if len(failures) > max_failed_share * max(_MIN_JUDGED, written + len(failures)):
            raise UserError(
                f"a search or the environment failed in {len(failures)} of {written + len(failures)} attempts; the "
                f"first error: {failures[0]}. Fix it and start again: {written + before} attempts are kept"
            )

    def job(index: int, sample: int) -> Job:
        prompt = protocol.prompt_ids(protocol.messages(str(rows[index]["question"])))
        key = f"{index}/{sample}"
        seed = random.Random(f"{sampling.seed}/{key}").getrandbits(63)
        return Job(prompt, rows[index], key, None if player is None else player(speaker, rows[index], seed))

    with (folder / ATTEMPTS).open("a", encoding="utf-8") as file:
        run_sync(
            run_batch(
                (job(*attempt) for attempt in todo),
                count=len(todo),
                policy=speaker,
                environment=environment,
                protocol=protocol,
                limits=limits,
                sampling=sampling,
                on_finish=lambda number, trajectory: finish(*todo[number], trajectory, file),
                concurrency=concurrency,
                progress="Collecting",
            )
        )
    return Collected(written, before, len(failures))


def missing(folder: Path, questions: int, samples: int) -> list[tuple[int, int]]:
    """Question and sample number of each missing attempt, ordered by sample, so that a collection that is stopped
    early has about the same number of attempts for each question."""
    done = {(attempt.index, attempt.sample) for attempt in read_attempts(folder)}
    return [(index, sample) for sample in range(samples) for index in range(questions) if (index, sample) not in done]


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Claims the folder for a collection with these settings, or checks that it has the same. Secrets are neither
    written nor compared.

    Raises:
        UserError: if the folder was started with other settings; the message names the differences.
    """
    path = folder / SETTINGS
    settings = json.loads(json.dumps(without_secrets(settings)))  # in the form in which they are read back
    if not path.exists():
        if (folder / ATTEMPTS).exists():
            raise UserError(
                f"{folder} has {ATTEMPTS} but no {SETTINGS}, so the settings of its attempts are unknown: give "
                "another `collection` folder"
            )
        write_json(path, settings)
        return
    held = without_secrets(read_object(path, "give another `collection` folder"))
    if changed := sorted(differences(held, settings)):
        told = "; ".join(f"{name} was {before!r}, and is {now!r}" for name, before, now in changed)
        raise UserError(
            f"the collection in {folder} was made with other settings ({told}): give another `collection` folder, or "
            "the original settings"
        )


def read_attempts(folder: Path) -> list[Attempt]:
    """The attempts of a collection. An incomplete last line, left by a kill, is removed from the file.

    Raises:
        UserError: if a line is not an attempt.
    """
    path, attempts = folder / ATTEMPTS, []
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            attempts.append(Attempt(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number}, is not an attempt ({error}): remove the line") from error
    return attempts


def _attempt(index: int, sample: int, row: Mapping[str, Any], trajectory: Trajectory) -> Attempt:
    outcome = asdict(score(trajectory, row, str(row.get("id", index))))
    return Attempt(
        **{field.name: outcome[field.name] for field in fields(Attempt) if field.name in outcome},
        index=index,
        sample=sample,
        messages=trajectory.messages,
        format=format_score(trajectory.spoken),
        prompt_ids=list(trajectory.prompt_ids),
        ids=trajectory.ids,
        mask=trajectory.mask,
    )


def _hash(value: Any) -> str:
    rows = [list(map(str, row.items())) if isinstance(row, Mapping) else row for row in value]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()[:16]
