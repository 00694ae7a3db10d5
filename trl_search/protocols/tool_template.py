r"""Detects how a chat template writes a search and its reply, by rendering both and parsing the call back.

    prompt  ……<|im_start|>assistant\n
    call    <tool_call>\n{"name": "search", …}\n</tool_call>                 by the policy
    end     <|im_end|>                                                       by the policy, or added for it
    opening \n<|im_start|>user\n<tool_response>\n                            by the environment
    reply   Doc 1 …
    closing \n</tool_response><|im_end|>\n<|im_start|>assistant\n           up to the policy's next turn

The call is rendered inside a conversation, because some templates write the last turn differently. A template that
cannot be used exactly raises here, before the first rollout.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from trl_search.common.errors import UserError
from trl_search.protocols.call_formats import CALL_FORMATS, CallFormat
from trl_search.protocols.calls import call_of, read_call
from trl_search.protocols.instructions import tool_names
from trl_search.protocols.thoughts import written_thought
from trl_search.protocols.turn import read_turn
from trl_search.types import Search, ToolCall

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]  # messages, and whether to add a generation prompt

_QUERIES = ("TRLSEARCHQUERY", 'of "it\'s" [here], {there}')
_CALL = call_of(Search(_QUERIES))
_REPLY = 'TRLSEARCHREPLY "x"\nwith a second line'
CALL_ID = "call00001"
_SEARCH = re.compile(r"\bsearch\b")
_END_OF_TURN = re.compile(r"<\|[^<>|]{1,40}\|>|</s>")


class TemplateProblem(UserError):
    """The chat template cannot be used exactly. The message names the cause and the remedy."""


class UnknownFormat(TemplateProblem):
    """The chat template teaches the policy a format of calls that none of ours reads."""


class CallMessage(NamedTuple):
    """The form in which a template takes a message with a call: its content, its arguments as an object or as JSON."""

    content: str | None
    json_arguments: bool


_CALL_MESSAGES = [CallMessage(content, as_json) for as_json in (False, True) for content in ("", None)]


@dataclass(frozen=True)
class ToolTemplate:
    """The text that a chat template writes around a search and its reply."""

    format: CallFormat  # the format of the call
    message: CallMessage  # the form of message that the template takes
    opening: str  # the text from the call to the reply, including the end of the policy's turn
    closing: str  # the text from the reply to the policy's next turn
    json_reply: bool  # whether the reply is inside a JSON string


def remedy_for(tools: Sequence[Mapping[str, Any]]) -> str:
    """What to do if the chat template cannot be used with these tools."""
    if any(name != "search" for name in tool_names(tools)):
        return "use a model whose template can (docs/models.md), or set tokenizer.chat_template"
    return "use protocol='search_r1', which needs no tools in the template, or set tokenizer.chat_template"


def probe_template(render: Render, tools: Sequence[Mapping[str, Any]]) -> ToolTemplate:
    """Renders a call and its reply, and finds the format that parses the call back.

    Raises:
        TemplateProblem: if the template shows no tools, fails, or writes calls that no known format parses back.
    """
    refused: TemplateProblem | None = None
    problem: Exception | None = None
    for message in _CALL_MESSAGES:
        try:
            return _probe(render, tools, message)
        except TemplateProblem as error:
            refused = refused or error
        except Exception as error:  # a template may raise anything for a form of message that it does not take
            problem = problem or error
    if refused is not None:
        raise refused
    raise TemplateProblem(f"the chat template fails on a tool call ({problem}): {remedy_for(tools)}") from problem


def _probe(render: Render, tools: Sequence[Mapping[str, Any]], message: CallMessage) -> ToolTemplate:
    remedy = remedy_for(tools)
    prompt = render(call_history(_CALL, message)[:1], True)
    text = render(call_history(_CALL, message), True)
    if not all(tool["function"]["name"] in prompt for tool in tools):
        raise TemplateProblem(f"the chat template does not show the tools to the policy: {remedy}")
    json_reply = _REPLY not in text
    reply = json.dumps(_REPLY, ensure_ascii=False)[1:-1] if json_reply else _REPLY
    if text.count(reply) != 1:
        raise TemplateProblem(f"the chat template does not show the reply of a tool to the policy: {remedy}")
    before, closing = text.split(reply)
    written = _policys_part(prompt, before)
    if written is None:
        raise TemplateProblem(f"the chat template rewrites the prompt once a tool was called: {remedy}")
    if _QUERIES[0] not in written:
        raise TemplateProblem(f"the chat template does not write tool calls: {remedy}")
    for form in CALL_FORMATS:
        if (end := _end_of_call(form, written)) is None:
            continue
        opening = written[end:].lstrip()  # the policy writes the white space before the end of its turn
        if _reads_back(form, written.removesuffix(opening)):
            return ToolTemplate(form, message, opening, closing, json_reply)
    raise UnknownFormat(f"the chat template writes calls in an unknown format ({written[:160]!r}): {remedy}")


def opening_of(tool: str, opening: str) -> str:
    """The opening of another tool's reply, made from that of a search.

    Example:
        >>> opening_of("add", "<|start|>functions.search to=assistant<|channel|>commentary<|message|>")
        '<|start|>functions.add to=assistant<|channel|>commentary<|message|>'
    """
    return _SEARCH.sub(tool, opening)


def write_turn(template: ToolTemplate, render: Render, call: ToolCall) -> str:
    """The call in the template's format, without thoughts and without the end of the turn."""
    history = call_history(call, template.message)
    reply = json.dumps(_REPLY, ensure_ascii=False)[1:-1] if template.json_reply else _REPLY
    before = render(history, True).split(opening_of(call.name, template.opening) + reply)[0]
    written = _policys_part(render(history[:1], True), before)
    assert written is not None  # as `probe_template` found
    return written


def call_history(call: ToolCall, message: CallMessage) -> list[dict[str, Any]]:
    arguments: Any = json.dumps(call.arguments) if message.json_arguments else dict(call.arguments)
    tool_call = {"type": "function", "id": CALL_ID, "function": {"name": call.name, "arguments": arguments}}
    return [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": message.content, "tool_calls": [tool_call]},
        {"role": "tool", "name": call.name, "tool_call_id": CALL_ID, "content": _REPLY},
    ]


def _end_of_call(form: CallFormat, written: str) -> int | None:
    """The position after the call, or `None` if the call is not in this format."""
    if form.opening not in written:
        return None
    last_query = written.find(_QUERIES[1][-8:])
    if form.closing:
        end = written.find(form.closing, last_query)
        return None if end < 0 else end + len(form.closing)
    # The call ends at the token that ends the turn.
    end_of_turn = _END_OF_TURN.search(written, last_query)
    return None if end_of_turn is None else end_of_turn.start()


def _reads_back(form: CallFormat, call: str) -> bool:
    act = read_turn(form.canonical(call)).act
    return act is not None and act.tag == "tool_call" and read_call(act.content) == Search(_QUERIES)


def _policys_part(prompt: str, conversation: str) -> str | None:
    """The part of a conversation after its prompt, of which the template may drop a thought; `None` if it does not
    begin with the prompt."""
    bare = prompt.removesuffix(written_thought(prompt))
    if not conversation.startswith(bare):
        return None
    return conversation.removeprefix(prompt) if conversation.startswith(prompt) else conversation.removeprefix(bare)
