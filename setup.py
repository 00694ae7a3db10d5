"""What pyproject.toml cannot say: the packages, all of them, and a long description whose links work on PyPI."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def for_pypi(readme: str, repository: str | None) -> str:
    """The README with links to files made absolute; without a repository in [project.urls] they become plain text.

    Example:
        >>> for_pypi("[results](docs/results.md)", "https://github.com/me/trl-search")
        '[results](https://github.com/me/trl-search/blob/main/docs/results.md)'
    """

    def link(found: re.Match[str]) -> str:
        image, text, path = found.groups()
        if repository is None:
            return "" if image else text
        return f"{image}[{text}]({repository}/{'raw' if image else 'blob'}/main/{path})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)]+)\)", link, readme)


if __name__ == "__main__":
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(
        # recipes/ lies at the top, where people look; it is the subpackage trl_search.recipes once installed.
        packages=[*find_packages(include=["trl_search", "trl_search.*"]), "trl_search.recipes"],
        package_dir={"trl_search.recipes": "recipes"},
        long_description=for_pypi(readme, urls.get("Repository")),
        long_description_content_type="text/markdown",
    )
