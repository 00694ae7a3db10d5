"""`Protocol`: how a conversation is written and read, for one tokenizer.

A protocol turns text into ids exactly once, when the world speaks; what the policy sampled is decoded to be read and
never encoded again. The text of passages is untrusted: tags and special tokens in it are escaped, so that a passage
can neither answer, call a tool, nor end a turn.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trl_search.common.errors import UserError
from trl_search.protocols.calls import looks_like_a_call
from trl_search.protocols.turn import in_thought, outside_thoughts, read_turn
from trl_search.types import Action, Answer, EndOfTurn, Invalid, Observation, Search

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The schema of the seed's inference script, minus the name of its engine.
SEARCH_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Searches an encyclopedia and returns the passages that fit each query best.",
        "parameters": {
            "type": "object",
            "properties": {
                "query_list": {
                    "type": "array",
                    "items": {"type": "string"},
                    "description": "Fully-formed semantic queries.",
                }
            },
            "required": ["query_list"],
        },
    },
}

MIN_DOCUMENT_TOKENS = 16
_TAGS = "think|tool_call|tool_response|tools|search|information|answer"
_TAG = re.compile(rf"<(?=\s*/?\s*(?:{_TAGS})\b)", re.IGNORECASE)


class Protocol(abc.ABC):
    """Writes prompts and observations for one tokenizer, and reads what the policy wrote.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The policy's own.
        instruction (`str`, *optional*): Put before the question; the protocol's own by default, `""` for none.
        system_prompt (`str`, *optional*): The system message; `None` leaves it to the chat template.
        tools (`Sequence[dict]`, *optional*, defaults to the search tool): JSON schemas shown to the policy.
        chat_template_kwargs (`dict`, *optional*): Passed to `apply_chat_template`, e.g. `{"enable_thinking": False}`.
    """

    name: str
    stop: tuple[str, ...] = ()
    default_instruction: str
    # The tag that a call stands in, and how a policy that writes something else is corrected.
    call_tag: str
    correction: str

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        instruction: str | None = None,
        system_prompt: str | None = None,
        tools: Sequence[dict[str, Any]] = (SEARCH_TOOL,),
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"protocol {self.name!r} needs a tokenizer with an EOS token: set tokenizer.eos_token")
        self.tokenizer = tokenizer
        self.instruction = self.default_instruction if instruction is None else instruction
        self.system_prompt = system_prompt
        self.tools: list[Any] = list(tools)
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        specials = sorted({token for token in tokenizer.all_special_tokens if token.strip()}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, specials)))
        self._newline_ids = self.encode("\n")
        opening, closing = self._observation_frame()
        self._opening_ids, self._closing_ids = self.encode(opening), self.encode(closing)

    # What the policy is shown first

    def messages(self, question: str) -> list[dict[str, str]]:
        """The conversation that asks `question`, as chat messages: the `prompt` column TRL expects."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, {"role": "user", "content": f"{self.instruction}{question}"}]

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """`messages` through the chat template, ready for the policy's first token."""
        return tuple(self.encode(self._render(messages, add_generation_prompt=True)))

    # What the policy wrote

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens with which the policy ends its turn. Every engine is told: a checkpoint may name another EOS."""
        return (int(self.tokenizer.eos_token_id),)

    def read(self, ids: Sequence[int]) -> str:
        """Decodes a turn for reading, without the EOS that ended it."""
        ids = ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
        return self.decode(ids)

    def parse(self, text: str) -> Action:
        """What the policy did in a turn: the first call or answer after its thoughts counts."""
        turn = read_turn(text)
        act = turn.act
        if turn.speaks_for_world:
            return Invalid("only the search tool may write its response")
        if act is None:
            meant = bool(self.tools) and not in_thought(text) and looks_like_a_call(outside_thoughts(text))
            return Invalid(self.correction, near=True) if meant else EndOfTurn()
        if act.tag == "answer":
            return Answer(str(turn.answer))
        if act.tag != self.call_tag:
            return Invalid(self.correction, near=True)
        # One message may hold several calls: the queries of all searches in it go out together.
        calls = [block for block in turn.blocks if block.tag == self.call_tag]
        if not calls[-1].closed:
            return Invalid(f"the call is not closed by </{self.call_tag}>")
        queries: list[str] = []
        for call in calls:
            action = self._read_call(call.content)
            if not isinstance(action, Search):
                return action
            queries.extend(action.queries)
        return Search(tuple(queries))

    @abc.abstractmethod
    def _read_call(self, content: str) -> Action:
        """What the content of one call asks for."""

    @abc.abstractmethod
    def write(self, thought: str, action: Search | Answer) -> str:
        """What a policy that follows the protocol writes: the inverse of `parse`. For scripts and tests."""

    # What the world says back

    def observation_ids(
        self, observation: Observation, *, max_tokens: int, turn_closed: bool
    ) -> tuple[tuple[int, ...], str] | None:
        """Writes an observation in at most `max_tokens` tokens; None if not even its frame fits.

        Documents are cut one by one, in tokens, before they are framed: all get the same limit, and the last ones are
        dropped where that limit would fall under `MIN_DOCUMENT_TOKENS`. The frame and the notice are never cut.

        Args:
            turn_closed (`bool`): Whether the policy sampled the EOS that its turn needs; otherwise it is written here.

        Returns:
            `tuple[tuple[int, ...], str]`: The ids to append, and the text inside the frame.
        """
        opening = self._opening_ids if turn_closed else [*self._turn_end_ids(), *self._opening_ids]
        notice = self.encode(observation.notice)
        room = max_tokens - len(opening) - len(notice) - len(self._closing_ids)
        if room < 0:
            return None
        documents = [self.encode(self.escape(document)) for document in observation.documents]
        newline = self._newline_ids
        limit, kept = fair_limit([len(document) + len(newline) for document in documents], room)
        body = [token for document in documents[:kept] for token in [*document[: limit - len(newline)], *newline]]
        # The last newline separates the documents from the notice; without one, the frame has its own.
        content = [*body, *notice] if notice else body[: -len(newline) or None]
        return (*opening, *content, *self._closing_ids), self.decode(content)

    def escape(self, text: str) -> str:
        """Makes tags and special tokens in untrusted text inert: `</answer>` -> `&lt;/answer>`."""
        text = _TAG.sub("&lt;", text)
        return self._special.sub(
            lambda match: "&lt;" + match[0][1:] if match[0][0] == "<" else match[0][0] + " " + match[0][1:], text
        )

    @abc.abstractmethod
    def _observation_frame(self) -> tuple[str, str]:
        """What stands before and after an observation, from the end of the policy's turn to the start of its next."""

    def _turn_end_ids(self) -> list[int]:
        """What closes a turn that the policy did not close itself."""
        return []

    # Text and ids

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []

    def decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=self.tools or None,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **self.chat_template_kwargs,
        )
        assert isinstance(text, str)
        return text


def fair_limit(lengths: Sequence[int], room: int) -> tuple[int, int]:
    """The largest limit L and number n such that the first n lengths, each cut to L, sum to at most `room`.

    n is all of them unless that would make L smaller than `MIN_DOCUMENT_TOKENS` and cut something.

    Example:
        >>> fair_limit([50, 200, 300], 450)
        (200, 3)
    """
    for kept in range(len(lengths), 0, -1):
        remaining, limit = room, 0
        for i, length in enumerate(sorted(lengths[:kept])):
            limit = remaining // (kept - i)
            if length > limit:
                break
            # One shorter than an equal share leaves the rest of its share to the longer ones.
            remaining -= length
        else:
            return max(lengths[:kept]), kept
        if limit >= MIN_DOCUMENT_TOKENS:
            return limit, kept
    return 0, 0
