"""Asks a search agent questions and shows it think, search and answer.

    trl-search chat tiny                                              offline session: the shipped policy and its world
    trl-search chat owner/model "How is the weather in Seoul?"        one question; searches the web (ddgs)
    trl-search chat runs/qwen3b                                       a run; searches what it was trained with
    trl-search chat runs/qwen3b --retriever indexes/wiki              searches another index folder
    trl-search chat runs/qwen3b --retriever http://localhost:8000     searches a retrieval server
    trl-search chat runs/qwen3b --json < questions.txt         one question per line in, one JSON object per line out

A run's folder and a model published by `trl-search push` record the agent settings of their training (protocol,
instruction, budgets). Options override them. The agent does not remember earlier questions. In a session, Ctrl-C stops
the answer, Ctrl-D ends the session, and /help lists the commands. The exit status is 1 if a question got no answer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from trl_search.cli.options import (
    SEARCHED,
    add_retriever_options,
    add_sampling_options,
    add_world_options,
    asked_questions,
    sampling_of,
    searched_of,
    tell_of_imports,
)
from trl_search.cli.parser import CommandParser
from trl_search.cli.retriever_checks import retriever_checks
from trl_search.cli.start_checks import refuse
from trl_search.common.errors import UserError

if TYPE_CHECKING:
    from trl_search.chat.session import Chat
    from trl_search.data.world import World
    from trl_search.retrieval import Retriever

WEB_HITS = 5  # passages per query, unless --passages_per_query is given
HELP = """\
  /k N      set the passages per query{k}
  /help     show this list
  /quit     end the session, like Ctrl-D; Ctrl-C stops only the answer
Anything else is a question. The agent does not remember earlier questions."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from trl_search.config.agent import add_agent_options

    parser.add_argument("model", metavar="MODEL", help="a model on the hub, a folder (model or adapter), or 'tiny'")
    parser.add_argument(
        "questions",
        nargs="*",
        default=[],  # without it, argparse lists QUESTION among the missing arguments
        metavar="QUESTION",
        help="a question in quotes (default: read them from stdin, or start a session)",
    )
    searched = parser.add_argument_group("retriever")
    searched.add_argument(
        "--retriever", metavar="WHAT", help=f"{SEARCHED} (default: what the run searched; world for tiny; else web)"
    )
    add_retriever_options(searched)
    searched.add_argument("--world", action="store_true", help="the same as --retriever world")
    add_world_options(searched)
    add_agent_options(parser)
    run = parser.add_argument_group("inference")
    add_sampling_options(run, temperature=0.7)
    run.add_argument(
        "--seed", type=int, help="seed of the first question; each later question adds 1 (default: random)"
    )
    run.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda, if available)")
    run.add_argument("--dtype", help="float32, bfloat16, float16 or auto (default: bfloat16 on a GPU, else float32)")
    run.add_argument("--server", metavar="URL", help="a `vllm serve` that serves MODEL; turns are then not streamed")
    run.add_argument("--served_model", metavar="NAME", help="name of MODEL there (default: the first one it lists)")
    run.add_argument("--json", action="store_true", help="print only one JSON object per question")


