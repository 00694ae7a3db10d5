"""Log-probs by length equal the padded ones, in values and in gradients, whatever the shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import make_random_model
from tests.scripted_trainer import real_trainer
from trl_search.logprobs import MAX_CHUNKS, logps_by_length
from trl_search.tiny_policy.tokenizer import make_tokenizer

TOKENIZER = make_tokenizer()
MODEL = make_random_model(TOKENIZER)


def padded(ids_BT, mask_BT, keep):
    positions = (mask_BT.cumsum(1) - 1).clamp(min=0)
    logits = MODEL(input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, ids_BT[:, 1:, None]).squeeze(-1)[:, -keep:]
    return logps * mask_BT[:, -keep:], None, None


@st.composite
def batches(draw):
    rows = draw(st.integers(1, 13))
    prompts = draw(st.lists(st.integers(1, 9), min_size=rows, max_size=rows))
    completions = draw(st.lists(st.integers(0, 30), min_size=rows, max_size=rows))
    prompt, completion = max(prompts), max(1, max(completions))
    mask = torch.zeros(rows, prompt + completion, dtype=torch.long)
    for row in range(rows):
        mask[row, prompt - prompts[row] : prompt + completions[row]] = 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    ids = torch.randint(300, 1500, mask.shape, generator=generator) * mask
    return ids, mask, completion


@settings(max_examples=25, deadline=None)
@given(batches())
def test_values_and_gradients_equal_the_padded_ones(batch):
    ids, mask, keep = batch
    expected, _, _ = padded(ids, mask, keep)
    calls = []

    def forward(chunk_ids, chunk_mask, chunk_keep):
        calls.append(chunk_ids.shape)
        return padded(chunk_ids, chunk_mask, chunk_keep)

    got, entropies, aux_loss = logps_by_length(forward, ids, mask, keep)
    assert entropies is None and aux_loss is None and len(calls) <= MAX_CHUNKS
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    gradients = []
    for logps in (expected, got):
        MODEL.zero_grad()
        (logps * weights).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in MODEL.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)


def test_short_rows_are_not_run_at_the_width_of_long_ones():
    mask = torch.zeros(8, 200, dtype=torch.long)
    mask[:, 90:110] = 1
    mask[0, 90:] = 1
    widths = []

    def forward(ids, chunk_mask, keep):
        widths.append(ids.shape[1])
        return torch.zeros(len(ids), keep), None, None

    logps_by_length(forward, mask.clone(), mask, 100)
    assert widths == [20, 110]


@pytest.mark.parametrize("compute_entropy", [True, False])
def test_the_trainer_gives_what_its_parent_gives(tmp_path, random_model, tokenizer, compute_entropy):
    trainer = real_trainer(tmp_path, random_model, tokenizer)
    mask = torch.zeros(8, 60, dtype=torch.long)
    for row in range(8):
        mask[row, 10 - row : 15 + 5 * row] = 1
    ids = torch.randint(300, 1500, mask.shape) * mask
    arguments = (trainer.model, ids, mask, 50)
    ours = trainer._get_per_token_logps_and_entropies(*arguments, compute_entropy=compute_entropy)
    parents = super(type(trainer), trainer)._get_per_token_logps_and_entropies(
        *arguments, compute_entropy=compute_entropy
    )
    for mine, theirs in zip(ours[:2], parents[:2], strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine * mask[:, 10:], theirs * mask[:, 10:], atol=1e-5, rtol=1e-5)
