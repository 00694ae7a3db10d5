"""Search-R1's protocol: plain-text tags, for base models and for chat templates without tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl_search.common.errors import UserError
from trl_search.protocols.base import Protocol
from trl_search.protocols.call_formats import HARMONY
from trl_search.protocols.calls import read_query
from trl_search.protocols.instructions import tool_names
from trl_search.types import Action, Answer, Search, ToolCall


class SearchR1(Protocol):
    """Search-R1's tags (arXiv:2503.09516), for base models: no tools, no chat template needed."""

    name = "search_r1"
    stop = ("</search>", "</answer>")
    call_tag = "search"
    shows_tools = False  # the instruction explains the tags; tools in the prompt would teach a second format
    correction = "write the query in plain words between the search tags"
    default_instruction = (
        "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get "
        "new information. After reasoning, if you find you lack some knowledge, you can call a search engine by "
        "<search> query </search> and it will return the top searched results between <information> and "
        "</information>. You can search as many times as you want. If you find no further external knowledge needed, "
        "you can directly provide the answer inside <answer> and </answer>, without detailed illustrations. For "
        "example, <answer> Beijing </answer>. Question: "
    )

    def render_messages(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        if not self.template_text:
            return "\n".join(str(message["content"]) for message in messages) + "\n"
        return super().render_messages(messages, add_generation_prompt=add_generation_prompt)

    def _encode_start(self, text: str) -> list[int]:
        if self.template_text:
            return super()._encode_start(text)
        # Without a template, the tokenizer adds a BOS if the model needs one. An EOS would end the prompt.
        ids: list[int] = self.tokenizer.encode(text)
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _read_call(self, content: str) -> Action:
        return read_query(content)

    def write(self, thought: str, action: Search | ToolCall | Answer) -> str:
        if isinstance(action, ToolCall):
            raise UserError(
                f"protocol {self.name!r} has tags for search only, not for a call of {action.name}: use "
                "protocol='qwen_tools'"
            )
        if isinstance(action, Answer):
            return f"<think> {thought} </think>\n<answer> {action.text} </answer>"
        return f"<think> {thought} </think>\n<search> {' '.join(action.queries)} </search>"

    def _observation_frame(self) -> tuple[str, str]:
        if others := [name for name in tool_names(self.tools) if name != "search"]:
            raise UserError(
                f"protocol {self.name!r} has tags for search only, not for the environment's tool {others[0]!r}: "
                "use protocol='qwen_tools'"
            )
        if "<|channel|>" in self.template_text:
            self.call_format = HARMONY  # such a model writes its thoughts in a separate channel
        return "\n\n<information>", "</information>\n\n"
