"""The tiny policy's tokenizer: byte-level BPE over the world's language, exactly reversible on any text.

    ' Mira Talvane was born in Port Eskel in 1847.'  ->  10 tokens, one a word

What a tool call and an observation are framed with is a token each, so that a search costs the policy its thought, its
query and five tokens more. The chat template is Qwen2.5's, with tools shown by name alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from trl_search.protocols import PROTOCOLS
from trl_search.reflection import LEXICON
from trl_search.world import generate_world
from trl_search.world_language import KINDS, LITERALS, RELATIONS, WORDS

VOCABULARY = 2176
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
)

# GPT-2's pattern, not Qwen2's: a number takes the space before it, and a quote stands apart from the word after it.
_PATTERN = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

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

# How stock TRL and transformers read a reply back into a message.
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


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Trains the tokenizer, the same every time, in seconds."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    added = [PAD, START, EOS, *_FRAMES]
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - len(added),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(), trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, START, EOS)])
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in _FRAMES])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        response_template=RESPONSE_TEMPLATE,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Saves it in files that transformers 4 and 5, and vLLM, read alike."""
    tokenizer.save_pretrained(folder)
    config = Path(folder) / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _texts() -> Iterator[str]:
    """What the merges are learned from: every word of the language, before all else; then prose as it comes."""
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
    # A title starts with a name that no space precedes: two tokens rather than one.
    yield from (passage.title for passage in generate_world(passages=1000, seed=0).iter_passages())


# Words of thoughts and notices that neither the world's sentences nor the instructions hold.
OTHER_PROSE = (
    "I need the. I should find the. The is. It is. First the. Now the. Next the. I think it is. Maybe. It must be.",
    "Wait, that is not the right passage. I should search again.",
    "Let me think again. Let me verify. Let me double-check.",
    "before after earlier later",
    "Your call was not run. Call again or answer. Nothing was found. You have no searches left: answer now.",
    "Answer without searching. Question: Use these passages. Documents:",
)
