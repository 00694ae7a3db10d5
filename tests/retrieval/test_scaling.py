"""The sizing table: its arithmetic checked by hand, and the page shows what the script prints."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from benchmarks.scaling import DIM, ENGINES, Host, sources, table
from trl_search.retrieval.dense.vectors import plan

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
HOST = Host(cores=16, ram_gb=128)
BY_NAME = {engine.name: engine for engine in ENGINES}


@pytest.mark.parametrize(("name", "made"), [("scaling", table), ("sources", sources)])
def test_the_page_shows_what_the_script_prints(name: str, made) -> None:
    held = re.search(rf"<!-- table: {name} -->\n(.*?)\n<!-- end -->", PAGE.read_text("utf-8"), re.DOTALL)
    assert held and held[1].strip() == made(), "run python benchmarks/scaling.py and put its table into the page"


def test_a_scan_by_hand() -> None:
    small = BY_NAME["`dense` small"]
    # 723 per second on two cores with 200,000 passages; eight times the cores, 105 times the passages.
    assert small.rate(21_000_000, HOST) == pytest.approx(723 * 8 / 105)
    assert small.hosts(21_000_000, HOST, target=500) == math.ceil(500 / (723 * 8 / 105))
    assert small.ram_bytes(21_000_000) == plan("small", 21_000_000, DIM).ram_bytes
    assert small.shards(2_000_000_000, HOST) is None, "this index cannot be split"


def test_shards_by_hand() -> None:
    qdrant = BY_NAME["`qdrant` int8, on disk"]
    assert qdrant.shards(2_000_000_000, HOST) == math.ceil(2e9 * (768 + 128) / 96e9) == 19
    opensearch = BY_NAME["`opensearch`"]
    enough = opensearch.hosts(2_000_000_000, HOST, target=500)
    assert opensearch.rate(2e9 / enough, HOST) >= 500 > opensearch.rate(2e9 / (enough - 1), HOST)


def test_more_passages_never_need_fewer_hosts_or_answer_faster() -> None:
    for engine in ENGINES:
        rates = [engine.rate(count, HOST) for count in (1_000_000, 21_000_000, 200_000_000)]
        assert rates == sorted(rates, reverse=True)
        hosts = [engine.hosts(count, HOST, target=500) for count in (1_000_000, 21_000_000, 200_000_000)]
        assert hosts == sorted(hosts)
