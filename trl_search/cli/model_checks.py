"""Checks which protocols are exact for a model's tokenizer (`trl-search doctor MODEL`), without GPU and weights."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import try_to_load_from_cache

from trl_search.cli.preflight import Check, Status
from trl_search.common.errors import UserError
from trl_search.policies.loading import check_vocabulary, load_tokenizer
from trl_search.policies.tiny import tiny_policy_path
from trl_search.protocols import Protocol, load_protocol, protocol_names
from trl_search.types import Answer, Observation, Search

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUERY = Search(("who wrote Quiet Raven?",))
_ANSWER = Answer("Mira Talvane")


def model_checks(name: str) -> list[Check]:
    """One line per protocol, and one for the control tokens.

    Raises:
        UserError: if there is no such tokenizer, or it belongs to another model.
    """
    path = tiny_policy_path() if name == "tiny" else name
    tokenizer = load_tokenizer(path)
    check_vocabulary(path, tokenizer)
    checks = [check_protocol(protocol, tokenizer) for protocol in protocol_names()]
    return [*checks, check_control(tokenizer)]


def check_protocol(name: str, tokenizer: PreTrainedTokenizerBase) -> Check:
    """Writes a call and an answer with the protocol and checks that both are parsed back unchanged."""
    try:
        protocol = load_protocol(name, tokenizer)
    except ValueError as error:
        problem, _, remedy = str(error).rpartition(": ")
        return Check(name, Status.NOTE, problem or str(error), remedy)
    prompt = protocol.prompt_ids(protocol.messages("Who?"))
    for action in (_QUERY, _ANSWER):
        read = protocol.parse(protocol.read_turn(protocol.encode(protocol.write("hm", action)), context=prompt))
        if read != action:
            return Check(name, Status.PROBLEM, f"{action} is parsed back as {read}", "choose another protocol")
    return Check(name, Status.OK, "; ".join(_facts(protocol, prompt)))


def check_template(model: str, protocol: str, eos_token: str | None = None) -> Check:
    """Whether the tokenizer fits the model, and the protocol parses back what it writes with the chat template.
    Downloads nothing."""
    path = tiny_policy_path() if model == "tiny" else model
    if not Path(path).is_dir() and not isinstance(try_to_load_from_cache(path, "tokenizer_config.json"), str):
        return Check("template", Status.NOTE, "checked once the tokenizer is downloaded")
    try:
        tokenizer = load_tokenizer(path, eos_token=eos_token)
        check_vocabulary(path, tokenizer)
        found = check_protocol(protocol, tokenizer)
    except UserError as error:
        return Check("template", Status.PROBLEM, str(error))
    status = Status.OK if found.status is Status.OK else Status.PROBLEM
    return Check("template", status, f"{protocol}: {found.said}", found.remedy)


def check_control(tokenizer: PreTrainedTokenizerBase) -> Check:
    """Whether a passage can smuggle in a control token: writes each of them into one and encodes it."""
    protocol = _usable_protocol(tokenizer)
    if protocol is None:
        said = "not checked, because no protocol can be used"
        return Check("control tokens", Status.PROBLEM, said, "choose another model, or another chat template")
    control = protocol.control.ids
    text = " ".join(str(tokenizer.convert_ids_to_tokens(index)) for index in sorted(control))
    room = 64 * (len(control) + 1)
    frame, passage = (
        protocol.observation_ids(Observation(documents=documents), max_tokens=room, turn_closed=True)
        for documents in ((), (text,))
    )
    held = [sum(index in control for index in written[0]) for written in (frame, passage) if written is not None]
    if len(held) < 2 or held[0] != held[1] or not control.isdisjoint(protocol.encode(protocol.escape(text))):
        said = "a passage can produce control tokens"
        return Check("control tokens", Status.PROBLEM, said, "choose another model, and report this tokenizer")
    return Check("control tokens", Status.OK, f"{len(control)}; a passage can produce none of them")


def _usable_protocol(tokenizer: PreTrainedTokenizerBase) -> Protocol | None:
    for name in protocol_names():
        with contextlib.suppress(ValueError):
            return load_protocol(name, tokenizer)
    return None


def _facts(protocol: Protocol, prompt: tuple[int, ...]) -> list[str]:
    form = protocol.call_format.name if protocol.call_format is not None else "plain tags"
    ends = ", ".join(str(protocol.tokenizer.convert_ids_to_tokens(index)) for index in protocol.stop_token_ids)
    facts = [f"calls: {form}, parsed back exactly", f"a turn ends with {ends}"]
    return [*facts, "the prompt opens a thought"] if protocol.opened_thought(prompt) else facts
