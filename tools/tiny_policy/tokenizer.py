"""The tiny policy's tokenizer: Qwen2's byte-level BPE, trained on the world's language; reversible on any NFC text.

    ' Mira Talvane was born in Port Eskel in 1847.'  ->  10 tokens, one per word

The frames of tool calls and observations are single tokens, so a search costs the policy its thought, its query and
five more tokens. The chat template is Qwen2.5's, but shows only the names of tools.

It must be a `Qwen2Tokenizer`: transformers 5 uses that class for every model of type `qwen2`, whatever the tokenizer's
files say, with its normaliser and its pre-tokenizer, which splits numbers. Therefore years are added tokens.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2Tokenizer

from trl_search.data.world import generate_world
from trl_search.data.world_language import KINDS, LITERALS, RELATIONS, WORDS
from trl_search.protocols import PROTOCOLS
from trl_search.rewards.reflective_phrases import LEXICON

VOCABULARY = 2272
MAX_TOKENS = 2048
PAD, START, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

_TAGS = ("tool_call", "tool_response", "think", "answer", "search", "information")
# Longest match wins, so `" </answer>"` is one token and `"</answer>"` another.
_FRAMES = (
    *(f"<{slash}{tag}>" for tag in _TAGS for slash in ("", "/")),
    *(f" </{tag}>" for tag in ("think", "answer", "search")),
    '\n{"name": "search", "arguments": {"query_list": ["',
    '"]}}\n',
    *(f'Doc {rank}(Title: "' for rank in range(1, 6)),
    '")',
    *(f"{role}\n" for role in ("system", "user", "assistant")),
    "<tools> search </tools>",
    "<tool_response>\n",
    "\n</tool_response>",
    *(f" {year}" for year in LITERALS["year"]),
)

CHAT_TEMPLATE = """\
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' %}
{%- if system or tools %}
    {{- '<|im_start|>system\\n' + system }}
    {%- if tools %}
        {{- '\\n' if system else '' }}
        {{- '<tools>' }}
        {%- for tool in tools %}
            {{- ' ' + (tool.function.name if tool.function is defined else tool.name) }}
        {%- endfor %}
        {{- ' </tools>' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content or not message.tool_calls %}
            {{- '\\n' + (message.content or '') }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# How stock TRL and transformers parse a reply into a message.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


def make_tokenizer() -> Qwen2Tokenizer:
    """Builds the tokenizer, always the same one."""
    learnt = json.loads(_learnt())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],  # type: ignore[misc]
        unk_token=PAD,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[START],
        model_max_length=MAX_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        response_template=RESPONSE_TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in _FRAMES])
    return tokenizer


@functools.cache
def _learnt() -> str:
    """Words and merges as JSON of `tokenizers`. Cached: training takes half a second, and several tests need it."""
    added = [PAD, START, EOS, *_FRAMES]
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - len(added),
        min_frequency=2,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe = Tokenizer(BPE())
    bpe.normalizer = Qwen2Tokenizer().backend_tokenizer.normalizer
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    bpe.train_from_iterator(_texts(), trainer)
    return bpe.to_str()


def _texts() -> Iterator[str]:
    """The texts that merges are learned from: first every word of the language, then prose."""
    words = [word for pool in (*WORDS.values(), *LITERALS.values()) for word in pool]
    prose = [
        *(sentence.replace("{", " ").replace("}", " ") for kind in KINDS.values() for sentence in kind.sentences),
        *(ask for relation in RELATIONS.values() for ask in (*relation.asks, *relation.phrases)),
        *(f" {ask}" for relation in RELATIONS.values() for ask in relation.asks),
        *(f"{relation.keyword} of {relation.keyword}" for relation in RELATIONS.values()),
        *(ask for kind in KINDS.values() for ask, _ in kind.compares),
        *OTHER_PROSE,
    ]
    for _ in range(100):
        yield from (f" {word}" for word in words)
    for _ in range(50):
        yield from prose
    for cls in PROTOCOLS.values():
        yield cls.default_instruction
    yield from (phrase for phrases in LEXICON.values() for phrase in phrases if phrase.isascii() and "(" not in phrase)
    # A title starts with a name without a space before it: two tokens rather than one.
    yield from (passage.title for passage in generate_world(passages=1000, seed=0).iter_passages())


# Words of thoughts and notices that are not in the world's sentences or the instructions.
OTHER_PROSE = (
    "I need the. I should find the. The is. It is. First the. Now the. Next the. I think it is. Maybe. It must be.",
    "Wait, that is not the right passage. I should search again.",
    "Let me think again. Let me verify. Let me double-check.",
    "before after earlier later",
    "Your call was not run. Call again or answer. Nothing was found. You have no searches left: answer now.",
    "Answer without searching. Question: Use these passages. Documents:",
)
