"""The documentation is correct: its code runs, its links work, its tables agree with the code."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import re
import shlex
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from trl import GRPOConfig

import trl_search
from trl_search.cli.main import main
from trl_search.config.agent import AgentSettings
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.config.task import TaskArguments
from trl_search.records.trajectory_metrics import trajectory_metrics
from trl_search.rewards import BUILT_IN
from trl_search.types import StopReason, Trajectory

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"
BLOCK = re.compile(r"^(<!-- runnable -->\n+)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(path: Path, language: str, *, marked: bool = False) -> list[tuple[int, str]]:
    """Line and text of the code blocks in that language; with `marked`, only those after `<!-- runnable -->`."""
    text = path.read_text("utf-8")
    return [
        (text.count("\n", 0, match.start(3)) + 1, match[3])
        for match in BLOCK.finditer(text)
        if match[2] == language and (match[1] or not marked)
    ]


def run(path: Path, code: list[tuple[int, str]]) -> None:
    """Runs blocks in order as one program; a block that begins with a path is written to that file."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, block in code:
        named = re.match(r"# ([\w/]+\.py)\n", block)
        if named:
            Path(named[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(named[1]).write_text(block, "utf-8")
            importlib.invalidate_caches()
        else:
            exec(compile("\n" * (line - 1) + block, str(path), "exec"), namespace)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty working folder that can be imported from; its modules are removed afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("my_package", "my_agent", "my_script")]:
        del sys.modules[name]


def test_extending_runs_from_top_to_bottom(folder: Path) -> None:
    from trl_search.protocols import PROTOCOLS

    page = ROOT / "docs" / "extending.md"
    # The metadata that pip would write for the package whose pyproject.toml the page shows.
    points = [re.sub(r'"(.*)"', r"\1", block.split("\n", 1)[1]) for _, block in blocks(page, "toml")]
    points = [re.sub(r"\[project\.entry-points\.(.*)\]", r"[\1]", point) for point in points]
    info = folder / "my_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1\n")
    (info / "entry_points.txt").write_text("\n".join(points))
    try:
        run(page, blocks(page, "python"))
    finally:
        PROTOCOLS.pop("lookup", None)


