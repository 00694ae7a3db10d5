r"""The tool-call formats of model families, and their translation into one common form.

    hermes     <tool_call>\n{"name": "search", "arguments": {…}}\n</tool_call>      Qwen2.5, Qwen3, SmolLM3
    xml        <tool_call>\n<function=search>\n<parameter=query_list>\n[…]\n…       Qwen3-Coder, Qwen3.5, Nemotron 3
    glm        <tool_call>search\n<arg_key>query_list</arg_key>\n<arg_value>[…]…    GLM-4.5, GLM-4.7, GLM-5
    llama      {"name": "search", "parameters": {…}}                               Llama 3.1, 3.2
    mistral    [TOOL_CALLS] [{"name": "search", …}] or [TOOL_CALLS]search[ARGS]{…} Mistral
    gemma      <|tool_call>call:search{query_list:[<|"|>…<|"|>]}<tool_call|>       Gemma 4
    lfm2       <|tool_call_start|>[search(query_list=["…"])]<|tool_call_end|>      LFM2
    phi        <|tool_call|>{"name": "search", "arguments": {…}}<|/tool_call|>     Phi-4-mini
    harmony    <|channel|>commentary to=functions.search <|message|>{…}<|call|>    gpt-oss
    deepseek   <|tool_calls_begin|>…function<|tool_sep|>search\n```json\n{…}\n```…  DeepSeek V3

`CallFormat.canonical` rewrites a turn from any of these formats into the first. transformers' `parse_response` also
reads most of them, and the tests check that both agree. It is not used here, because it raises on malformed calls and
because TRL recognizes a template only by its exact text. A call that cannot be parsed is put between `<tool_call>`
tags, where it counts as malformed.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Call = tuple[str, Any]  # name, arguments

_FUNCTION = re.compile(r"\s*<function=([^<>\n]{1,99})>([^\x00]*)</function>\s*")
_PARAMETER = re.compile(r"<parameter=([^<>\n]{1,99})>((?:[^<]|<(?!/?parameter))*)</parameter>")
_GLM_NAME = re.compile(r"\s*([^\W\d]\w{0,99})\s*(?=<arg_key>|\Z|\n)")
_ARG = re.compile(r"<arg_key>([^<]{1,99})</arg_key>\s{0,9}<arg_value>((?:[^<]|<(?!/?arg_))*)</arg_value>")
_KEY = re.compile(r"([{,]\s{0,9})(\w{1,99})(\s{0,9}:)")
_HEADER = re.compile(
    r"(?:<\|start\|>assistant)?(?: to=(?:functions\.)?(?P<before>[\w.]{1,99}))?<\|channel\|>(?P<channel>\w{1,20})"
    r"(?: to=(?:functions\.)?(?P<after>[\w.]{1,99}))?[^<]{0,40}(?:<\|constrain\|>\w{1,20})?[^<]{0,9}<\|message\|>"
)
_HARMONY_END = re.compile(r"<\|(?:end|call|return)\|>")


@dataclass(frozen=True)
class CallFormat:
    """The format in which a family writes calls: `opening`, text for `read`, `closing` or the end of the turn."""

    name: str
    opening: str  # the start of a block of calls. `""` if a turn that starts with `{` is a call.
    closing: str  # the end of a block; `""` if it ends with the turn
    read: Callable[[str], list[Call]]  # returns the calls in the text of a block, or raises if it cannot parse it

    def canonical(self, text: str) -> str:
        """The turn with its calls as JSON in `<tool_call>`. Takes linear time and does not change thoughts."""
        if self.name == "hermes":
            return text
        if self.name == "harmony":
            return _from_harmony(text)
        pieces: list[str] = []
        position = 0
        while (start := text.find("<think>", position)) >= 0:
            end = text.find("</think>", start)
            pieces.append(self._rewrite(text[position:start]))
            position = len(text) if end < 0 else end + len("</think>")
            pieces.append(text[start:position])
        return "".join([*pieces, self._rewrite(text[position:])])

    def _rewrite(self, text: str) -> str:
        if not self.opening:
            # If the prompt opened a thought, the text contains only its closing tag.
            thought, closed, rest = text.rpartition("</think>")
            body = rest.strip().removeprefix("<|python_tag|>").lstrip()
            return thought + closed + _tagged(self.read, body) if body.startswith("{") else text
        pieces: list[str] = []
        position = 0
        while (start := text.find(self.opening, position)) >= 0:
            inside = start + len(self.opening)
            end = text.find(self.closing, inside) if self.closing else len(text)
            if end < 0:
                # The policy did not close the call.
                return "".join([*pieces, text[position:start], "<tool_call>", text[inside:]])
            pieces += [text[position:start], _tagged(self.read, text[inside:end])]
            position = end + len(self.closing)
        return "".join([*pieces, text[position:]])


def _tagged(read: Callable[[str], list[Call]], body: str) -> str:
    try:
        calls = read(body)
    except (ValueError, SyntaxError, RecursionError, MemoryError, AttributeError, KeyError, TypeError):
        return f"<tool_call>{body}</tool_call>"
    return "\n".join(write_call(name, arguments) for name, arguments in calls) or f"<tool_call>{body}</tool_call>"


def write_call(name: str, arguments: Any) -> str:
    """The canonical form of a call."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


