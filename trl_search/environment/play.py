"""`play`: runs one trajectory of an environment by hand, without a model or a trainer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, get_args

from trl_search.common.errors import UserError
from trl_search.common.event_loop import run_sync
from trl_search.environment.base import Environment, check_environment, start_episode, take_step
from trl_search.environment.script import Script, check_script, check_script_turn, check_tool, reply_of, start_script
from trl_search.protocols import load_protocol
from trl_search.types import Action, Observation


def play(
    environment: Environment,
    turns: Iterable[Action | str] | Script,
    row: Mapping[str, Any] | None = None,
    *,
    protocol: str = "qwen_tools",
) -> list[Observation]:
    """Plays one trajectory by hand: passes each turn to the environment and returns the observations.

    Args:
        environment ([`Environment`]): An instance.
        turns (`Iterable` or `Callable`): The turns of a policy, in order: actions (`Search`, `ToolCall`, `Answer`,
            ...), or the text that a policy would write, which the protocol parses. Turns after the end of the
            trajectory are not played. Or a script (`environment/script.py`), which is started with the row and sent
            each reply.
        row (`Mapping`, *optional*): The dataset row of the trajectory.
        protocol (`str`, *optional*, defaults to `"qwen_tools"`): The protocol that parses the texts.

    Returns:
        `list[Observation]`: One per turn that was played. The last one has `done` set if the trajectory ended.

    Raises:
        UserError: if the environment or a turn is invalid, or a turn calls a tool that the environment does not have.
        Exception: any exception of the environment, with its traceback.

    Example:
        >>> play(Calculator(), [ToolCall("add", {"a": 1, "b": 2}), Answer("3")])
        [Observation(documents=('3',), ...), Observation(..., done=<StopReason.ANSWER: 'answer'>)]
        >>> play(SearchEnvironment(retriever), ["<search> author of Dracula </search>"], protocol="search_r1")
        [Observation(documents=('Doc 1(Title: "Dracula") ...',), ...)]
        >>> play(Library("my_index"), open_page, row={"question": "Who wrote Dracula?"})
        [Observation(documents=('Dracula is a novel by Bram Stoker',), ...), Observation(..., done=...)]
    """
    environment, row = check_environment(environment), row or {}
    if callable(turns):
        check_script(turns)
    elif isinstance(turns, str) or not isinstance(turns, Iterable):
        raise UserError(f"turns must be a list of actions or texts, or a script, not {turns!r:.60}")
    read = _reader(environment, protocol, scripted=callable(turns))

    async def played() -> list[Observation]:
        observations: list[Observation] = []
        await environment.open()
        try:
            episode = start_episode(environment, row)
            player = start_script(turns, row) if callable(turns) else _one_by_one(turns)
            reply: str | None = None
            while True:
                try:
                    turn = player.send(reply)
                except StopIteration:
                    break
                observations.append(await take_step(episode, read(turn)))
                if observations[-1].done is not None:
                    break
                reply = reply_of(observations[-1])
        finally:
            await environment.close()
        return observations

    return run_sync(played())


def _one_by_one(turns: Iterable[Any]) -> Generator[Any, Any, None]:
    yield from (turn for turn in turns)  # a generator accepts `send`; the replies are dropped


def _reader(environment: Environment, protocol: str, *, scripted: bool) -> Callable[[Any], Action]:
    def read(turn: Any) -> Action:
        said = _said(turn, environment, scripted=scripted)
        if not isinstance(said, str):
            return said
        from trl_search.policies.loading import load_tokenizer
        from trl_search.policies.tiny import tiny_policy_path

        tokenizer = load_tokenizer(tiny_policy_path())
        return load_protocol(protocol, tokenizer, tools=environment.tools).parse(said)

    return read


def _said(turn: Any, environment: Environment, *, scripted: bool) -> Action | str:
    """Returns the text or the action of a turn. Turns of a script, and pairs of thought and action, are checked."""
    if scripted or isinstance(turn, tuple):
        checked = check_script_turn(turn, environment)
        return checked if isinstance(checked, str) else checked[1]
    if isinstance(turn, str):
        return turn
    if not isinstance(turn, get_args(Action)):
        raise UserError(f"a turn must be an action, such as Search(('query',)), or a text, not {turn!r:.80}")
    check_tool(turn, environment)
    return turn
