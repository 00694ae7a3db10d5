"""Search-R1's protocol: plain-text tags, for base models and for tokenizers without tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl_search.protocols.base import Protocol
from trl_search.protocols.calls import read_query
from trl_search.types import Action, Answer, Search


class SearchR1(Protocol):
    """Search-R1's tags (arXiv:2503.09516), for base models: no tools, no chat template needed."""

    name = "search_r1"
    stop = ("</search>", "</answer>")
    call_tag = "search"
    correction = "write the query in plain words between the search tags"
    default_instruction = (
        "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get "
        "new information. After reasoning, if you find you lack some knowledge, you can call a search engine by "
        "<search> query </search> and it will return the top searched results between <information> and "
        "</information>. You can search as many times as you want. If you find no further external knowledge needed, "
        "you can directly provide the answer inside <answer> and </answer>, without detailed illustrations. For "
        "example, <answer> Beijing </answer>. Question: "
    )

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        if self.tokenizer.chat_template:
            return super().prompt_ids(messages)
        return tuple(self.encode("\n".join(str(message["content"]) for message in messages) + "\n"))

    def _render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        # The tags are explained in the instruction; tools in the prompt would teach a second way to call.
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **self.chat_template_kwargs,
        )
        assert isinstance(text, str)
        return text

    def _read_call(self, content: str) -> Action:
        return read_query(content)

    def write(self, thought: str, action: Search | Answer) -> str:
        if isinstance(action, Answer):
            return f"<think> {thought} </think>\n<answer> {action.text} </answer>"
        return f"<think> {thought} </think>\n<search> {' '.join(action.queries)} </search>"

    def _observation_frame(self) -> tuple[str, str]:
        return "\n\n<information>", "</information>\n\n"
