"""A report in the system's Chromium, from a file, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Options of a browser that makes no requests of its own.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZES = {"desk": (1680, 1000), "laptop": (1180, 760), "phone": (390, 844)}


class Page:
    """A report in the browser, with its console messages and its requests."""

    def __init__(
        self, browser: Any, file: Path, *, tab: str = "trajectories", scheme: str = "light", size: str = "desk"
    ) -> None:
        width, height = SIZES[size]
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(120_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = file.resolve().as_uri()
        self.page.goto(f"{self.url}#{tab}")
        self.page.wait_for_selector("html[data-ready]")

    def close(self) -> None:
        self.context.close()
        assert self.complaints == []
        assert [url for url in self.requests if url.partition("#")[0] != self.url] == []

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def found(self, text: str) -> None:
        """Waits until the list shows this number."""
        self.page.wait_for_function("text => document.querySelector('.found').textContent === text", arg=text)

    def detail(self, question: str) -> None:
        self.page.wait_for_function("text => document.querySelector('.detail h2')?.textContent === text", arg=question)

    def listed(self, what: str) -> list[str]:
        return self.page.locator(f".row {what}").all_inner_texts()

    def style(self, selector: str, name: str) -> str:
        return self.page.eval_on_selector(selector, "(at, name) => getComputedStyle(at)[name]", name)

    def contrast(self) -> float:
        """The lowest WCAG contrast between text and background over tokens, tags and the list."""
        return self.page.evaluate(
            """() => {
              const light = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
                .map(v => (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4))
                .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
              const behind = at => { const own = getComputedStyle(at).backgroundColor;
                return own === 'rgba(0, 0, 0, 0)' && at.parentElement ? behind(at.parentElement) : own; };
              const ratios = [...document.querySelectorAll(
                '.t, .tag, .row span, .numbers dt, .where span, .turn span, .hint, #subtitle, .count span, '
                + '.legend span, .fact *, .compared td, .alarms *, .note, .fork, .shared, .column *')]
                .map(at => [light(getComputedStyle(at).color), light(behind(at))]).map(([a, b]) =>
                  (Math.max(a, b) + .05) / (Math.min(a, b) + .05));
              return Math.min(...ratios);
            }"""
        )
