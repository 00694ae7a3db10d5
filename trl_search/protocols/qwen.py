"""Qwen's tool calling: `<tool_call>` with JSON inside, answered by a tool message or in the same turn."""

from __future__ import annotations

import json
from typing import Any

from trl_search.common.errors import UserError
from trl_search.protocols.base import Protocol
from trl_search.protocols.calls import read_call
from trl_search.types import Action, Answer, Search

_SENTINEL = "TRL_SEARCH_OBSERVATION"


class QwenTools(Protocol):
    """The chat template's own tool calling (seed.txt, verl): a call ends the turn, the reply is a tool message."""

    name = "qwen_tools"
    call_tag = "tool_call"
    correction = "write the call as JSON between the tool_call tags, without a code fence"
    default_instruction = (
        "Answer the given question. You must reason inside <think> and </think> first every time you get new "
        "information. If you lack knowledge, call the search tool; its results come between <tool_response> and "
        "</tool_response>. You can search as many times as you need. When you know enough, give the final answer "
        "inside <answer> and </answer>, without explanation. For example, <answer> Beijing </answer>. Question: "
    )

    def _read_call(self, content: str) -> Action:
        return read_call(content, {tool["function"]["name"] for tool in self.tools})

    def write(self, thought: str, action: Search | Answer) -> str:
        if isinstance(action, Answer):
            return f"<think> {thought} </think>\n<answer> {action.text} </answer>"
        call = {"name": "search", "arguments": {"query_list": list(action.queries)}}
        return f"<think> {thought} </think>\n<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"

    def _observation_frame(self) -> tuple[str, str]:
        eos = str(self.tokenizer.eos_token)
        call = {"type": "function", "function": {"name": "search", "arguments": {"query_list": ["x"]}}}
        history: list[dict[str, Any]] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        reply = {"role": "tool", "name": "search", "content": _SENTINEL}
        remedy = "use an instruct model's tokenizer, set tokenizer.chat_template, or choose protocol='search_r1'"
        if not self.tokenizer.chat_template:
            raise UserError(f"protocol 'qwen_tools' needs a chat template that takes tools; this has none: {remedy}")
        try:
            before = self._render(history, add_generation_prompt=False)
            after = self._render([*history, reply], add_generation_prompt=True)
            tools_shown = all(tool["function"]["name"] in before for tool in self.tools)
        except Exception as error:  # jinja2 errors, and whatever a template raises itself
            raise UserError(f"the chat template fails on a tool call ({error}): {remedy}") from error
        if not tools_shown or _SENTINEL not in after:
            raise UserError(f"the chat template shows neither tools nor tool replies to the policy: {remedy}")
        turn_end = before.rfind(eos) + len(eos)
        if eos not in before or not after.startswith(before[:turn_end]):
            raise UserError(
                f"the chat template does not end the assistant's turn with the EOS token {eos!r}: set "
                "tokenizer.eos_token to the token that does"
            )
        opening, closing = after[turn_end:].split(_SENTINEL)
        return opening, closing

    def _turn_end_ids(self) -> list[int]:
        return [int(self.tokenizer.eos_token_id)]


class QwenInline(QwenTools):
    """The seed's inference script: the same calls, but the reply goes on in the same assistant turn."""

    name = "qwen_inline"
    stop = ("</tool_call>", "</answer>")
    default_instruction = (
        "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get "
        "new information. After reasoning, if you lack knowledge, call a search engine by <tool_call> query "
        "</tool_call>. It returns results between <tool_response> and </tool_response>. Provide the final answer "
        "inside <answer>. For example, <answer> Beijing </answer>. Question: "
    )

    def _observation_frame(self) -> tuple[str, str]:
        return "\n<tool_response>\n", "\n</tool_response>\n"

    def _turn_end_ids(self) -> list[int]:
        return []
