"""Held-out evaluation during training: every N steps, on a fixed sample of questions.

    step 50 ─► the questions, divided among the ranks ─► the trainer's engine (vLLM or the model), greedy sampling
            ─► outcomes of all ranks ─► eval/em, eval/<dataset>/em, ... in the log of step 50

It uses the prompts, environment and limits of the training. It has its own random numbers, so a run takes the same
steps with and without it. The sample depends on the seed only, and its ids are stored in the run folder. Resuming with
other questions is an error, because the results would not be comparable. Every answer is stored, so that two steps can
be compared question by question:

    runs/mine/held_out/search-step_50.jsonl      one line per question, as `trl-search eval` writes them
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_search.common.bounds import check_at_least
from trl_search.common.errors import UserError
from trl_search.common.files import read_object, write_json
from trl_search.config.agent import AgentSettings
from trl_search.environment import Environment
from trl_search.evaluation.answers_file import Records
from trl_search.evaluation.evaluate import answer_questions
from trl_search.evaluation.outcomes import Evaluation, by_dataset, macro, summarize
from trl_search.policies.base import Policy
from trl_search.records.alarm_rules import EM_BEFORE
from trl_search.trainer.grpo import SearchGRPOTrainer
from trl_search.trainer.prompts import encode_prompts

logger = logging.getLogger(__name__)

HELD_OUT_FILE = "held_out.json"
ANSWERS_FOLDER = "held_out"


@dataclass(frozen=True)
class HeldOutResult:
    """One evaluation: the average over all sets, with equal weights, and the result of each set."""

    step: int
    average: Evaluation
    datasets: dict[str, Evaluation]
    seconds: float

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics to log."""
        return {
            "eval/em": self.average.em,
            "eval/em_upper": self.average.em_interval[1],
            "eval/f1": self.average.f1,
            "eval/searches": self.average.searches,
            "eval/reflection_ratio": self.average.reflective_ratio,
            "eval/failed": self.average.failed / max(1, self.average.questions),
            "eval/seconds": self.seconds,
            **{f"eval/{name}/em": evaluation.em for name, evaluation in self.datasets.items()},
        }


class HeldOut:
    """
    Evaluates the policy of a trainer on a fixed list of questions.

    Args:
        trainer ([`SearchGRPOTrainer`]): Provides model, engine, environment, protocol and limits.
        questions ([`~datasets.Dataset`]): Rows with `question`, `golden_answers`, `id` and `data_source`.

    Raises:
        UserError: for no questions, missing columns, or a trainer without an environment.

    Example:
        >>> held_out = HeldOut(trainer, load_questions("hotpotqa", limit=200))
        >>> trainer.add_callback(EvaluateEvery(50, held_out))
    """

    def __init__(self, trainer: SearchGRPOTrainer, questions: Dataset) -> None:
        if trainer.environment is None:
            raise UserError("held-out evaluation needs an environment: give the trainer a retriever or an environment")
        self.trainer = trainer
        self.rows: list[dict[str, Any]] = list(questions)
        if missing := {"question", "golden_answers", "id", "data_source"} - set(questions.column_names):
            raise UserError(f"held-out questions lack the columns {', '.join(sorted(missing))}: see load_questions")
        if not self.rows:
            raise UserError("there are no held-out questions to evaluate on: give at least one")
        self.last: HeldOutResult | None = None

    @property
    def ids(self) -> dict[str, list[str]]:
        """The ids of the questions, by dataset."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            found.setdefault(row["data_source"], []).append(row["id"])
        return found

    def measure(self, mode: str | None = None) -> HeldOutResult:
        """Evaluates the current policy. All ranks must call it together; each gets the result over all ranks. A `mode`
        is a baseline: `direct`, `cot` or `rag`."""
        trainer, step = self.trainer, self.trainer.state.global_step
        if mode is None and self.last is not None and self.last.step == step:
            return self.last  # greedy sampling from the same weights gives the same answers
        assert trainer.environment is not None
        questions = [trainer.protocol.conversation(row) for row in self.rows]
        result = measure(
            mode or "search",
            self.rows,
            policy=trainer.generation_policy(encode_prompts(questions, trainer.protocol)),
            tokenizer=trainer.protocol.tokenizer,
            environment=trainer.environment,
            agent=trainer.args.agent,
            step=step,
            folder=Path(trainer.args.output_dir or "."),
        )
        if mode is None:
            self.last = result
        return result


class EvaluateEvery(TrainerCallback):
    """Evaluates every `steps` steps. The results are logged with the step.

    Raises:
        UserError: for fewer than one step.
    """

    def __init__(self, steps: int, held_out: HeldOut) -> None:
        check_at_least(1, evaluate_every=steps)
        self.steps, self.held_out = steps, held_out
        self._before: dict[str, float] = {}  # what was measured before the first step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.held_out.last is not None and self.held_out.last.step != state.global_step:
            self.held_out.last = None  # a run that was rolled back reaches the same step with other weights
        if not state.global_step:
            start = self.held_out.last
            self._before = {EM_BEFORE: start.average.em} if start is not None and start.average.is_comparable else {}
        keep_ids(Path(args.output_dir or "."), self.held_out.ids, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.steps:
            return
        self.held_out.trainer.add_to_log(self.held_out.measure().metrics | self._before)
        control.should_log = True


def measure(
    mode: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    policy: AbstractContextManager[Policy],
    tokenizer: PreTrainedTokenizerBase,
    environment: Environment,
    agent: AgentSettings,
    step: int = 0,
    folder: Path,
) -> HeldOutResult:
    """Evaluates on this rank's share of the questions. All ranks must call it; each gets the overall result."""
    state, started = PartialState(), time.perf_counter()
    with policy as speaker:
        outcomes = answer_questions(
            mode,
            rows[state.process_index :: state.num_processes],
            policy=speaker,
            tokenizer=tokenizer,
            environment=environment,
            agent=agent,
            progress=state.is_main_process,
        )
    environment.take_metrics()  # clears them, so that the next rollout does not count them
    groups = by_dataset(sorted(gather_object(outcomes), key=lambda one: one.data_source))
    name = "direct" if mode == "search" and not environment.tools else mode
    if state.is_main_process:
        answers = [one for group in groups.values() for one in group]
        Records(folder / ANSWERS_FOLDER, name, f"step_{step}").write(answers)
    result = HeldOutResult(
        step,
        macro(name, groups),
        {dataset: summarize(name, group) for dataset, group in groups.items()},
        seconds=time.perf_counter() - started,
    )
    if result.average.failed and state.is_main_process:
        said = "; ".join(f"{times} × {error}" for error, times in result.average.errors.items())
        logger.warning(
            "step %d: the search failed for %d of %d held-out questions, which are left out of the means: %s",
            step, result.average.failed, result.average.questions, said,
        )  # fmt: skip
    return result


def keep_ids(folder: Path, ids: dict[str, list[str]], state: TrainerState) -> None:
    """Records the evaluation questions of a new run; for a resumed run, checks that they are the same.

    Raises:
        UserError: if they differ.
    """
    path = folder / HELD_OUT_FILE
    if state.global_step and path.is_file():
        if read_object(path, "remove it to continue without comparing").get("ids") != ids:
            raise UserError(
                f"this run was evaluated on other questions so far ({path}), so its results and its best checkpoint "
                "are not comparable: resume with the same eval_questions, max_eval_questions and seed, or remove "
                "that file to continue anyway"
            )
    elif state.is_world_process_zero:
        write_json(path, {"ids": ids})
