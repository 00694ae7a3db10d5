"""The documentation builds as a site: every page is in the navigation, and every link and anchor works."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a warning (a page outside the navigation, a broken link or anchor) fails the build."""
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    folder = tmp_path_factory.mktemp("site")
    # Without --quiet, because hidden warnings are not counted.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def navigation(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry
    return [page for value in values for page in navigation(value)]  # type: ignore[attr-defined]


def test_every_page_is_in_the_navigation_and_in_the_index() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    # BaseLoader, because the file may contain tags of mkdocs.
    nav = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader=yaml.BaseLoader)["nav"]
    assert sorted(navigation(nav)) == sorted(pages)
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    assert [page for page in sorted(pages - {"index.md"}) if f"({page})" not in index] == []


def test_the_site_has_every_page(site: Path) -> None:
    for path in (ROOT / "docs").glob("*.md"):
        assert (site / path.with_suffix(".html").name).is_file()


def test_the_site_loads_nothing_from_other_hosts(site: Path) -> None:
    fetched: list[str] = []

    class Sources(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            values = dict(attrs)
            if tag == "link" and "stylesheet" not in (values.get("rel") or ""):
                return
            fetched.extend(value for key in ("src", "href") if tag in ("script", "img", "link")
                           and (value := values.get(key)))  # fmt: skip

    for page in site.glob("*.html"):
        Sources().feed(page.read_text("utf-8"))
    assert fetched and not [source for source in fetched if source.startswith(("http:", "https:", "//"))]


def test_links_to_files_outside_the_docs_become_plain_text(site: Path) -> None:
    home = (site / "index.html").read_text("utf-8")
    assert "README (<code>README.md</code>)" in home and 'href="../' not in home
