"""A pack contains exactly the tokens that a scored token depends on, once, in order, within its maximum size."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_search.trainer.loss.packing import assign, idle_pack, make_packs, needed_tokens, scored_tokens


@st.composite
def ragged_batches(draw, max_rows=9, max_completion=20):
    """An attention mask (B, P + C) like TRL's, and a loss mask (B, C)."""
    rows = draw(st.integers(1, max_rows))
    prompts = draw(st.lists(st.integers(1, 9), min_size=rows, max_size=rows))
    completions = draw(st.lists(st.integers(0, max_completion), min_size=rows, max_size=rows))
    prompt, completion = max(prompts), max(1, max(completions))
    attention = torch.zeros(rows, prompt + completion, dtype=torch.long)
    for row in range(rows):
        attention[row, prompt - prompts[row] : prompt + completions[row]] = 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    loss_mask = torch.rand(rows, completion, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    return attention, loss_mask.long()


def by_hand(attention, loss_mask):
    """For each row, the columns that must be computed and the columns that are scored."""
    prompt = attention.shape[1] - loss_mask.shape[1]
    rows = []
    for mask, attended in zip(loss_mask.tolist(), attention.tolist(), strict=True):
        scored = [prompt + c for c, loss in enumerate(mask) if loss and attended[prompt + c]]
        run = [c for c, seen in enumerate(attended) if seen and scored and c < scored[-1]]
        rows.append((run, scored))
    return rows


@settings(max_examples=60)
@given(ragged_batches(), st.integers(1, 60))
def test_packs_contain_the_needed_tokens_once_and_score_the_tokens_of_the_loss(batch, max_tokens):
    attention, loss_mask = batch
    width = attention.shape[1]
    rows = by_hand(attention, loss_mask)
    seen = {}
    for pack in make_packs(attention, scored_tokens(attention, loss_mask), max_tokens):
        assert sum(pack.lengths) <= max_tokens or len(pack.lengths) == 1
        start = 0
        for length in pack.lengths:
            tokens = pack.tokens_T[start : start + length].tolist()
            row = tokens[0] // width
            assert row not in seen
            assert pack.positions_T[start : start + length].tolist() == list(range(length))
            here = (pack.scored_N >= start) & (pack.scored_N < start + length)
            seen[row] = ([t - row * width for t in tokens], [t - row * width for t in pack.targets_N[here].tolist()])
            assert (pack.tokens_T[pack.scored_N[here]] + 1).tolist() == pack.targets_N[here].tolist()
            start += length
        assert start == len(pack.tokens_T) == len(pack.positions_T)
    assert seen == {i: (run, scored) for i, (run, scored) in enumerate(rows) if run}


@settings(max_examples=60)
@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 100))
def test_every_trajectory_is_in_one_pack(lengths, max_tokens):
    packs = assign(lengths, max_tokens)
    assert sorted(i for pack in packs for i in pack) == [i for i, length in enumerate(lengths) if length]
    for pack in packs:
        assert sum(lengths[i] for i in pack) <= max_tokens or len(pack) == 1


def test_packs_are_few_and_of_similar_size():
    assert sorted(sum(pack) for pack in assign([1] * 10, 100)) == [sum(range(10))]
    lengths = [700, 300, 900, 100, 500, 500, 600, 400]
    loads = [sum(lengths[i] for i in pack) for pack in assign(lengths, 1100)]
    assert len(loads) == 4 and max(loads) - min(loads) <= 200
    # A trajectory longer than a pack gets its own pack and does not affect the others.
    assert [len(pack) for pack in assign([5000, 10, 10], 100)] == [1, 2]


def test_tokens_that_no_scored_token_depends_on_are_not_computed():
    attention = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    loss_mask = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1]])  # a final observation; a failed search; no turn
    assert needed_tokens(attention, scored_tokens(attention, loss_mask)).nonzero().tolist() == [[0, 1], [0, 2]]


def test_a_first_token_is_not_scored():
    attention, loss_mask = torch.tensor([[0, 1, 1], [1, 1, 1]]), torch.ones(2, 2)
    assert scored_tokens(attention, loss_mask).tolist() == [[False, False, True], [False, True, True]]


def test_an_idle_pack_scores_nothing():
    pack = idle_pack()
    assert pack.lengths == [1] and len(pack.scored_N) == len(pack.targets_N) == 0
