"""The task of a run: its questions, retriever and evaluations, from the flat keys of a recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from trl_search.common.bounds import check_minima, check_positive
from trl_search.common.errors import UserError, unknown_name
from trl_search.common.files import parse_object
from trl_search.config.key_docs import key, with_documented_keys
from trl_search.config.searched import WORLD, Searched, resolve_searched
from trl_search.data import QuestionFields, load_evaluation_questions, load_questions
from trl_search.data.world import Question, generate_world
from trl_search.retrieval import Retriever
from trl_search.rewards import resolve_rewards
from trl_search.rewards.registry import names_a_model


@dataclass
class QuestionArguments:
    """Questions and retriever: the keys that training and cold start share."""

    questions: str = key(
        "world", "Training questions: 'world' (of the embedded world), a name such as nq_hotpotqa, or a file."
    )
    question_field: str | None = key(None, "Column of the question, in a file of an unknown schema.")
    answers_field: str | None = key(None, "Column of the golden answers, in a file of an unknown schema.")
    id_field: str | None = key(None, "Column of the id, in a file of an unknown schema.")
    max_train_questions: int | None = key(None, "Train on a random sample of this many questions.")
    world_passages: int = key(2000, "Number of passages in the embedded world, at least 50.")
    world_seed: int = key(0, "Seed of the embedded world; another seed generates other facts.")
    retriever: str = key(
        "bm25",
        "An index folder, a server's address (http://host:8000), a run's folder (its retriever is used), a kind of "
        "retriever, or world.",
    )
    retriever_options: str = key(
        "{}", 'Options of the retriever as JSON: \'{"index": "indexes/wiki"}\'. The world needs none.'
    )


# The evaluations before training, with the names of their rows in the table of results.
BASELINES = {"direct": "direct answer, no search", "cot": "chain of thought, no search", "rag": "one-shot RAG"}


@with_documented_keys
@dataclass
class TaskArguments(QuestionArguments):
    """Questions, retriever and evaluations."""

    eval_questions: list[str] | None = key(
        None,
        "Evaluation questions: names or files, separated by commas or as a list. Default with the world: its "
        "held-out split. Training questions that are also in these sets are not trained on.",
    )
    max_eval_questions: int | None = key(200, "Evaluate on a random sample of this many questions of each set.")
    reward_funcs: list[str] = key(["em"], "Names of rewards; their weights are in reward_weights.")
    warm_start_steps: int = key(
        0,
        "Supervised steps before GRPO, on scripted trajectories of mixed quality in another embedded world. They "
        "teach the format but only weak behaviour. 0: none.",
    )
    warm_start_learning_rate: float = key(1e-3, "Learning rate of the warm start.")
    baselines: list[str] = key(
        [], "Baselines evaluated before training: direct (no search), cot, rag (one search). none: no baseline."
    )
    evaluate: bool = key(True, "Evaluate held-out EM before and after training.")
    evaluate_every: int = key(
        0, "Also evaluate every N steps, log eval/em, and keep the best checkpoint as output_dir/best. 0: never."
    )

    overwrite: bool = key(
        False, "Allow an output_dir that holds a finished run, or the checkpoints of another, and replace them."
    )

    def __post_init__(self) -> None:
        check_minima(self, max_train_questions=1, max_eval_questions=1, warm_start_steps=0, evaluate_every=0)
        check_positive(warm_start_learning_rate=self.warm_start_learning_rate)
        if self.warm_start_steps and self.questions != WORLD:
            raise UserError(
                "warm_start_steps needs questions: world. For other questions, set it to 0 and start with `trl-search "
                "sft` (--teacher scripts needs no other model)"
            )
        if self.baselines == ["none"]:  # an empty list cannot be given on the command line
            self.baselines = []
        for mode in self.baselines:
            if mode not in BASELINES:
                raise unknown_name("baseline", mode, BASELINES)
        named = [name for name in self.reward_funcs if not names_a_model(name)]
        if named or not self.reward_funcs:
            resolve_rewards(named)

    @property
    def fields(self) -> QuestionFields:
        return QuestionFields(self.question_field, self.answers_field, self.id_field)


@dataclass(frozen=True)
class Task:
    """Training and held-out questions, and the retriever."""

    train: Dataset
    held_out: Dataset | None
    retriever: Retriever | None  # None if the environment takes none

    @property
    def held_out_sets(self) -> Dataset | dict[str, Dataset] | None:
        """For TRL's own evaluations, which log the metrics of each set of a dict under its name."""
        if self.held_out is None:
            return None
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(self.held_out["data_source"]):
            rows.setdefault(name, []).append(row)
        if len(rows) == 1:
            return self.held_out
        return {name: self.held_out.select(indexes) for name, indexes in rows.items()}

    @property
    def description(self) -> dict[str, Any]:
        """The entries of `run.json` about the task, besides the keys of the recipe."""
        held_out = [] if self.held_out is None else self.held_out["data_source"]
        return {"train_questions": len(self.train), "held_out_questions": dict(Counter(held_out))}


