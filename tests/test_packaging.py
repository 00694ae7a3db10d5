"""The wheel contains every module, the recipes, the tiny policy's files and the type marker."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def sources() -> set[str]:
    """The files that the wheel must contain, by their names in it."""
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "trl_search").rglob("*") if path.is_file()}
    folder = ROOT / "recipes"
    recipes = {f"trl_search/recipes/{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file()}
    return {name for name in package | recipes if "__pycache__" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("trl_search", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(folder),
        ".",
    ]
    subprocess.run([sys.executable, *build], cwd=folder, check=True, timeout=600)
    return next(folder.glob("*.whl"))


def test_the_wheel_is_complete(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        licensed = any(name.endswith("licenses/LICENSE") for name in held)
    assert sources() <= held, sorted(sources() - held)
    assert not {name for name in held - sources() if ".dist-info/" not in name}
    assert licensed and {"trl_search/py.typed", "trl_search/recipes/quickstart.yaml"} <= held


def test_the_description_has_no_links_that_break_on_pypi(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode("utf-8")
    assert "Description-Content-Type: text/markdown" in metadata and "SearchGRPOTrainer" in metadata
    assert [target for target in re.findall(r"\]\(([^)]+)\)", metadata) if "://" not in target] == []


def test_links_in_the_readme_are_rewritten_for_pypi() -> None:
    for_pypi = runpy.run_path(str(ROOT / "setup.py"))["for_pypi"]
    readme = "[a](docs/a.md#b) ![c](docs/c.png) [d](https://d.org)"
    assert for_pypi(readme, None) == "a  [d](https://d.org)"
    at = "https://github.com/me/it"
    expected = f"[a]({at}/blob/main/docs/a.md#b) ![c]({at}/raw/main/docs/c.png) [d](https://d.org)"
    assert for_pypi(readme, at) == expected


def test_the_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    small = {"world_passages": 1000, "max_eval_questions": 8, "warm_start_steps": 1, "max_steps": 1}
    small |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    program = f"""
import importlib.resources, runpy, sys
import trl_search
from trl_search.cli.main import main
print(trl_search.__file__)
print(sorted(file.name for file in importlib.resources.files("trl_search.recipes").iterdir()))
main(["--help"])
sys.argv[1:] = {["train", "quickstart", *(word for key, value in small.items() for word in (f"--{key}", str(value)))]}
runpy.run_module("trl_search", run_name="__main__", alter_sys=True)
"""
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment["HF_HUB_OFFLINE"] = "1"
    (tmp_path / "empty").mkdir()
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "empty", env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    package, recipes, *said = run.stdout.splitlines()
    assert package.startswith(str(tmp_path / "site")) and "quickstart.yaml" in recipes
    assert any(line.startswith("| search, after GRPO ") for line in said)
    assert (tmp_path / "empty" / "runs" / "quickstart" / "curves.png").exists()


def test_versions_agree() -> None:
    import trl_search

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == trl_search.__version__
    # The Makefile installs torch before the constraints are used.
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert f"TORCH := {torch} " in (ROOT / "Makefile").read_text()