def main(argv: list[str]) -> int:
    parser = CommandParser(
        prog="trl-search chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    # `parse_args` cannot read an optional list of questions after the options.
    return run(parser.parse_intermixed_args(argv))


def run(args: argparse.Namespace) -> int:
    from trl_search.chat.interrupts import beside_main
    from trl_search.chat.session import load_chat
    from trl_search.config.agent import asked, trained_settings
    from trl_search.environment.registry import SEARCH, takes_retriever

    sampling = sampling_of(args)
    if args.world and args.retriever not in (None, "world"):
        raise UserError(f"--world and --retriever {args.retriever} exclude each other: give only one of them")
    what = args.retriever or _default_retriever(args)
    if not args.questions and not sys.stdin.isatty():
        lines = sys.stdin.read().removeprefix("\ufeff").split("\n")  # Windows' editors write a byte-order mark
        args.questions = [line.strip() for line in lines if line.strip()]
        if not args.questions:
            raise UserError("there is no question: give one in quotes, or one per line on stdin")
    args.questions = asked_questions(args.questions)
    if what == "web" and args.passages_per_query is None:
        args.passages_per_query = WEB_HITS
    tell_of_imports()
    settings = asked(trained_settings(args.model), vars(args))
    searches = takes_retriever(settings.environment)
    if not searches and (args.retriever or args.world):
        raise UserError(f"the environment {settings.environment} takes no retriever: leave --retriever out")
    if searches and what == "web" and not args.retriever and settings.environment != SEARCH:
        # Its queries may hold private text, so they must not go to the web by default.
        raise UserError(f"no record says what {settings.environment} searches: give --retriever")

    searched = searched_of(args, what) if searches else None
    if searched is not None:
        refuse(retriever_checks(searched))  # later, a server that is not running would fail each search
    if args.server is not None:
        from trl_search.cli.evaluation_checks import check_server

        refuse([check_server(args.server, args.served_model)])
    elif args.served_model is not None:
        raise UserError("--served_model is the name of MODEL on a --server: give its address, too")

    def load() -> tuple[Retriever | None, Chat]:
        retriever = None if searched is None else searched.load()
        where = {"device": args.device, "dtype": args.dtype, "server": args.server, "served_model": args.served_model}
        return retriever, load_chat(args.model, retriever, settings=settings, sampling=sampling, **where)

    # stdout holds only the answers, but DeepSpeed prints to it on import.
    with contextlib.redirect_stdout(sys.stderr):
        retriever, chat = beside_main(load)
    seed = random.getrandbits(32) if args.seed is None else args.seed
    with contextlib.closing(retriever) if retriever else contextlib.nullcontext(), chat:
        if args.questions:
            for question in args.questions:
                chat.check_length(question)
            answered = [_answer(chat, question, args, seed + n) for n, question in enumerate(args.questions)]
            return int(not all(answered))
        _session(chat, args, seed, None if searched is None else searched.world)
    return 0


def _answer(chat: Chat, question: str, args: argparse.Namespace, seed: int) -> bool:
    """Asks one question and prints the reply. Returns whether there was an answer."""
    from rich.console import Console

    from trl_search.chat.terminal import Screen, visible

    if args.json:
        reply = chat.ask(question, seed=seed)
        print(json.dumps(reply.as_json()), flush=True)
        return reply.answer is not None
    console = Console(highlight=False)
    screen = Screen(console)
    if len(args.questions) > 1:
        console.out(f"> {visible(question)}", style="bold")
    try:
        reply = chat.ask(question, screen.show, seed=seed)
    finally:
        screen.end_turn()
    screen.finish(reply)
    if len(args.questions) > 1:
        console.out("")
    return reply.answer is not None


def _session(chat: Chat, args: argparse.Namespace, seed: int, world: World | None) -> None:
    """Answers questions from a terminal until Ctrl-D."""
    from trl_search.environment import SearchEnvironment

    inner = chat.environment.inner
    searched = inner if isinstance(inner, SearchEnvironment) else None
    with contextlib.suppress(ImportError):  # line editing; some Python builds lack it
        import readline  # noqa: F401
    if not args.json:
        print("Ask a question. /help lists the commands.")
        for question in world.questions("test", limit=3) if world else ():
            print(f"  {question.question}")
    for line in _lines("" if args.json else "> "):
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/help":
            print(HELP.format(k=f" (now {searched.passages_per_query})" if searched else ""))
        elif command == "/k":
            if searched is None:
                print("this environment has no search, so /k does nothing", file=sys.stderr)
            elif re.fullmatch("[1-9][0-9]{0,5}", rest.strip()):
                searched.passages_per_query = int(rest)
            else:
                print("write it as /k 5", file=sys.stderr)
        elif command.startswith("/"):
            print(f"unknown command {command}: /help lists the commands", file=sys.stderr)
        else:
            try:
                (asked,) = asked_questions([line])
                _answer(chat, asked, args, seed)
            except KeyboardInterrupt:
                print("(interrupted)", file=sys.stderr)
            except UserError as error:  # a question that is too long, a server that was lost: the next one may do
                print(f"error: {error}", file=sys.stderr)
            seed += 1


def _lines(prompt: str) -> Iterator[str]:
    while True:
        try:
            line = input(prompt).strip()
        except KeyboardInterrupt:  # ends the line, not the session
            print()
            continue
        except EOFError:
            print(file=sys.stderr)
            return
        if line:
            yield line


def _default_retriever(args: argparse.Namespace) -> str:
    """The default retriever: what the run searched; the web only if MODEL is not the folder of a run."""
    from trl_search.config.searched import run_record

    if args.world or args.model == "tiny":
        return "world"
    return "web" if run_record(args.model) is None else str(args.model)