def load_task(arguments: TaskArguments, *, seed: int, evidence: bool = False, searches: bool = True) -> Task:
    """Loads questions and retriever, and reports every mistake in a recipe's data. No retriever is opened if the
    environment takes none (`searches`), and questions have `evidence`, the passages with their answers, if these are
    known."""
    searched, held_out = searched_of(arguments), None
    train_limit, limit, fields = arguments.max_train_questions, arguments.max_eval_questions, arguments.fields
    if arguments.questions == WORLD:
        world = searched.world or generate_world(arguments.world_passages, arguments.world_seed)
        train = _sample(_as_dataset(world.questions("train")), train_limit, seed)
        # The world's three types of questions count as one set, so that averages do not weight them equally.
        held_out = _sample(_as_dataset(world.questions("test"), data_source=WORLD), limit, seed)
    else:
        names = set_names(arguments.eval_questions)
        train = load_questions(
            arguments.questions, limit=train_limit, seed=seed, exclude=names, fields=fields, evidence=evidence
        )
        if names:
            held_out = load_held_out(names, limit=limit, seed=seed, fields=fields)
    return Task(train, held_out, searched.load() if searches else None)


def searched_of(arguments: QuestionArguments) -> Searched:
    """The retriever that a recipe names. Nothing is opened."""
    options = parse_object(arguments.retriever_options, "retriever_options", '{"index": "indexes/wiki"}')
    in_world, size = arguments.questions == WORLD, (arguments.world_passages, arguments.world_seed)
    return resolve_searched(arguments.retriever, options, world_size=size, in_world=in_world)


def load_held_out(
    names: Sequence[str], *, limit: int | None, seed: int, fields: QuestionFields | None = None
) -> Dataset:
    """A sample of `limit` questions of each set; the same seed gives the same sample.

    Raises:
        UserError: if two sets have the same `data_source`, under which their results are logged.
    """
    sets = [load_evaluation_questions(name, limit=limit, seed=seed, fields=fields) for name in names]
    seen: dict[str, str] = {}
    for name, questions in zip(names, sets, strict=True):
        for source in dict.fromkeys(questions["data_source"]):
            if source in seen:
                raise UserError(
                    f"eval_questions: {seen[source]} and {name} are both called {source!r}, so their results would be "
                    "one: leave one out, rename its file, or give it another data_source"
                )
            seen[source] = name
    return concatenate_datasets(sets) if len(sets) > 1 else sets[0]


def set_names(given: str | Sequence[str] | None) -> list[str]:
    """The names of the sets, without duplicates, from `"nq,hotpotqa"` or `["nq", "hotpotqa"]`. The name of an existing
    file may hold a comma."""
    parts = [given] if isinstance(given, str) else given or []
    names = (name for part in parts for name in ([part] if Path(part).exists() else part.split(",")))
    return list(dict.fromkeys(name.strip() for name in names if name.strip()))


def _sample(dataset: Dataset, limit: int | None, seed: int) -> Dataset:
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(limit))


def _as_dataset(questions: Sequence[Question], **columns: str) -> Dataset:
    return Dataset.from_list([{**question.row(), **columns} for question in questions])
