"""Runs a user's script as a policy: its turns are played in the environment as if a model had sampled them.

    script     "I open the page.", ToolCall("open", {"title": "Golden Raven"})
    recorded   <think> I open the page. </think>
               <tool_call>
               {"name": "open", "arguments": {"title": "Golden Raven"}}
               </tool_call>

`environment/script.py` defines scripts. A script is sent each reply as the policy sees it: truncated, with tags
escaped. If it takes its answer from the reply, it never teaches a policy to state what it has not read.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import traceback
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Unpack

from trl_search.common.errors import UserError
from trl_search.data.scripted_players import as_sampled
from trl_search.environment import Environment
from trl_search.environment.script import check_script_turn, load_script, start_script
from trl_search.policies.base import Policy, Turn
from trl_search.protocols import Protocol
from trl_search.types import Answer, Completion, EndOfTurn, FinishReason


class UserScript:
    """A script from an import path, for the tools of an environment. `for_row` is the policy that plays one row."""

    def __init__(self, path: str, environment: Environment, protocol: Protocol) -> None:
        self.path, self.environment, self.protocol = path, environment, protocol
        self.script = load_script(path)

    def for_row(self, row: Mapping[str, Any], seed: int) -> Policy:
        return _Player(self, row)

    def described(self) -> dict[str, str]:
        """Identifies the script in the settings of a collection, with a hash of its text to detect changes."""
        try:
            text = inspect.getsource(self.script)
        except (OSError, TypeError):  # not a function from a file
            text = ""
        return {"script": self.path, "script_hash": hashlib.sha256(text.encode()).hexdigest()[:16]}


class _Player(Policy):
    def __init__(self, owner: UserScript, row: Mapping[str, Any]) -> None:
        self._owner, self._row = owner, row
        self._turns: Generator[Any, str | None, None] | None = None
        self._before = 0  # tokens of the conversation when the last turn began
        self._said: tuple[int, ...] = ()

    async def generate(self, prompt_ids: Sequence[int], **asked: Unpack[Turn]) -> Completion:
        protocol, max_tokens = self._owner.protocol, asked["max_tokens"]
        reply = None
        if self._turns is not None:
            reply = protocol.read_observation(prompt_ids[self._before + len(self._said) :], self._said)
        # On a thread: a script may call a slow service, and other trajectories must not wait for it.
        turn = await asyncio.to_thread(self._next, reply)
        if isinstance(turn, str):
            text, ends = turn, isinstance(protocol.parse(turn), Answer | EndOfTurn)
        else:
            text, ends = protocol.write(*turn), isinstance(turn[1], Answer)
        said = as_sampled(text, protocol, prompt_ids, ends=ends, stop=asked.get("stop", ()))
        if len(said.ids) > max_tokens:  # truncated like a model's turn
            said = Completion(said.ids[:max_tokens], said.logprobs[:max_tokens], FinishReason.LENGTH)
        self._before, self._said = len(prompt_ids), said.ids
        return said

    def _next(self, reply: str | None) -> Any:
        """The script's next turn; an empty one if it has given up."""
        try:
            if self._turns is None:
                self._turns = start_script(self._owner.script, self._row)
            turn = self._turns.send(reply)
        except StopIteration:
            return ""
        except UserError:
            raise
        except Exception as error:  # the user's code
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"script {self._owner.path} failed at the question {str(self._row.get('question'))!r:.80}: "
                f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno}). Debug it with "
                "trl_search.play(environment, script, row)"
            ) from error
        return check_script_turn(turn, self._owner.environment)
