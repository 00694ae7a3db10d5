"""Only `Trajectory` writes ids, mask and logprobs, and it checks its arguments."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_search.types import Completion, FinishReason, Passage, StopReason, Trajectory

steps = st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 99), min_size=1, max_size=9)), max_size=8)


@given(steps)
def test_ids_mask_and_logprobs_only_grow_and_stay_aligned(spans):
    trajectory = Trajectory(prompt_ids=(1,))
    expected: list[tuple[int, int]] = []
    for is_model, ids in spans:
        if is_model:
            trajectory.act(Completion(tuple(ids), tuple(-1.0 for _ in ids), FinishReason.EOS), text="t")
        else:
            trajectory.observe(ids, text="o")
        expected += [(token, int(is_model)) for token in ids]
        assert list(zip(trajectory.ids, trajectory.mask, strict=True)) == expected
        assert len(trajectory.logprobs) == len(trajectory.ids)
    # Pitfall 9: the first token after an observation is trained on, the last token of the observation is not.
    for turn in trajectory.turns:
        assert set(trajectory.mask[turn.start : turn.end]) == {int(turn.role == "assistant")}
    assert trajectory.model_tokens + trajectory.observation_tokens == len(trajectory.ids)


def test_lengths_are_checked():
    with pytest.raises(ValueError, match="2 ids came with 1 logprobs"):
        Completion((1, 2), (-0.1,), FinishReason.EOS)


def test_a_finished_trajectory_is_frozen():
    trajectory = Trajectory(prompt_ids=(1,))
    trajectory.act(Completion((5,), (-0.1,), FinishReason.STOP), text="x")
    trajectory.finish(StopReason.ANSWER, eos_token_id=2)
    with pytest.raises(RuntimeError, match="finished"):
        trajectory.observe((1,), text="late")


# Pitfall 3: a synthetic EOS has mask 0; a sampled one keeps its logprob and mask 1.
def test_a_synthetic_eos_is_masked_and_a_sampled_one_is_not():
    trajectory = Trajectory(prompt_ids=(1,))
    trajectory.act(Completion((5,), (-0.1,), FinishReason.STOP), text="x")
    trajectory.finish(StopReason.ANSWER, eos_token_id=2)
    assert (trajectory.ids, trajectory.mask, trajectory.logprobs) == ([5, 2], [1, 0], [-0.1, 0.0])

    trajectory = Trajectory(prompt_ids=(1,))
    trajectory.act(Completion((5, 2), (-0.1, -0.7), FinishReason.EOS), text="x")
    trajectory.finish(StopReason.ANSWER, eos_token_id=2)
    assert (trajectory.ids, trajectory.mask, trajectory.logprobs) == ([5, 2], [1, 1], [-0.1, -0.7])


# Pitfall 12: non-finite logprobs are dropped and counted.
def test_nonfinite_logprobs_become_nan_and_are_counted():
    trajectory = Trajectory(prompt_ids=(1,))
    trajectory.act(Completion((5, 6, 7), (-math.inf, math.nan, -0.5), FinishReason.EOS), text="x")
    assert trajectory.nonfinite_logprobs == 2
    assert [math.isnan(value) for value in trajectory.logprobs] == [True, True, False]


def test_a_passage_whose_id_and_score_come_from_numpy_can_be_written_as_json():
    passage = Passage(np.int64(17), "Orlune", "A harbour.", score=np.float32(0.5))
    assert passage == Passage("17", "Orlune", "A harbour.", 0.5)
    assert json.loads(json.dumps(asdict(passage)))["score"] == 0.5
