"""`Protocol`: writes and reads a conversation, for one tokenizer.

Sampled ids are decoded for reading and never encoded again; only prompts and replies of the environment are encoded.
Text from the environment is untrusted: its tags are escaped, and its ids are checked for control tokens, so that a
passage cannot answer, call a tool, or end a turn.
"""

from __future__ import annotations

import abc
import functools
import re
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trl_search.common.errors import UserError
from trl_search.protocols.anchor import find_anchor
from trl_search.protocols.call_formats import HARMONY, LLAMA, CallFormat
from trl_search.protocols.calls import looks_like_a_call
from trl_search.protocols.control_tokens import ControlTokens
from trl_search.protocols.fair_limit import fair_limit
from trl_search.protocols.instructions import instruction_for, tool_names
from trl_search.protocols.prompt_check import check_options, check_prompt
from trl_search.protocols.prompt_date import with_fixed_date
from trl_search.protocols.search_tool import SEARCH_TOOL
from trl_search.protocols.thoughts import opened_thought, thought_markers, with_think_tags
from trl_search.protocols.turn import in_thought, outside_thoughts, read_turn
from trl_search.types import Action, Answer, EndOfTurn, Invalid, Observation, Search, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Llama 3.1 may end a call with it instead of `<|eot_id|>`, because its template says `Environment: ipython`.
_LLAMA_CALL_END = "<|eom_id|>"
# How many ids before a turn are read to see whether the prompt opened a thought.
_CONTEXT = 16
_ANSWER = "TRLSEARCHANSWER"
_TAGS = "think|tool_call|tool_response|tools|search|information|answer"
# Before tokenization, documents are cut to this many characters per available token, because some are whole books.
_CHARS_PER_TOKEN = 32


