"""`evaluate` and `predict` of the trainer: any rows, metrics named after their set, exact means.

    evaluate(rows)                        eval_reward        evaluate({"nq": ..., "popqa": ...})    eval_nq_reward,
    predict(rows)                         test_reward                                               eval_popqa_reward

TRL names its metrics `eval_...` whatever the set, so that the sets of a dict would overwrite each other, and averages
the means of batches. Here, a batch weighs as much as it has trajectories, or, in the mean of a reward, trajectories
that have the reward: failed ones have none, and a function may return None. Several processes fill the last batch with
questions that were already asked; these get no reward and count in no mean of rewards and rollouts. TRL's own means of
that batch (the loss, the entropy, `completions/...`) include them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers.trainer_utils import PredictionOutput

from trl_search.common.errors import UserError
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.environment import Environment
from trl_search.rewards.signature import names_in_logs
from trl_search.trainer.prepared_datasets import PreparesDatasets
from trl_search.trainer.prompts import check_reward_calls, with_prompts, with_room
from trl_search.trainer.replaced import replaced

# TRL's metrics that a reward function may be called like.
TRLS_METRICS = frozenset({"reward", "reward_std", "frac_reward_zero_std", "entropy"})


def check_best_model(args: SearchGRPOConfig, eval_dataset: Any, rewards: Sequence[Any]) -> None:
    """Checks `metric_for_best_model`, which transformers would miss only after the first evaluation.

    Raises:
        UserError: if it names none of several evaluation sets, or a reward instead of its mean.
    """
    if args.metric_for_best_model is None:
        return
    given, prefix = args.metric_for_best_model, ""
    metric = given.removeprefix("eval_")
    if isinstance(eval_dataset, Mapping):
        prefix = max((f"{name}_" for name in eval_dataset if metric.startswith(f"{name}_")), key=len, default="")
        if not prefix:
            names = ", ".join(f"eval_{name}_reward" for name in eval_dataset)
            raise UserError(
                f"metric_for_best_model={given} names none of the evaluation sets: set it to a metric of one of them, "
                f"such as {names}"
            )
    reward = metric.removeprefix(prefix).removeprefix("rewards/")
    if reward in set(names_in_logs(rewards)) - TRLS_METRICS:
        raise UserError(
            f"metric_for_best_model={given} is a reward, not a metric: set it to eval_{prefix}rewards/{reward}/mean"
        )


class Evaluates(PreparesDatasets):
    """A mixin whose `evaluate` and `predict` accept the constructor's datasets. List it before TRL's trainer."""

    environment: Environment | None
    num_generations_eval: Any
    reward_func_names: list[str]
    _metrics: Any
    _prefix = "eval"  # of the metrics of the running evaluation
    _batch_rows: Sequence[int] = ()  # the rows of each of its batches, of all ranks, without repeated ones
    _scored_rows: Mapping[str, list[int]] = MappingProxyType({})  # those in the mean of a reward, by metric

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in transformers: the metrics of a dict of datasets are `eval_<name>_reward`, ..."""
        prepared = self._with_prompts(eval_dataset, "eval_dataset")
        if not isinstance(prepared, str):
            # With dataloader_persistent_workers, transformers would evaluate the dataset of the call before again.
            getattr(self, "_eval_dataloaders", {}).pop("eval", None)
        if self.environment is not None:
            if prepared is None or isinstance(prepared, str):
                self.prepare_if_new("eval_dataset")
            self._before_evaluation(self.eval_dataset if prepared is None else prepared, "eval_dataset")
        with self._inside_a_step(), replaced(self, "_prefix", metric_key_prefix):
            return super().evaluate(prepared, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """As in transformers; the metrics include those of the rollouts, such as `test_reward`."""
        prepared = self._with_prompts(test_dataset, "test_dataset")
        if self.environment is None:
            return super().predict(prepared, ignore_keys, metric_key_prefix)
        self._before_evaluation(prepared, "test_dataset")
        with self._inside_a_step(), replaced(self, "_prefix", metric_key_prefix):
            output = super().predict(prepared, ignore_keys, metric_key_prefix)
            return output._replace(metrics={**(output.metrics or {}), **self._measured()})

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.environment is not None and not self.model.training:
            logs.update(self._measured())
        super().log(logs, *args, **kwargs)

    def rows_to_count(self, rows: int) -> int:
        """How many of the `rows` of an evaluation's batch, of all ranks, do not only fill it. They come first.

        It is called once per batch. The length of a stream is unknown, so all its rows count.
        """
        dataset = getattr(self.callback_handler.eval_dataloader, "dataset", None)
        left = 0  # as after the last batch, for a caller that scores a batch outside of an evaluation
        if isinstance(dataset, Dataset):
            left = len(dataset) * self.num_generations_eval - sum(self._batch_rows)
        rows = min(rows, left) if left > 0 else rows
        self._batch_rows = [*self._batch_rows, rows]
        return rows

    def count_rewards(self, rewards_RF: torch.Tensor) -> None:
        """Counts the rewards of an evaluation's batch, of all ranks. NaN: no reward."""
        there_RF = ~rewards_RF.isnan()
        counts = {"reward": int(there_RF.any(dim=1).sum())}
        for name, count in zip(self.reward_func_names, there_RF.sum(dim=0).tolist(), strict=True):
            counts[f"rewards/{name}/mean"] = counts[f"rewards/{name}/std"] = count
        counts["reward_std"] = counts["reward"]
        self._scored_rows = {name: [*self._scored_rows.get(name, ()), count] for name, count in counts.items()}

    def _measured(self) -> dict[str, float]:
        """The means over the batches of the evaluation. They are forgotten, so TRL and the next one add none."""
        means = {}
        for name, values in self._metrics["eval"].items():
            rows = self._scored_rows.get(name, self._batch_rows)
            weights = rows if len(values) == len(rows) else [1] * len(values)
            known = [(value, weight) for value, weight in zip(values, weights, strict=True) if not math.isnan(value)]
            if total := sum(weight for _, weight in known):
                means[f"{self._prefix}_{name}"] = sum(value * weight for value, weight in known) / total
        self._metrics["eval"].clear()
        return means

    @contextlib.contextmanager
    def _inside_a_step(self) -> Iterator[None]:
        """Lets a callback evaluate inside a step. Otherwise transformers would drop the log of that step, and TRL
        would write the metrics of evaluations into it."""
        was_training, should_log = self.model.training, self.control.should_log
        try:
            yield
        finally:
            self.model.train(was_training)
            self.control.should_log = should_log

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As in transformers; for a stream, TRL's loader of evaluations, which repeats each question for its group."""
        if self.environment is not None and isinstance(test_dataset, IterableDataset):
            return self.get_eval_dataloader(test_dataset)
        return super().get_test_dataloader(test_dataset)

    def _before_evaluation(self, dataset: Any, name: str) -> None:
        """Checks what would fail after the first rollout, and clears what an interrupted evaluation left.

        Raises:
            UserError: if a batch does not hold whole groups, or a reward cannot be called.
        """
        self._metrics["eval"].clear()
        self._batch_rows, self._scored_rows = (), {}
        rows, size = self.args.eval_batch_size * self.args.world_size, self.num_generations_eval
        if rows % size:
            raise UserError(
                f"an evaluation batch has {rows} trajectories (per_device_eval_batch_size × processes), which "
                f"num_generations_eval={size} does not divide: set per_device_eval_batch_size to a multiple of "
                f"{size // math.gcd(size, self.args.world_size)}, or num_generations_eval to a divisor of {rows}"
            )
        check_reward_calls(self.reward_funcs, dataset, name)

    def _with_prompts(self, dataset: Any, name: str) -> Any:
        if self.environment is None or dataset is None or isinstance(dataset, str):  # a string names a prepared one
            return dataset
        prepared = with_prompts(dataset, self.protocol, self.reward_funcs, name)
        return with_room(prepared, name, self.protocol, self.model, self.args)
