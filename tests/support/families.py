"""Miniature tokenizers of model families: real control tokens and chat templates with a vocabulary of bytes.

The templates are TRL's; for families without one in TRL, a few lines here write the family's format.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
QWEN = (*CHATML, "<|object_ref_start|>", "<|vision_start|>")
QWEN_WORDS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

MISTRAL_V3 = """\
{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{{- '[INST] ' + m.content + '[/INST]' }}
{%- elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}
{{- '{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson + ', "id": "' + c.id + '"}' }}
{%- endfor %}]{{ eos_token }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
{%- elif m.role == 'tool' %}[TOOL_RESULTS] {"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}
{{- '[/TOOL_RESULTS]' }}
{%- endif %}{% endfor %}"""
MISTRAL_V13 = """\
{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{{- '[INST]' + m.content + '[/INST]' }}
{%- elif m.tool_calls %}{% for c in m.tool_calls %}[TOOL_CALLS]
{{- c.function.name + '[ARGS]' + c.function.arguments | tojson }}{% endfor %}{{ eos_token }}
{%- elif m.role == 'assistant' %}{{ m.content + eos_token }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
{%- endif %}{% endfor %}{# its thoughts stand between [THINK] and [/THINK] #}"""
PHI_4_MINI = """\
<|system|>{% for t in tools or [] %}{{ '<|tool|>' + t.function | tojson + '<|/tool|>' }}{% endfor %}<|end|>
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|tool_response|>' + m.content | tojson + '<|end|>' }}
{%- else %}{{ '<|' + m.role + '|>' + (m.content or '') }}
{%- for c in m.tool_calls or [] %}{{ '<|tool_call|>' + c.function | tojson + '<|/tool_call|>' }}{% endfor %}<|end|>
{%- endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
# Like GLM-4.5's, without line breaks in a call.
GLM_4_7 = """\
[gMASK]<sop>{% if tools %}<|system|>{% for t in tools %}{{ '\n' + t | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|user|>' + m.content }}
{%- elif m.role == 'assistant' %}{{ '<|assistant|></think>' + (m.content or '') }}
{%- for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name }}
{%- for k, v in c.function.arguments.items() %}
{{- '<arg_key>' + k + '</arg_key><arg_value>' + (v if v is string else v | tojson) + '</arg_value>' }}
{%- endfor %}</tool_call>{% endfor %}
{%- elif m.role == 'tool' %}{{ '<|observation|><tool_response>' + m.content + '</tool_response>' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|></think>{% endif %}"""
SMOLLM2 = """\
{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# It shows only tools that are given as `xml_tools`, and writes no calls.
SMOLLM3 = """\
<|im_start|>system{% for t in xml_tools or [] %}{{ '\n' + t | string }}{% endfor %}<|im_end|>{{ '\n' }}
{%- for m in messages %}
{{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\n' + (m.content or '') + '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# Like Qwen3.5's, but lists are written in Python's notation.
QWEN3_CODER = """\
<|im_start|>system{% for t in tools or [] %}{{ '\n<function>\n<name>' + t.function.name }}{% endfor %}<|im_end|>
{%- for m in messages %}
{%- if m.role == 'tool' %}
{{- '\n<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response>\n<|im_end|>' }}
{%- else %}{{ '\n<|im_start|>' + m.role + '\n' + (m.content or '') }}
{%- for c in m.tool_calls or [] %}{{ '<tool_call>\n<function=' + c.function.name + '>\n' }}
{%- for k, v in c.function.arguments.items() %}
{{- '<parameter=' + k + '>\n' + (v | string) + '\n</parameter>\n' }}{% endfor %}
{{- '</function>\n</tool_call>' }}{% endfor %}<|im_end|>
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"""

GRANITE_4 = """\
<|start_of_role|>system<|end_of_role|>{% for t in tools or [] %}{{ t | tojson + '\n' }}{% endfor %}<|end_of_text|>
{%- for m in messages %}
{{- '\n<|start_of_role|>' + ('user' if m.role == 'tool' else m.role) + '<|end_of_role|>' }}
{%- if m.role == 'tool' %}{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}{% else %}{{ m.content or '' }}
{%- for c in m.tool_calls or [] %}{{ '<tool_call>\n' + c.function | tojson + '\n</tool_call>' }}{% endfor %}
{%- endif %}<|end_of_text|>
{%- endfor %}{% if add_generation_prompt %}{{ '\n<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""
# The policy invents the id of a call, which names the tool: "functions.search:0".
KIMI_K2 = """\
{% if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|im_system|>tool<|im_middle|>## Return of ' + m.tool_call_id + '\n' + m.content }}
{%- else %}{{ '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' + (m.content or '') }}
{%- for c in m.tool_calls or [] %}<|tool_calls_section_begin|><|tool_call_begin|>{{ c.id }}
{{- '<|tool_call_argument_begin|>' + c.function.arguments | tojson + '<|tool_call_end|><|tool_calls_section_end|>' }}
{%- endfor %}{% endif %}<|im_end|>
{%- endfor %}{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"""
MINIMAX_M2 = """\
]~!b[]~b]system{% for t in tools or [] %}{{ '\n<tool>' + t | tojson + '</tool>' }}{% endfor %}[e~[
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '\n]~b]tool\n<response>' + m.content + '</response>[e~[' }}
{%- else %}{{ '\n]~b]' + ('ai' if m.role == 'assistant' else m.role) + '\n' + (m.content or '') }}
{%- for c in m.tool_calls or [] %}{{ '<minimax:tool_call>\n<invoke name="' + c.function.name + '">' }}
{%- for k, v in c.function.arguments.items() %}
{{- '\n<parameter name="' + k + '">' + v | tojson + '</parameter>' }}{% endfor %}
{{- '\n</invoke>\n</minimax:tool_call>' }}{% endfor %}[e~[
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '\n]~b]ai\n<think>\n' }}{% endif %}"""
OLMO_3 = """\
<|im_start|>system{% for t in tools or [] %}{{ '\n' + t | tojson }}{% endfor %}<|im_end|>
{%- for m in messages %}{{ '\n<|im_start|>' + m.role + '\n' + (m.content or '') }}
{%- for c in m.tool_calls or [] %}{{ '<function_calls>\n' + c.function.name + '(' }}
{%- for k, v in c.function.arguments.items() %}{{ k + '=' + v | tojson }}{% endfor %}
{{- ')\n</function_calls>' }}{% endfor %}<|im_end|>
{%- endfor %}{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"""
NEMOTRON_SUPER = """\
<|begin_of_text|>{% for t in tools or [] %}{{ '<AVAILABLE_TOOLS>[' + t | tojson + ']</AVAILABLE_TOOLS>' }}{% endfor %}
{%- for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content or '') }}
{%- for c in m.tool_calls or [] %}{{ '<TOOLCALL>[' + c.function | tojson + ']</TOOLCALL>' }}{% endfor %}<|eot_id|>
{%- endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        template (`str`): A template, or the name of one of TRL's.
        form (`str`, *optional*): The call format of its template; `None` if `qwen_tools` is refused.
        special, words (`tuple[str, ...]`): The added tokens that are special, and the other added tokens.
        pieces (`str`): `"bytes"`; `"sentencepiece"`, which puts a space before a text; or `"normalising"`, which
            turns full-width letters into ASCII, also in control tokens.
    """

    template: str
    form: str | None
    eos: str
    special: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    bos: str | None = None
    pieces: str = "bytes"

    def tokenizer(self) -> PreTrainedTokenizerFast:
        path = _TEMPLATES / f"{self.template}.jinja"
        template = path.read_text(encoding="utf-8") if len(self.template) < 60 and path.is_file() else self.template
        return make_tokenizer(self, template)


_LLAMA = ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>")
_GEMMA_4 = ("<|turn>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>")
_MISTRAL = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
_MISTRAL_REPLY = ("[TOOL_RESULTS]", "[/TOOL_RESULTS]")
_PHI = ("<|end|>", "<|user|>", "<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>")
_GLM = ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>", "<|system|>")
_GPT_OSS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|constrain|>", "<|endoftext|>")
_LFM2 = (*CHATML, "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>")
_DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
_GRANITE = ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>")
_KIMI = ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|tool_calls_section_begin|>")
_LLAMA_BOS, _LFM2_BOS = "<|begin_of_text|>", "<|startoftext|>"
_MISTRAL_13 = (*_MISTRAL, *_MISTRAL_REPLY, "[ARGS]", "[THINK]", "[/THINK]")

FAMILIES = {
    "Qwen2.5": Family("qwen2_5", "hermes", "<|im_end|>", QWEN, QWEN_WORDS[:2]),
    "Qwen3": Family("qwen3", "hermes", "<|im_end|>", QWEN, QWEN_WORDS),
    "Qwen3-2507": Family("qwen3_instruct_2507", "hermes", "<|im_end|>", QWEN, QWEN_WORDS),
    "Qwen3-Coder": Family(QWEN3_CODER, "xml", "<|im_end|>", QWEN, QWEN_WORDS),
    "Qwen3.5, thinking": Family("qwen3_5_think", "xml", "<|im_end|>", QWEN, QWEN_WORDS),
    "Qwen3.5, not thinking": Family("qwen3_5_nothink", "xml", "<|im_end|>", QWEN, QWEN_WORDS),
    "Nemotron 3": Family("nemotron_3_nano", "xml", "<|im_end|>", CHATML, QWEN_WORDS),
    "SmolLM2": Family(SMOLLM2, None, "<|im_end|>", CHATML),
    "SmolLM3": Family(SMOLLM3, None, "<|im_end|>", CHATML, QWEN_WORDS),
    "Llama 3": Family("llama3", None, "<|eot_id|>", _LLAMA, bos=_LLAMA_BOS),
    "Llama 3.1": Family("llama3_1", "llama", "<|eot_id|>", _LLAMA, bos=_LLAMA_BOS),
    "Llama 3.2": Family("llama3_2", "llama", "<|eot_id|>", _LLAMA, bos=_LLAMA_BOS),
    "Gemma 3": Family("gemma3", None, "<eos>", ("<start_of_turn>", "<end_of_turn>"), ("[@BOS@]", "<table>"), "<bos>"),
    "Gemma 4": Family("gemma4", "gemma", "<turn|>", (*_GEMMA_4, '<|"|>', "<|channel>", "<channel|>"), bos="<bos>"),
    "Mistral 7B": Family(MISTRAL_V3, "mistral", "</s>", (*_MISTRAL, *_MISTRAL_REPLY), (), "<s>", "sentencepiece"),
    "Mistral Small 3.2": Family(MISTRAL_V13, "mistral", "</s>", _MISTRAL_13, bos="<s>"),
    "Phi-3, Phi-4": Family("phi3", None, "<|endoftext|>", ("<|end|>", "<|user|>"), ("<|assistant|>", "<|system|>")),
    "Phi-4-mini": Family(
        PHI_4_MINI, "phi", "<|endoftext|>", _PHI, ("<|assistant|>", "<|system|>", "<|tool_response|>")
    ),
    "GLM-4.5": Family("glm4moe", "glm", "<|endoftext|>", _GLM, (*QWEN_WORDS, "<arg_key>", "<arg_value>")),
    "GLM-4.7": Family(GLM_4_7, "glm", "<|endoftext|>", _GLM, (*QWEN_WORDS, "<arg_key>", "<arg_value>")),
    "DeepSeek R1 distillations": Family("deepseek_r1_distill", None, "<｜end▁of▁sentence｜>", (), _DEEPSEEK),
    "gpt-oss": Family("gptoss", "harmony", "<|return|>", _GPT_OSS),
    "LFM2": Family("lfm2_v2", "lfm2", "<|im_end|>", _LFM2, bos=_LFM2_BOS),
    "LFM2.5": Family("lfm2_2_5", "lfm2", "<|im_end|>", _LFM2, ("<think>", "</think>"), _LFM2_BOS),
    "Granite 4": Family(GRANITE_4, "hermes", "<|end_of_text|>", _GRANITE, QWEN_WORDS[:4]),
    "Kimi K2": Family(KIMI_K2, None, "<|im_end|>", _KIMI),
    "MiniMax-M2": Family(MINIMAX_M2, None, "[e~[", ("]~!b[", "]~b]", "<minimax:tool_call>"), QWEN_WORDS[4:]),
    "OLMo 3": Family(OLMO_3, None, "<|im_end|>", CHATML),
    "Llama Nemotron Super 1.5": Family(NEMOTRON_SUPER, None, "<|eot_id|>", _LLAMA, bos=_LLAMA_BOS),
}


def make_tokenizer(family: Family, template: str | dict[str, str] | None) -> PreTrainedTokenizerFast:
    if family.pieces != "sentencepiece":
        vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        if family.pieces == "normalising":
            core.normalizer = normalizers.NFKC()
    else:
        vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256}
        vocabulary |= {chr(letter): 257 + letter - 33 for letter in range(33, 127)}
        core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, fuse_unk=True))
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    core.add_special_tokens(
        [
            AddedToken(token, normalized=family.pieces == "normalising", special=True)
            for token in (family.eos, *([family.bos] if family.bos else []), *family.special)
        ]
    )
    core.add_tokens([AddedToken(word, normalized=False) for word in (*family.words, "2024", "  ")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=family.eos, bos_token=family.bos, pad_token=family.eos, chat_template=template
    )
