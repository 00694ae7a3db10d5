"""Tool calling in the chat template's own format, answered by a tool message or in the same turn."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from trl_search.protocols.base import Protocol
from trl_search.protocols.call_formats import HARMONY, HERMES, write_call
from trl_search.protocols.calls import call_of, read_call, with_types
from trl_search.protocols.control_tokens import ControlTokens
from trl_search.protocols.instructions import REPLY_TAGS
from trl_search.protocols.tool_template import (
    CALL_ID,
    TemplateProblem,
    ToolTemplate,
    UnknownFormat,
    opening_of,
    probe_template,
    remedy_for,
    write_turn,
)
from trl_search.types import Action, Answer, Search, ToolCall

_CLOSED_THOUGHT = re.compile(r"\A\s*(?:<think>\s*)?</think>\s*")
_CALL_ID = re.compile(r'"id":\s{0,3}"([A-Za-z0-9]{9})"|\[CALL_ID\]([A-Za-z0-9]{9})')


class QwenTools(Protocol):
    """Tool calling in the chat template's own format, for any model family: a call ends the turn, and the reply is a
    tool message.

    Raises:
        TemplateProblem: if the template's calls cannot be parsed back, or its replies do not extend the prompt.
    """

    name = "qwen_tools"
    template: ToolTemplate
    call_tag = "tool_call"
    correction = "write the call exactly as the tool instructions show, without a code fence"
    default_instruction = (
        "Answer the given question. You must reason inside <think> and </think> first every time you get new "
        "information. If you lack knowledge, call the search tool" + REPLY_TAGS + ". You can search as many times as "
        "you need. When you know enough, give the final answer inside <answer> and </answer>, without explanation. "
        "For example, <answer> Beijing </answer>. Question: "
    )

    def _read_call(self, content: str) -> Action:
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in self.tools}
        action = read_call(content, schemas)
        return with_types(action, schemas[action.name]) if isinstance(action, ToolCall) else action

    def write(self, thought: str, action: Search | ToolCall | Answer) -> str:
        in_channels = self.call_format is HARMONY
        if isinstance(action, Answer):
            said = f"{'<|channel|>final<|message|>' if in_channels else ''}<answer> {action.text} </answer>"
        elif self.call_format is HERMES:
            asked = call_of(action)
            said = write_call(asked.name, asked.arguments)
        else:
            # If the prompt opens a thought, the template first closes it; here `thought` closes it.
            said = _CLOSED_THOUGHT.sub("", write_turn(self.template, self.show, call_of(action)))
        if in_channels:
            return f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant{said}"
        return f"<think> {thought} </think>\n{said}"

    def _observation_frame(self) -> tuple[str, str]:
        self._require_template()
        self.template = probe_template(self.show, self.tools)
        self.call_format = self.template.format
        end, *opening = self.encode(self.template.opening)
        if end not in ControlTokens(self.tokenizer, self.encode).ids:
            raise TemplateProblem(
                f"the chat template does not end the assistant's turn with a control token "
                f"({self.template.opening[:40]!r} follows a call): {remedy_for(self.tools)}"
            )
        self._end_id = end
        if "<tool_response>" not in self.template.opening:
            for tags in (REPLY_TAGS, REPLY_TAGS.replace("its", "their")):
                self.instruction = self.instruction.replace(tags, "")
        return self.decode(opening), self.template.closing

    def _require_template(self) -> None:
        if not self.template_text:
            raise TemplateProblem(
                f"protocol {self.name!r} needs a chat template, but the tokenizer has none: {remedy_for(self.tools)}"
            )

    def show(self, messages: Sequence[Mapping[str, Any]], goes_on: bool) -> str:
        return self.render_messages(messages, add_generation_prompt=goes_on)

    def quote(self, text: str) -> str:
        return json.dumps(text, ensure_ascii=False)[1:-1] if self.template.json_reply else text

    @property
    def turn_end_id(self) -> int:
        return self._end_id

    def _turn_end_ids(self) -> list[int]:
        return [self._end_id]

    def _frame_ids(self, turn_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        opening, closing = self._frame
        if opening_of("", opening) != opening:  # the opening names the tool
            called = self.parse(self.read_turn(turn_ids))
            opening = opening_of(called.name, opening) if isinstance(called, ToolCall) else opening
        if any(CALL_ID in frame for frame in self._frame):
            # Mistral's templates repeat the id that the policy gave its call.
            call_id = [first or second for first, second in _CALL_ID.findall(self.decode(turn_ids))] or [CALL_ID]
            opening, closing = (frame.replace(CALL_ID, call_id[-1]) for frame in (opening, closing))
        if (opening, closing) == self._frame:
            return super()._frame_ids(turn_ids)
        return self.encode(opening), self.encode(closing)


class QwenInline(QwenTools):
    """Calls as JSON in `<tool_call>`, with the reply in the same assistant turn, as in Search-R1."""

    name = "qwen_inline"
    stop = ("</tool_call>", "</answer>")
    default_instruction = (
        "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get "
        "new information. After reasoning, if you lack knowledge, call a search engine by <tool_call> query "
        "</tool_call>. It returns results between <tool_response> and </tool_response>. Provide the final answer "
        "inside <answer>. For example, <answer> Beijing </answer>. Question: "
    )

    def _observation_frame(self) -> tuple[str, str]:
        self._require_template()
        self.call_format = HERMES
        try:
            taught = probe_template(self.show, self.tools).format if self.tools else HERMES
        except UnknownFormat:
            raise
        except TemplateProblem:  # the template writes no calls, so only the instruction teaches a format
            taught = HERMES
        if taught is not HERMES:
            raise TemplateProblem(
                f"protocol 'qwen_inline' reads JSON in <tool_call>, but this chat template teaches the call format "
                f"{taught.name!r}: use protocol='qwen_tools'"
            )
        return "\n<tool_response>\n", "\n</tool_response>\n"

    def quote(self, text: str) -> str:
        return text

    @property
    def turn_end_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def _turn_end_ids(self) -> list[int]:
        return []
