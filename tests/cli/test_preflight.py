"""The doctor on this machine: each check on good and on bad values."""

from __future__ import annotations

import importlib.metadata

import pytest
from packaging.requirements import Requirement

from trl_search.cli.main import main
from trl_search.cli.preflight import (
    EXTRAS,
    Device,
    Status,
    check_devices,
    check_extra,
    check_package,
    check_sampling,
    environment_checks,
    installed_version,
    packages_of,
)

TRL = Requirement("trl>=1.16,<1.17")

VLLM = Requirement("vllm>=0.22,<=0.31; extra == 'vllm'")
GOOD = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None}


@pytest.mark.parametrize(
    ("installed", "status"), [("1.16.0", "ok"), ("1.16.0+cpu", "ok"), ("1.17.1", "problem"), (None, "problem")]
)
def test_packages(installed, status):
    check = check_package(TRL, installed)
    assert check.status == status
    assert check.remedy == ("" if status == "ok" else "pip install 'trl<1.17,>=1.16'")


def test_extras():
    assert check_extra("vllm", [(VLLM, "0.31.0+cpu")]).status is Status.OK
    assert check_extra("vllm", [(VLLM, "0.40.0")]).status is Status.WARNING
    missing = check_extra("vllm", [(VLLM, None)])
    assert missing.status is Status.NOTE and "use_vllm" in missing.said and "trl-search[vllm]" in missing.remedy


def test_this_environment_has_the_packages_of_the_tests():
    checks = {check.name: check for check in environment_checks()}
    assert {checks[name].status for name in ("torch", "transformers", "trl")} == {Status.OK}
    assert {f"extra {name}" for name in EXTRAS} <= checks.keys()
    assert checks["trl"].said == installed_version("trl") and installed_version("no-such-package") is None


def test_each_extra_is_checked_with_all_of_its_packages():
    extras = set(importlib.metadata.metadata("trl-search").get_all("Provides-Extra"))
    assert extras - {"all", "dev"} == EXTRAS.keys()
    lines = ("ray[serve]>=2; extra == 'ray'", "trl-search[server]; extra == 'ray'", "uvicorn>=1; extra == 'server'")
    assert [one.name for one in packages_of("ray", [Requirement(line) for line in lines])] == ["ray", "uvicorn"]


def test_devices():
    assert check_devices([]).status is Status.NOTE
    assert "H200 (100 of 140 GiB free)" in check_devices([Device("H200", 100 * 2**30, 140 * 2**30)]).said


def test_sampling_that_cuts_the_distribution():
    assert check_sampling(GOOD).status is Status.OK
    assert check_sampling({**GOOD, "lora_dropout": 0.05}).status is Status.OK  # without an adapter
    for cut in ({"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.1}, {"lora_dropout": 0.05, "use_peft": True}):
        check = check_sampling({**GOOD, **cut})
        assert check.status is Status.WARNING and f"{next(iter(cut))}={next(iter(cut.values()))}" in check.said


def test_each_check_prints_one_line(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(environment_checks())
    assert {line.split()[0] for line in lines} <= {status.value for status in Status}
