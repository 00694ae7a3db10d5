"""The shipped model: a reversible tokenizer with few tokens for the world's language, its training data, its files."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen2ForCausalLM
from trl.chat_template_utils import is_chat_template_prefix_preserving, parse_response

from tools.tiny_policy.make import save_model
from tools.tiny_policy.samples import ANSWER, KINDS, PADDING, POLICY, ROW, pack, samples_of_world
from tools.tiny_policy.tokenizer import make_tokenizer
from tools.tiny_policy.training import _hidden
from trl_search.config.agent import TINY
from trl_search.data.world import World
from trl_search.data.world_language import LITERALS, WORDS
from trl_search.environment import SearchEnvironment
from trl_search.evaluation.evaluate import answer_questions
from trl_search.evaluation.outcomes import summarize
from trl_search.policies.tiny import tiny_policy_path
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.protocols import PROTOCOLS, SEARCH_TOOL, load_protocol
from trl_search.retrieval import Retriever
from trl_search.types import Answer, Search

TOKENIZER = make_tokenizer()
needs_weights = pytest.mark.skipif(
    not (Path(tiny_policy_path()) / "model.safetensors").exists(), reason="the weights have not been made yet"
)


# The tokenizer


@given(st.text())
def test_any_text_is_decoded_exactly(text: str) -> None:
    text = unicodedata.normalize("NFC", text)  # the tokenizer of Qwen2 normalises first
    assert TOKENIZER.decode(TOKENIZER.encode(text), clean_up_tokenization_spaces=False) == text


@given(st.lists(st.sampled_from(list(TOKENIZER.get_added_vocab())) | st.text(max_size=5), max_size=8))
def test_text_with_tags_is_decoded_exactly(pieces: list[str]) -> None:
    text = unicodedata.normalize("NFC", "".join(pieces))
    assert TOKENIZER.decode(TOKENIZER.encode(text), clean_up_tokenization_spaces=False) == text


def test_every_word_of_the_world_is_one_token() -> None:
    words = [word for pool in (*WORDS.values(), *LITERALS.values()) for word in pool]
    assert [word for word in words if len(TOKENIZER.encode(f" {word}")) > 1] == []


def test_passages_questions_and_calls_are_short(world: World) -> None:
    def mean_tokens(texts: list[str]) -> float:
        return sum(len(TOKENIZER.encode(text)) for text in texts) / len(texts)

    assert mean_tokens([f'Doc 1(Title: "{p.title}") {p.text}' for p in world.passages]) < 26
    assert mean_tokens([question.question for question in world.questions("train")]) < 12
    call = load_protocol("qwen_tools", TOKENIZER).write("I need it.", Search(("Who wrote Silent Harbor?",)))
    assert len(TOKENIZER.encode(call)) <= 17


def test_a_prompt_with_the_tool_has_at_most_twelve_tokens_more_than_its_question() -> None:
    question = "Who wrote Silent Harbor?"
    with_tool = load_protocol("qwen_tools", TOKENIZER, instruction="")
    prompt = with_tool.prompt_ids(with_tool.messages(question))
    assert len(prompt) <= len(TOKENIZER.encode(question)) + 12
    messages = [{"role": "user", "content": question}]
    ids = TOKENIZER.apply_chat_template(messages, tools=[SEARCH_TOOL], add_generation_prompt=True, return_dict=False)
    assert tuple(ids) == prompt


def test_tool_messages_are_rendered_as_qwen_renders_them() -> None:
    call = {"type": "function", "function": {"name": "search", "arguments": {"query_list": ["é?"]}}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "<think> t </think>", "tool_calls": [call]},
        {"role": "tool", "content": "A"},
        {"role": "tool", "content": "B"},
    ]
    text = TOKENIZER.apply_chat_template(
        messages,
        tools=[SEARCH_TOOL],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text == (
        "<|im_start|>system\nBe brief.\n<tools> search </tools><|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
        '<|im_start|>assistant\n<think> t </think>\n<tool_call>\n{"name": "search", "arguments": '
        '{"query_list": ["é?"]}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nA\n</tool_response>\n<tool_response>\nB\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_tokenizer_works_with_every_protocol(name: str) -> None:
    protocol = load_protocol(name, TOKENIZER, instruction="")
    for action in (Search(("Who wrote Silent Harbor?",)), Answer("Mira Talvane")):
        text = protocol.write("I need the author.", action)
        assert protocol.parse(text) == action
        assert any(text.endswith(stop) for stop in protocol.stop) or not protocol.stop


def test_stock_trl_can_call_tools_with_it() -> None:
    protocol = load_protocol("qwen_tools", TOKENIZER, instruction="")
    assert is_chat_template_prefix_preserving(TOKENIZER)
    call = protocol.write("I need the author.", Search(("Who wrote Silent Harbor?",)))
    message = parse_response(
        TOKENIZER,
        TOKENIZER.encode(call + TOKENIZER.eos_token),
        prefix=list(protocol.prompt_ids(protocol.messages("Who?"))),
    )
    assert message["tool_calls"][0]["function"] == {
        "name": "search",
        "arguments": {"query_list": ["Who wrote Silent Harbor?"]},
    }


def test_saved_files_load_as_the_same_tokenizer(tmp_path: Path, random_model: Qwen2ForCausalLM) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    save_model(random_model, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == TOKENIZER.get_vocab() and loaded.chat_template == TOKENIZER.chat_template
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert loaded.response_template == TOKENIZER.response_template
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float32 and model.config.eos_token_id == loaded.eos_token_id
    ids = torch.arange(9)[None]
    torch.testing.assert_close(model(ids).logits, random_model(ids).logits, atol=2e-2, rtol=0)


# Its training data


def test_samples_include_every_kind_and_end_in_an_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    samples = samples_of_world(5, tokenizer, n=48)
    assert {sample.kind for sample in samples} == set(KINDS)
    for sample in samples:
        answer = tokenizer.decode(sample.ids[sample.roles == ANSWER])
        assert " </answer>" in answer and "<answer>" not in answer
        assert (sample.roles >= POLICY).sum() < len(sample.ids)


def test_packing_keeps_samples_whole_and_separate(
    tokenizer: PreTrainedTokenizerBase, random_model: Qwen2ForCausalLM
) -> None:
    samples = samples_of_world(5, tokenizer, n=24)
    rows = pack(samples)
    assert int((rows.roles != PADDING).sum()) == sum(len(sample.ids) for sample in samples)
    assert int((rows.positions == 0).sum()) == len(samples)
    # A packed sample gives the same result as alone.
    ids_BT, positions_BT = (torch.from_numpy(part[:1].astype(np.int64)) for part in (rows.ids, rows.positions))
    sample_BT = (positions_BT == 0).cumsum(1)
    visible = (sample_BT.unsqueeze(2) == sample_BT.unsqueeze(1)).tril().unsqueeze(1)
    starts = torch.where(positions_BT[0] == 0)[0].tolist()
    start, end = starts[1], starts[2] if len(starts) > 2 else ROW
    with torch.no_grad():
        packed = _hidden(random_model, ids_BT, positions_BT, visible)[:, start:end]
        alone = _hidden(random_model, ids_BT[:, start:end], torch.arange(end - start)[None], None)
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)


# The shipped weights


@needs_weights
def test_the_shipped_folder_is_small_and_contains_this_tokenizer() -> None:
    folder = Path(tiny_policy_path())
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8_000_000
    shipped = AutoTokenizer.from_pretrained(folder)
    assert shipped.get_vocab() == TOKENIZER.get_vocab() and shipped.chat_template == TOKENIZER.chat_template


@needs_weights
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_shipped_model_searches_reads_and_answers(protocol: str, world: World, retriever: Retriever) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_path())
    result = summarize(
        "search",
        answer_questions(
            "search",
            [question.row() for question in world.questions("test", limit=24)],
            policy=TransformersPolicy(model, tokenizer),
            tokenizer=tokenizer,
            environment=SearchEnvironment(retriever),
            agent=replace(TINY, protocol=protocol, max_completion_length=768, max_observation_length=256),
        ),
    )
    assert result.em > 0.7 and 1.0 <= result.searches < 3.0
