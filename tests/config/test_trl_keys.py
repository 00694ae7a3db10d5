"""Values of TRL's keys that would be an error after the first rollout, or would train in silence, are refused."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trl import GRPOConfig, GRPOTrainer

from tests.support.scripted_trainer import config
from trl_search.common.errors import UserError
from trl_search.config.trl_keys import CHOICES
from trl_search.trainer.sft import SearchSFTConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be more than 0"),
        ({"temperature": -1.0}, "temperature=-1.0 must be more than 0"),
        ({"temperature": float("nan")}, "temperature=nan is not a number"),
        ({"top_p": 0.0}, "top_p=0.0 must be more than 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5 must be more than 0 and at most 1"),
        ({"min_p": 2.0}, "min_p=2.0 must be a number from 0 to 1"),
        ({"epsilon": -0.1}, "epsilon=-0.1 must be at least 0"),
        ({"beta": -0.1}, "beta=-0.1 must be at least 0"),
        ({"beta": float("nan")}, "beta=nan is not a number"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be a finite number, at least 0"),
        ({"learning_rate": float("inf")}, "learning_rate=inf must be a finite number"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan is not a number"),
        ({"carry_over": float("nan")}, "carry_over=nan is not a number"),
        ({"top_k": -5}, "top_k=-5 must be at least 0"),
        ({"top_entropy_quantile": 0.0}, "top_entropy_quantile=0.0 must be more than 0 and at most 1"),
        ({"vllm_importance_sampling_clip_max": 0.0}, "vllm_importance_sampling_clip_max=0.0 must be more than 0"),
        ({"num_generations": 0}, "num_generations=0 must be at least 2"),
        ({"num_train_epochs": 0, "max_steps": -1}, "num_train_epochs=0.0 and max_steps=-1 train nothing"),
        ({"max_grad_norm": -0.5}, "max_grad_norm=-0.5 must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be at least 0"),
        ({"adam_beta1": 1.0}, "adam_beta1=1.0 must be at least 0 and less than 1"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0"),
        ({"num_iterations": 0}, "num_iterations=0 must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 must be at least 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be at least 1"),
        ({"steps_per_generation": 0}, "steps_per_generation=0 must be at least 1"),
        ({"reward_weights": [float("nan")]}, r"reward_weights=\[nan\] must be finite"),
        ({"loss_type": "gspo"}, "unknown loss_type 'gspo'"),
        ({"scale_rewards": "groups"}, "unknown scale_rewards 'groups': did you mean 'group'"),
        ({"importance_sampling_level": "turn"}, "unknown importance_sampling_level 'turn'"),
        ({"multi_objective_aggregation": "sum"}, "unknown multi_objective_aggregation 'sum'"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
            "metric_for_best_model=loss is the loss of an evaluation, .*: set it to reward",
        ),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}, "metric_for_best_model=loss is the"),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "lr_scheduler_type=warmup_stable_decay .* 'num_decay_steps'. Set what is missing in lr_scheduler_kwargs",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type=cosine_with_min_lr .* min_lr or min_lr_rate"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, "keyword argument 'cycles'"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(tmp_path, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("warmup_stable_decay", '{"num_decay_steps": 10}'),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("polynomial", None),
    ],
)
def test_a_schedule_with_what_it_needs_is_accepted(tmp_path: Path, kind: str, options: Any) -> None:
    for steps in (-1, 20):
        config(tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=options, max_steps=steps, warmup_steps=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": float("nan")}, "learning_rate=nan is not a number"),
        ({"loss_type": "dtf"}, "unknown loss_type 'dtf': did you mean 'dft'"),
        ({"packing": True}, "packing=True: trajectories are concatenated without padding anyway"),
        (
            {"assistant_only_loss": True},
            "assistant_only_loss=True: the loss always covers just what the policy writes",
        ),
        ({"chat_template_path": "other"}, "chat_template_path='other': the chat template is the tokenizer's"),
        ({"eval_strategy": "steps", "eval_steps": 5}, "eval_strategy=steps: a cold start has no evaluation set"),
    ],
    ids=str,
)
def test_a_cold_start_refuses_wrong_values_before_it_collects(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        SearchSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    assert SearchSFTConfig(str(tmp_path), use_cpu=True, bf16=False, loss_type="dft").loss_type == "dft"


def test_right_values_are_accepted(tmp_path: Path) -> None:
    for name, choices in CHOICES.items():
        for choice in choices:
            config(tmp_path, **{name: choice})
    config(tmp_path, scale_rewards=False, min_p=0.0, top_p=0.5, temperature=0.01, beta=0.0, reward_weights=[0.0])
    best = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    assert config(tmp_path, **best, metric_for_best_model="reward").greater_is_better is True


def test_the_choices_are_trls() -> None:
    source = inspect.getsource(GRPOTrainer)
    described = {field.name: field.metadata.get("help", "") for field in dataclasses.fields(GRPOConfig)}
    for name, choices in CHOICES.items():
        for choice in choices:
            assert f'"{choice}"' in source and f"'{choice}'" in described[name].replace("group'", "'group'"), choice


def test_numbers_given_as_text_or_by_numpy_are_converted(tmp_path: Path) -> None:
    """YAML reads 1e-6 as text, and sweeps draw with NumPy."""
    given = {"learning_rate": "1e-6", "num_generations": np.int64(4), "max_steps": 2.0, "bf16": "false", "top_k": "20"}
    made = config(tmp_path, **given, reward_weights=np.array([1, 0.5]))
    found = {name: getattr(made, name) for name in given} | {"reward_weights": made.reward_weights}
    assert repr(found) == repr(
        {"learning_rate": 1e-6, "num_generations": 4, "max_steps": 2, "bf16": False, "top_k": 20}
        | {"reward_weights": [1.0, 0.5]}
    )
    assert SearchSFTConfig(str(tmp_path), learning_rate="1e-6", use_cpu=True, bf16=False).learning_rate == 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": "fast"}, "learning_rate is 'fast', but must be a number"),
        ({"learning_rate": None}, "learning_rate=None must be a finite number"),
        ({"max_steps": 2.5}, "max_steps is 2.5, but must be a whole number"),
        ({"bf16": "maybe"}, "bf16 is 'maybe', but must be true or false"),
        ({"reward_weights": [1.0, None]}, "must be a list"),
    ],
    ids=str,
)
def test_other_types_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(tmp_path, **options)
