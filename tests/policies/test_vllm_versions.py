"""Versions of vLLM, alone and at both ends of a weight sync."""

from __future__ import annotations

import inspect

import pytest
from trl.import_utils import is_vllm_available

from trl_search.policies.vllm_versions import VLLM_VERSIONS, can_join, version_problem


def test_an_unfinished_build_of_vllm_is_named():
    assert version_problem("dev").startswith("vLLM dev is outside")


def test_the_lowest_vllm_version_is_the_lowest_that_trl_accepts():
    assert f'"{VLLM_VERSIONS[0]}"' in inspect.getsource(is_vllm_available)


@pytest.mark.parametrize(
    ("there", "here", "joins"),
    [
        ("0.31.0+cu130", "0.32.0", True),
        ("0.22.0", "0.27.1", True),
        ("0.27.1", "0.28.0", False),
        ("0.32.0", "0.27.1", False),
        ("dev", "0.32.0", True),
    ],
)
def test_versions_that_join_an_nccl_group_alike(there, here, joins):
    assert can_join(there, here) is joins
