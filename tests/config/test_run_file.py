from __future__ import annotations

from pathlib import Path

import pytest

from trl_search.cli.recipe_checks import check_output
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.config.run_file import shown_path
from trl_search.trainer.sft import SearchSFTConfig


@pytest.mark.parametrize("config", [SearchGRPOConfig, SearchSFTConfig])
def test_a_run_stays_in_its_folder_if_the_working_directory_changes(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named, unnamed = (config(**given, use_cpu=True, bf16=False) for given in ({"output_dir": "runs/a"}, {}))
    assert named.output_dir == str(tmp_path / "runs/a")
    assert unnamed.output_dir == str(tmp_path / check_output({}).said), "the check before a run looks elsewhere"


def test_a_path_in_the_working_directory_is_shown_without_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "runs/a") == "runs/a"
    assert shown_path(Path("/elsewhere/runs/a")) == "/elsewhere/runs/a"