class Protocol(abc.ABC):
    """Writes prompts and observations for one tokenizer, and parses the policy's turns.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer of the policy.
        instruction (`str`, *optional*): Text before the question; `""` for none. By default the protocol's own if
            search is the only tool, else one that names the tools.
        system_prompt (`str`, *optional*): The system message; `None` leaves it to the chat template.
        tools (`Sequence[dict]`, *optional*, defaults to the search tool): JSON schemas shown to the policy.
        chat_template_kwargs (`dict`, *optional*): Passed to `apply_chat_template`, e.g. `{"enable_thinking": False}`.

    Raises:
        UserError: if `tokenizer` is not a tokenizer or has no EOS token, or `instruction` is not a string.
    """

    name: str
    stop: tuple[str, ...] = ()
    default_instruction: str
    # The tag of a call, and the correction for a policy that writes something else.
    call_tag: str
    correction: str
    # Tags of a subclass, each with the built-in tag that it is read as: {"lookup": "search"}.
    own_tags: Mapping[str, str] = {}
    # Whether the chat template shows the tools to the policy.
    shows_tools = True
    # The format of the chat template's calls; `None` if the policy writes plain tags.
    call_format: CallFormat | None = None

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        instruction: str | None = None,
        system_prompt: str | None = None,
        tools: Sequence[dict[str, Any]] = (SEARCH_TOOL,),
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not hasattr(tokenizer, "eos_token_id") or not hasattr(tokenizer, "encode"):
            raise UserError(
                f"a protocol needs a tokenizer, such as AutoTokenizer.from_pretrained(...); got {tokenizer!r:.60}"
            )
        if instruction is not None and not isinstance(instruction, str):
            raise UserError(f"the instruction must be a string; got {instruction!r:.60}")
        if tokenizer.eos_token_id is None:
            raise UserError(f"protocol {self.name!r} needs a tokenizer with an EOS token: set tokenizer.eos_token")
        self.tokenizer = tokenizer
        names = tool_names(tools)
        if instruction is None:
            instruction = self.default_instruction if names == ["search"] else instruction_for(names)
        self.instruction = instruction
        self.system_prompt = system_prompt
        self.tools: list[Any] = list(tools)
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._tag = re.compile(rf"<(?=\s{{0,9}}/?\s{{0,9}}(?:{'|'.join([_TAGS, *self.own_tags])})\b)", re.IGNORECASE)
        template = tokenizer.chat_template  # or several, by name: "default", "tool_use"
        self.template_text = "\n".join(template.values()) if isinstance(template, dict) else template or ""
        check_options(self.chat_template_kwargs, self.template_text)
        self._shown_tools = (self.tools or None) if self.shows_tools else None
        self._think_markers = thought_markers(self.template_text)
        self._anchor = find_anchor(tokenizer)
        self._tokenizing = threading.RLock()  # fast tokenizers are not thread-safe
        if self.template_text:  # first, because no protocol works with a template that fails here
            check_prompt(self.render_messages, self._asking("TRLSEARCHQUESTION"))
        self._frame = self._observation_frame()
        opening, closing = self._frame
        self.control = ControlTokens(tokenizer, self.encode, (opening, closing, self._turn_frame()))
        self.opening_ids, self.closing_ids = self.encode(opening), self.encode(closing)
        self._newline_ids = self.encode(self.quote("\n"))
        self.answer_end_id = self._find_answer_end()
        self.stop_token_ids = self._find_stop_tokens()

    # The prompt

    def messages(self, question: str) -> list[dict[str, str]]:
        """The conversation that asks `question`, as chat messages: the `prompt` column TRL expects.

        The question is untrusted: control tokens in it are neutralized, so that it cannot end its own message.
        """
        with self._tokenizing:
            return self._asking(self.control.escape(question))

    def _asking(self, question: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, {"role": "user", "content": f"{self.instruction}{question}"}]

    def conversation(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The conversation that asks a dataset row: its own `prompt` if it has one, else its `question`."""
        prompt = row.get("prompt")
        if prompt and not isinstance(prompt, str):
            return list(prompt)
        return self.messages(prompt or row["question"])

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """The ids of `messages` in the chat template, up to the policy's first token."""
        return tuple(self._encode_start(self.render_messages(messages, add_generation_prompt=True)))

    # The policy's turns

    def read(self, ids: Sequence[int]) -> str:
        """Decodes a sampled turn, without the token that ended it."""
        ids = ids[:-1] if ids and ids[-1] in self.stop_token_ids else ids
        return self.decode(ids)

    def read_turn(self, ids: Sequence[int], *, context: Sequence[int] = ()) -> str:
        """Decodes a turn into the common form: thoughts in `<think>`, calls in `<tool_call>`, for every model family.
        If the prompt opened a thought, its tag is put at the start.

        Args:
            context (`Sequence[int]`): The ids before the turn; the last few are enough.
        """
        text = with_think_tags(self.opened_thought(context) + self.read(ids), self._think_markers)
        text = self._with_common_tags(text)
        return text if self.call_format is None else self.call_format.canonical(text)

    def opened_thought(self, context: Sequence[int]) -> str:
        """The end of a prompt if it opens a thought, such as `"<think>\\n"`, else `""`."""
        return opened_thought(self.decode(context[-_CONTEXT:])) if context else ""

    def parse(self, text: str) -> Action:
        """The action of a turn: its first call or answer outside the thoughts; of several answers, the last."""
        text = self._with_common_tags(text)
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
        # A turn may hold several calls: the queries of all its searches are searched together.
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

    def _with_common_tags(self, text: str) -> str:
        for own, common in self.own_tags.items():
            text = text.replace(f"<{own}>", f"<{common}>").replace(f"</{own}>", f"</{common}>")
        return text

    @abc.abstractmethod
    def _read_call(self, content: str) -> Action:
        """The action in the content of one call."""

    @abc.abstractmethod
    def write(self, thought: str, action: Search | ToolCall | Answer) -> str:
        """The text of a turn that follows the protocol: the inverse of `parse`. For scripts and tests.

        Args:
            thought (`str`): Plain text, which gets the protocol's tags for thoughts.
        """

    # The environment's replies

    def observation_ids(
        self, observation: Observation, *, max_tokens: int, turn_closed: bool, turn_ids: Sequence[int] = ()
    ) -> tuple[tuple[int, ...], str] | None:
        """Writes an observation in at most `max_tokens` tokens; returns None if not even its frame fits.

        Every document gets the same limit in tokens. If that would be below `MIN_DOCUMENT_TOKENS`, the last documents
        are dropped. The frame and the notice are never cut.

        Args:
            turn_closed (`bool`): Whether the policy sampled the token that ends its turn; otherwise it is added here.
            turn_ids (`Sequence[int]`, *optional*): The policy's turn, because some templates repeat its call's id.

        Returns:
            `tuple[tuple[int, ...], str]`: The ids to append, and the text inside the frame.
        """
        with self._tokenizing:
            opening, closing = self._frame_ids(turn_ids)
            opening = opening if turn_closed else [*self._turn_end_ids(), *opening]
            notice = self.control.encode(self.quote(observation.notice))
            room = max_tokens - len(opening) - len(notice) - len(closing)
            if room < 0:
                return None
            documents = [self._document_ids(document, room) for document in observation.documents]
            newline = self._newline_ids
            # Every document ends in a newline, except the last if no notice follows.
            room += 0 if notice else len(newline)
            limit, kept = fair_limit([len(document) + len(newline) for document in documents], room)
            body = [token for document in documents[:kept] for token in [*document[: limit - len(newline)], *newline]]
            content = [*body, *notice] if notice else body[: -len(newline) or None]
            return (*opening, *content, *closing), self.decode(content)

    def read_observation(self, ids: Sequence[int], turn_ids: Sequence[int]) -> str:
        """The text inside the frame of an observation after a turn, as `observation_ids` returned it."""
        opening, closing = self._frame_ids(turn_ids)
        if turn_ids[-1:] != (self.turn_end_id,):
            opening = [*self._turn_end_ids(), *opening]
        return self.decode(ids[len(opening) : len(ids) - len(closing)])

    def escape(self, text: str) -> str:
        """Neutralizes tags and control tokens in untrusted text: `</answer>` becomes `&lt;/answer>`.

        The result encodes to no control token, so it is safe in a message (a one-shot RAG prompt).
        """
        with self._tokenizing:
            return self.control.escape(self._tag.sub("&lt;", text))

    def _document_ids(self, document: str, room: int) -> list[int]:
        document = document[: _CHARS_PER_TOKEN * (room + 1)]
        return self.control.encode(self.quote(self._tag.sub("&lt;", document)))

    def quote(self, text: str) -> str:
        """The text, escaped for the frame if necessary."""
        return text

    @abc.abstractmethod
    def _observation_frame(self) -> tuple[str, str]:
        """The text before and after an observation, from the end of the policy's turn to the start of its next."""

    def _frame_ids(self, turn_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """The ids before and after the reply to a turn."""
        return self.opening_ids, self.closing_ids

    def _turn_end_ids(self) -> list[int]:
        """The ids that close a turn which the policy did not close."""
        return []

    @property
    def turn_end_id(self) -> int:
        """The token that ends a turn before the environment replies."""
        return int(self.tokenizer.eos_token_id)

    def _find_answer_end(self) -> int:
        """The token with which the template ends an answer: the EOS, or another one in some families."""
        _, _, after = self._turn_frame().partition(_ANSWER)
        following = self.encode(after.lstrip())[:1]
        # In gpt-oss, an earlier answer is a message of the history, which ends with another token than the turn.
        if self.call_format is HARMONY or self.control.ids.isdisjoint(following):
            return int(self.tokenizer.eos_token_id)
        return following[0]

    def _find_stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end a turn. Every engine gets them, because a checkpoint may name another EOS."""
        ends = dict.fromkeys((int(self.tokenizer.eos_token_id), self.turn_end_id, self.answer_end_id))
        if self.call_format is LLAMA and _LLAMA_CALL_END in (vocabulary := self.tokenizer.get_vocab()):
            ends[vocabulary[_LLAMA_CALL_END]] = None
        return tuple(ends)

    def _turn_frame(self) -> str:
        """A conversation that continues after an answer, in the chat template; `""` if there is no template."""
        if not self.template_text:
            return ""
        roles = {"user": "x", "assistant": _ANSWER}
        messages = [{"role": role, "content": content} for role, content in (*roles.items(), ("user", "x"))]
        try:
            return self.render_messages(messages, add_generation_prompt=False)
        except Exception as error:  # a template may raise anything
            raise UserError(
                f"the chat template fails on a conversation of question, answer and question ({error}), so it does "
                "not show which token ends a turn: set tokenizer.chat_template"
            ) from error

    # Text and ids

    def encode(self, text: str) -> list[int]:
        """The ids of text in the middle of a conversation, without BOS and without an extra leading space."""
        if not text:
            return []
        ids = self.tokenizer.encode(self._anchor + text, add_special_tokens=False)
        return ids[len(self.tokenizer.encode(self._anchor, add_special_tokens=False)) :] if self._anchor else ids

    def _encode_start(self, text: str) -> list[int]:
        """The ids of a whole conversation that the chat template has rendered."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    @functools.cached_property
    def _dated_template(self) -> str:
        return with_fixed_date(self.tokenizer.get_chat_template(tools=self._shown_tools))

    def render_messages(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            [
                _without_nulls(message) | {key: message[key] for key in message if key == "content"}
                for message in messages
            ],
            tools=self._shown_tools,
            chat_template=self._dated_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **self.chat_template_kwargs,
        )
        assert isinstance(text, str)
        return text


def _without_nulls(value: Any) -> Any:
    """The value without keys that have `None`. Arrow, and so a dataset, gives each message, call and set of arguments
    the keys of all others, which a template would write: `{"query_list": ["x"], "unit": null}`."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(held) for key, held in value.items() if held is not None}
    return [_without_nulls(held) for held in value] if isinstance(value, list) else value
