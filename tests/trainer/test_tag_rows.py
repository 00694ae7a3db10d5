"""Tags with untrained embeddings are detected, named with their remedies, and initialised on request."""

from __future__ import annotations

import logging

import pytest
import torch

from trl_search.protocols import load_protocol
from trl_search.trainer.tag_rows import initialise_tags, tag_ids, untrained_tags, warn_of_untrained_tags


@pytest.fixture
def protocol(tokenizer):
    return load_protocol("qwen_tools", tokenizer)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request, random_model):
    random_model.config.tie_word_embeddings = request.param
    if not request.param:
        random_model.lm_head.weight = torch.nn.Parameter(random_model.lm_head.weight.detach().flip(0).clone())
    return random_model


def forget(model, protocol):
    """Gives the call's tags untrained embeddings, as in Qwen2.5-Coder: many equal rows."""
    with torch.no_grad():
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            for token in (*range(50, 60), tag_ids(protocol)["<tool_call>"], tag_ids(protocol)["</tool_call>"]):
                table[token] = table[50] * (1 + 1e-3 * token / 60)


def test_a_trained_vocabulary_has_no_untrained_tags(model, protocol, tokenizer):
    assert {"<tool_call>", "</tool_call>", tokenizer.eos_token} <= tag_ids(protocol).keys()
    assert untrained_tags(model, protocol) == {}


def test_untrained_tags_and_the_remedies_are_named(model, protocol, caplog):
    forget(model, protocol)
    assert untrained_tags(model, protocol) == {"<tool_call>": 11, "</tool_call>": 11}
    with caplog.at_level(logging.WARNING):
        warn_of_untrained_tags(model, protocol)
    assert all(word in caplog.text for word in ("<tool_call>", "11 other rows", "search_r1", "--initialise_tags"))


def test_initialised_tags_differ_from_all_others_and_from_each_other(model, protocol):
    forget(model, protocol)
    before = model.get_input_embeddings().weight.detach().clone()
    assert initialise_tags(model, protocol) == ["<tool_call>", "</tool_call>"]
    assert untrained_tags(model, protocol) == {} and initialise_tags(model, protocol) == []
    changed = (model.get_input_embeddings().weight != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == sorted(tag_ids(protocol)[tag] for tag in ("<tool_call>", "</tool_call>"))