@pytest.mark.slow
def test_an_agent_of_your_own_runs_from_top_to_bottom(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every block: files, Python, and the commands between them."""
    page = ROOT / "docs" / "own-agent.md"
    namespace: dict[str, object] = {"__name__": "__main__"}
    for _, language, block in BLOCK.findall(page.read_text("utf-8")):
        if named := re.match(r"# ([\w/]+\.\w+)\n", block):
            Path(named[1]).write_text(block, "utf-8")
            importlib.invalidate_caches()
        elif language == "python":
            exec(compile(block, str(page), "exec"), namespace)
        else:
            for line in block.splitlines():
                assert main(shlex.split(line)[1:]) == 0, line
    before, after = (json.loads((folder / f"runs/{name}/results.json").read_text()) for name in ("before", "after"))
    assert before["results"]["search"]["macro"]["em"] == before["results"]["search"]["macro"]["searches"] == 0
    learnt = after["results"]["search"]["macro"]
    assert learnt["em"] > 0.9 and learnt["searches"] == pytest.approx(1, abs=0.1)
    told = capsys.readouterr().out
    assert re.search(r"kept +248 +100.0%", told) and '"answer"' in told


@pytest.mark.parametrize("path", [README, *DOCS], ids=lambda path: path.name)
def test_code_marked_as_runnable_runs(path: Path, folder: Path) -> None:
    run(path, blocks(path, "python", marked=True))


@pytest.mark.parametrize("path", [README, *DOCS], ids=lambda path: path.name)
def test_python_blocks_are_python(path: Path) -> None:
    for line, block in blocks(path, "python"):
        compile("\n" * (line - 1) + block, str(path), "exec")


# The hosts that the pages link to.
HOSTS = ("arxiv.org", "docs.ray.io", "github.com", "huggingface.co", "ir-measur.es")


@pytest.mark.parametrize("path", [README, *DOCS], ids=lambda path: path.name)
def test_links_work(path: Path) -> None:
    prose = BLOCK.sub("", path.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target:
            assert urlsplit(target).hostname in HOSTS, (
                f"{path.name} links to {target}: name the original, not a mirror"
            )
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{path.name} links to {target}, which does not exist"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{path.name} links to {target}, and there is no such heading"


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes from the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", path.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [README, *DOCS], ids=lambda path: path.name)
def test_named_files_exist(path: Path) -> None:
    named = re.findall(r"`((?:trl_search|tests|recipes|benchmarks|docs)/[\w/.-]+\.\w+)`", path.read_text("utf-8"))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("path", [README, ROOT / "CONTRIBUTING.md", *DOCS], ids=lambda path: path.name)
def test_the_rows_of_a_table_have_as_many_cells_as_its_head(path: Path) -> None:
    """A `|` in a cell, also in code, must be written as `\\|`: otherwise the text after it is not shown."""
    for table in re.findall(r"(?:^\|.*\n)+", BLOCK.sub("", path.read_text("utf-8")), re.MULTILINE):
        cells = {row: len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(set(cells.values())) == 1, cells


@pytest.mark.parametrize("path", [README, ROOT / "CONTRIBUTING.md", *DOCS], ids=lambda path: path.name)
def test_modules_that_commands_run_can_be_run(path: Path) -> None:
    for name in re.findall(r"-m\s+((?:trl_search|tests|tools|benchmarks)[\w.]*)", path.read_text("utf-8")):
        module = importlib.import_module(name)
        program = importlib.util.find_spec(f"{name}.__main__") if hasattr(module, "__path__") else module
        assert program, f"{path.name} runs python -m {name}, a package without __main__.py"


# docs/configuration.md


def keys(cls: type) -> dict[str, dataclasses.Field]:
    """Our own fields."""
    theirs = {field.name for field in dataclasses.fields(GRPOConfig)}
    return {field.name: field for field in dataclasses.fields(cls) if field.name not in theirs}


def key_table(cls: type) -> str:
    """`| key | default | what it does |`, from the help of the fields."""

    def default(field: dataclasses.Field) -> str:
        made = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore
        return f"`{made}`" if made != "" else '`""`'

    def text(field: dataclasses.Field) -> str:
        # A bare tag would be invisible HTML, and a bare | the end of the cell.
        return re.sub(r"<[\w|]+>", r"`\g<0>`", field.metadata["help"]).replace("|", r"\|")

    rows = [f"| `{name}` | {default(f)} | {text(f)} |" for name, f in keys(cls).items()]
    return "\n".join(["| key | default | what it does |", "|---|---|---|", *rows])


def changed_defaults_table() -> str:
    """The keys of TRL with another default here."""
    stock = {field.name: field for field in dataclasses.fields(GRPOConfig)}
    lines = ["| key | TRL's default | default here | what it does |", "|---|---|---|---|"]
    for field in dataclasses.fields(SearchGRPOConfig):
        if field.name in stock and field.default != stock[field.name].default:
            before = stock[field.name].default
            lines.append(f"| `{field.name}` | `{before}` | `{field.default}` | {field.metadata['help']} |")
    return "\n".join(lines)


TABLES = {
    "task": key_table(TaskArguments),
    "agent": key_table(SearchGRPOConfig),
    "changed": changed_defaults_table(),
}


CONFIGURATION = ROOT / "docs" / "configuration.md"


@pytest.mark.parametrize("name", TABLES)
def test_tables_in_the_pages_agree_with_the_code(name: str) -> None:
    """`python -m tests.test_docs` rewrites them."""
    text = CONFIGURATION.read_text("utf-8")
    held = re.search(rf"<!-- table: {name} -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert held and held[1].strip() == TABLES[name], "run: python -m tests.test_docs"


def test_every_metric_is_in_the_table() -> None:
    trajectory = Trajectory(prompt_ids=(1,))
    trajectory.finish(StopReason.ANSWER)
    page = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    table = page.partition("<!-- table: metrics -->")[2].partition("<!-- end -->")[0]
    for metric in trajectory_metrics(trajectory):
        assert f"`{metric}`" in table or metric.startswith("stop/"), metric
    named = re.findall(r"`((?:search|tokens|time|reflection)/\w+)`", table)
    assert set(named) <= set(trajectory_metrics(trajectory))


def test_every_built_in_reward_is_in_the_table() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    section = page[page.index("### Rewards") : page.index("## The agent")]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(BUILT_IN)


# docs/api.md


def test_the_reference_has_exactly_the_public_names() -> None:
    listed = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text("utf-8"), re.MULTILINE)
    for path in listed:
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__, path
    assert set(trl_search.__all__) <= {path.rpartition(".")[2] for path in listed}
    assert set(trl_search.__all__) <= set(dir(trl_search))


def test_the_docstring_of_a_configuration_has_all_its_keys() -> None:
    for cls in (SearchGRPOConfig, TaskArguments, AgentSettings):
        ours = [name for base in cls.__mro__ if base.__module__.startswith("trl_search.")
                for name in inspect.get_annotations(base)]  # fmt: skip
        documented = re.findall(r"^    (\w+) \(`", cls.__doc__ or "", re.MULTILINE)
        assert {name for name in ours if not name.startswith("_")} <= set(documented)


# docs/metrics.md


def metrics_on_the_page() -> set[str]:
    return set(re.findall(r"`([a-z_]+(?:/[\w<>]+)*)`", (ROOT / "docs" / "metrics.md").read_text("utf-8")))


def test_every_metric_that_the_code_logs_is_explained() -> None:
    """Ours by their names in the source, TRL's by theirs in its trainer."""
    families = "refill|curriculum|search|tools|tokens|time|reflection|retrieval|rollout|eval|loss|sampling"
    ours = re.compile(rf'[{{ (\[]f?"((?:{families})/[^"\s*]+)"')
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "trl_search").rglob("*.py"))
    theirs = re.compile(r'_metrics\[mode\]\[f?"([\w/{}]+)"\]')
    trl = Path(sys.modules[GRPOConfig.__module__].__file__ or "").with_name("grpo_trainer.py").read_text("utf-8")
    # The tool metrics of TRL do not exist here: our rollouts replace its tool loop.
    logged = {*ours.findall(source), *theirs.findall(trl)} - {"tools/call_frequency", "tools/failure_frequency"}
    logged |= {f"stop/{reason.value}" for reason in StopReason}
    names = {re.sub(r"\{[^}]*\}", "<>", name) for name in logged} - {"eval/nq/em", "stop/<>"}
    explained = {re.sub(r"<\w+>", "<>", name) for name in metrics_on_the_page()}
    assert names - explained == set()


def test_every_metric_of_a_recorded_run_is_explained() -> None:
    explained = {re.sub(r"<\w+>", r"\\w+", name) for name in metrics_on_the_page()}
    recorded = (ROOT / "tests/support/data/quickstart_metrics.txt").read_text("utf-8").split()
    missing = [name for name in recorded if not any(re.fullmatch(known, name) for known in explained)]
    assert recorded and missing == []


def rewrite_tables() -> None:
    for name, table in TABLES.items():
        text = CONFIGURATION.read_text("utf-8")
        start = text.index(f"<!-- table: {name} -->\n") + len(f"<!-- table: {name} -->\n")
        text = text[:start] + f"\n{table}\n\n" + text[text.index("<!-- end -->", start) :]
        CONFIGURATION.write_text(text, "utf-8")


if __name__ == "__main__":
    rewrite_tables()