def _json_calls(body: str) -> list[Call]:
    value = json.loads(body)
    calls = value if isinstance(value, list) else [value]
    return [(call["name"], call["arguments"] if "arguments" in call else call["parameters"]) for call in calls]


def _xml_call(body: str) -> list[Call]:
    function = _FUNCTION.fullmatch(body)
    if function is None:
        raise ValueError("no <function=…>")
    return [(function[1], {key: _value(value) for key, value in _PARAMETER.findall(function[2])})]


def _glm_call(body: str) -> list[Call]:
    call = _GLM_NAME.match(body)  # a line of its own in GLM-4.5, followed by the arguments at once in GLM-4.7
    if call is None:
        raise ValueError("no name of a tool")
    return [(call[1], {key.strip(): _value(value) for key, value in _ARG.findall(body, call.end())})]


def _mistral_calls(body: str) -> list[Call]:
    calls: list[Call] = []
    for piece in body.split("[TOOL_CALLS]"):
        name, arguments_follow, arguments = piece.partition("[ARGS]")
        if arguments_follow:
            calls.append((name.partition("[CALL_ID]")[0].strip(), json.loads(arguments)))
        else:
            calls += _json_calls(piece)
    return calls


def _gemma_call(body: str) -> list[Call]:
    prefix, _, arguments = body.strip().partition("{")
    marker, _, name = prefix.partition(":")
    if marker != "call":
        raise ValueError("no call:")
    pieces = ("{" + arguments).split('<|"|>')
    written = (json.dumps(piece) if i % 2 else _KEY.sub(r'\1"\2"\3', piece) for i, piece in enumerate(pieces))
    return [(name, json.loads("".join(written)))]


def _python_calls(body: str) -> list[Call]:
    tree = ast.parse(body.strip(), mode="eval").body
    calls = tree.elts if isinstance(tree, ast.List) else [tree]
    return [
        (call.func.id, {str(key.arg): ast.literal_eval(key.value) for key in call.keywords})  # type: ignore[attr-defined]
        for call in calls
    ]


def _deepseek_calls(body: str) -> list[Call]:
    calls = []
    for piece in body.split("<｜tool▁call▁begin｜>")[1:]:
        kind, _, rest = piece.partition("<｜tool▁sep｜>")
        rest = rest.partition("<｜tool▁call▁end｜>")[0]
        if kind.strip() == "function":
            kind, _, rest = rest.partition("\n")
            rest = rest.strip().removeprefix("```json").removesuffix("```")
        calls.append((kind.strip(), json.loads(rest)))
    return calls


def _value(raw: str) -> Any:
    """An argument that is written without quotes: a list or an object in JSON, or in Python's notation as in
    Qwen3-Coder's template, else the text itself."""
    raw = raw.strip()
    if not raw.startswith(("[", "{")):
        return raw
    try:
        return json.loads(raw)
    except ValueError:
        return ast.literal_eval(raw)


def _from_harmony(text: str) -> str:
    pieces, position = [], 0
    while header := _HEADER.search(text, position):
        end = _HARMONY_END.search(text, header.end())
        body = text[header.end() : end.start() if end else len(text)]
        tool = header["before"] or header["after"]
        if tool:
            written = _tagged(lambda raw, name=tool: [(name, json.loads(raw))], body)  # type: ignore[misc]
        elif header["channel"] == "analysis":
            written = f"<think>{body}</think>" if end else f"<think>{body}"
        else:
            written = body
        pieces += [text[position : header.start()], written]
        position = end.end() if end else len(text)
    return "".join([*pieces, text[position:]])


HERMES = CallFormat("hermes", "<tool_call>", "</tool_call>", _json_calls)
HARMONY = CallFormat("harmony", "<|channel|>", "", _json_calls)
LLAMA = CallFormat("llama", "", "", _json_calls)
CALL_FORMATS = (
    HERMES,
    CallFormat("xml", "<tool_call>", "</tool_call>", _xml_call),
    CallFormat("glm", "<tool_call>", "</tool_call>", _glm_call),
    CallFormat("gemma", "<|tool_call>", "<tool_call|>", _gemma_call),
    CallFormat("lfm2", "<|tool_call_start|>", "<|tool_call_end|>", _python_calls),
    CallFormat("phi", "<|tool_call|>", "<|/tool_call|>", _json_calls),
    CallFormat("deepseek", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", _deepseek_calls),
    CallFormat("mistral", "[TOOL_CALLS]", "", _mistral_calls),
    HARMONY,
    LLAMA,
)
