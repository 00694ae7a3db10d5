"""Shows a chat on a terminal: thoughts, calls, passages and the answer each have a colour.

There are no colours in a pipe or if `NO_COLOR` is set. Text of a model or a search is untrusted, and printed with
`visible`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from trl_search.chat.events import Calling, Corrected, Event, Found, Returned, Said, SearchFailed, Searching
from trl_search.chat.session import Reply
from trl_search.common.visible import visible
from trl_search.types import Passage

MAX_PASSAGE_CHARS = 320

STYLES = {"think": "dim italic", "tool_call": "cyan", "search": "cyan", "answer": "bold green"}
_TAG = re.compile(rf"<(/?)({'|'.join(STYLES)})>")
_TAGS = [f"<{slash}{name}>" for name in STYLES for slash in ("", "/")]
_TAG_BEGUN = re.compile(r"<[^<>]{0,11}$")


class Painter:
    """Styles each piece of a turn by the tags around it. A tag may arrive in several pieces."""

    def __init__(self) -> None:
        self._held, self._style = "", ""

    def feed(self, text: str) -> Iterator[tuple[str, str]]:
        """Yields pieces of text with their styles. An end that may be the start of a tag is held back."""
        text = self._held + text
        begun = _TAG_BEGUN.search(text)
        held = begun[0] if begun and any(tag.startswith(begun[0]) for tag in _TAGS) else ""
        self._held = held
        yield from self._paint(text[: len(text) - len(held)])

    def flush(self) -> Iterator[tuple[str, str]]:
        """Ends a turn: yields the text held back, and resets the style."""
        yield from self._paint(self._held)
        self._held, self._style = "", ""

    def _paint(self, text: str) -> Iterator[tuple[str, str]]:
        at = 0
        for match in _TAG.finditer(text):
            yield text[at : match.start()], self._style
            self._style = STYLES[match[2]]
            yield match[0], self._style
            self._style = "" if match[1] else self._style
            at = match.end()
        yield text[at:], self._style


class Screen:
    """Shows the events of a chat on a console."""

    def __init__(self, console: Console) -> None:
        self._console, self._painter = console, Painter()
        self._at_line_start = True

    def show(self, event: Event) -> None:
        """A listener of [`Chat.ask`]."""
        if isinstance(event, Said):
            self._write(self._painter.feed(event.text))
            return
        self.end_turn()
        if isinstance(event, Searching):
            self._line("searching: " + " | ".join(map(visible, event.queries)), "cyan")
        elif isinstance(event, Found):
            for rank, passage in enumerate(event.passages, start=1):
                self._passage(rank, passage)
            self._line(event.notice, "yellow")
        elif isinstance(event, SearchFailed):
            self._line(f"the search failed: {visible(event.error)}", "bold red")
        elif isinstance(event, Calling):
            given = ", ".join(f"{name}={value!r}" for name, value in event.arguments.items())
            self._line(visible(f"calling: {event.name}({given})"), "cyan")
        elif isinstance(event, Returned):
            for document in event.documents:
                self._block(visible(" ".join(document.split())[:MAX_PASSAGE_CHARS]), 2, "bright_black")
            self._line(visible(event.notice), "yellow")
        elif isinstance(event, Corrected):
            self._line(visible(event.notice), "yellow")

    def end_turn(self) -> None:
        """Ends the line that the model is writing, if any."""
        self._write(self._painter.flush())
        if not self._at_line_start:
            self._write([("\n", "")])

    def finish(self, reply: Reply) -> None:
        """Prints the last lines: the outcome of the question."""
        self.end_turn()
        if reply.answer is None:
            self._line(f"no answer (stopped by {reply.stop_reason.value})", "bold red")
        if reply.error:
            self._line(visible(f"the environment failed: {reply.error}"), "bold red")
        others = reply.calls - reply.searches
        counts = [f"{others} call{'' if others == 1 else 's'}"] if others else []
        if reply.searches or not others:
            counts.insert(0, f"{reply.searches} search{'' if reply.searches == 1 else 'es'}")
        said = ", ".join([*counts, f"{reply.model_tokens} tokens", f"{reply.seconds:.1f} s", f"seed {reply.seed}"])
        self._line(f"[{said}]", "dim")
        if reply.failed_searches:
            self._line(
                f"{len(reply.failed_searches)} of {reply.searches} searches failed: the answer may be a guess",
                "bold red",
            )

    def _write(self, pieces: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> None:
        for text, style in pieces:
            if text:
                self._console.out(visible(text), style=style or None, end="", highlight=False)
                self._at_line_start = text.endswith("\n")

    def _line(self, text: str, style: str) -> None:
        if text:
            self._console.out(text, style=style, highlight=False)

    def _passage(self, rank: int, passage: Passage) -> None:
        where = passage.url or f"id {passage.id}"
        head = f"{rank}. {' '.join(passage.title.split()) or '(no title)'}  [{where}, score {passage.score:.2f}]"
        text = " ".join(passage.text.split())
        text = text if len(text) <= MAX_PASSAGE_CHARS else text[:MAX_PASSAGE_CHARS] + " …"
        self._block(visible(head), 2, "blue")
        self._block(visible(text), 5, "bright_black")

    def _block(self, text: str, indent: int, style: str) -> None:
        """Prints lines that fit the console, which knows the width of each character."""
        for line in Text(text).wrap(self._console, max(20, self._console.width - indent)):
            self._line(" " * indent + line.plain.rstrip(), style)
