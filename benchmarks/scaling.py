"""The table of docs/scaling.md: hosts, memory, disk and queries per second for 21 million to 2 billion passages.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --passages 500000000 --cores 64 --ram-gb 512 --target 2000

It measures nothing, but extrapolates from measurements of one shard; `ENGINES` has the source of each figure.

- `dense` and `bm25` hold a whole index on each host; more hosts are copies behind Ray Serve. Qdrant and OpenSearch
  split the index into shards. A query goes to all shards at once, so the rate is that of one host with its shard.
- The time of a query is proportional to the passages of a host for scanning (`small`) and BM25, to the square root of
  the passages for lists (`small-ivf`, with constant nprobe and as many lists as that root), to their logarithm for
  graphs.
- Throughput is proportional to the cores of a host (measured on two). Three quarters of its memory hold the index, the
  rest the system and the passages that were read.
- There is one copy of every shard. A second copy doubles hosts and queries per second, and tolerates the loss of one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trl_search.retrieval.dense.vectors import plan

DIM = 768
PASSAGES = (21_000_000, 200_000_000, 2_000_000_000)
TEXT_BYTES = 670  # per passage of wiki-18: 14 GB for 21 million
USABLE = 0.75  # of a host's memory
MEASURED_CORES = 2  # of all figures in `ENGINES`


@dataclass(frozen=True)
class Host:
    """The resources of one machine."""

    cores: int = 16
    ram_gb: int = 128


@dataclass(frozen=True)
class Engine:
    """One engine, measured with one shard.

    Args:
        name (`str`): Its name in the table.
        sharded (`bool`): Whether an index may be split over several hosts.
        ram_bytes (`Callable`): Number of passages -> bytes that must be in memory.
        disk_bytes (`Callable`): Number of passages -> bytes on disk, without the text.
        queries_s (`float`): Measured queries per second on two cores.
        shard (`int`): Number of passages in that measurement.
        slower (`Callable`): Factor by which a shard is larger -> factor by which it is slower.
        source (`str`): The source of `queries_s`.
    """

    name: str
    sharded: bool
    ram_bytes: Callable[[int], int]
    disk_bytes: Callable[[int], int]
    queries_s: float
    shard: int
    slower: Callable[[float], float]
    source: str

    def rate(self, share: float, host: Host) -> float:
        """Queries per second of a host with that many passages."""
        return self.queries_s * host.cores / MEASURED_CORES / self.slower(share / self.shard)

    def shards(self, passages: int, host: Host) -> int | None:
        """The fewest hosts that hold the index once; `None` if it does not fit on one and cannot be split."""
        hosts = max(1, math.ceil(self.ram_bytes(passages) / (USABLE * host.ram_gb * 1e9)))
        return hosts if hosts == 1 or self.sharded else None

    def hosts(self, passages: int, host: Host, target: float) -> int:
        """The fewest hosts for `target` queries per second, with more shards or with copies."""
        shards = self.shards(passages, host)
        assert shards is not None
        copies = shards * math.ceil(target / self.rate(passages / shards, host))
        if not self.sharded:
            return copies
        enough = (more for more in range(shards, copies) if self.rate(passages / more, host) >= target)
        return next(enough, copies)


def _linear(times: float) -> float:
    return times


def _graph(times: float) -> float:
    return 1 + math.log(times) / math.log(200_000)


def _ram(word: str) -> Callable[[int], int]:
    return lambda count: plan(word, count, DIM).ram_bytes


def _disk(word: str) -> Callable[[int], int]:
    return lambda count: plan(word, count, DIM).disk_bytes


def _per_passage(size: int) -> Callable[[int], int]:
    return lambda count: size * count


_DENSE = "synthetic vectors, batches of 64, recall@3"
_LINKS = 4 * 2 * 16  # bytes of Qdrant's graph, m = 16
_WORDS = 165  # bytes of an inverted index, which is read through the page cache
ENGINES = (
    Engine("`dense` small", False, _ram("small"), _disk("small"), 723, 200_000, _linear, f"{_DENSE} .973"),
    Engine(
        "`dense` small-ivf", False, _ram("small-ivf"), _disk("small-ivf"), 1388, 200_000, math.sqrt, f"{_DENSE} .921"
    ),
    Engine(
        "`qdrant` int8, on disk",
        True,
        _per_passage(DIM + _LINKS),
        _per_passage(DIM + _LINKS + 4 * DIM),
        1106,
        200_000,
        _graph,
        "**not Qdrant's**: FAISS' HNSW64, ef 128, recall@3 .758 to .873",
    ),
    Engine(
        "`bm25` tantivy",
        False,
        _per_passage(_WORDS),
        _per_passage(_WORDS),
        609,
        1_000_000,
        _linear,
        "batches of 512, two threads",
    ),
    Engine(
        "`opensearch`",
        True,
        _per_passage(_WORDS),
        _per_passage(_WORDS),
        609,
        1_000_000,
        _linear,
        "**not OpenSearch's**: those of tantivy, the same kind of index",
    ),
)


def table(passages: Sequence[int] = PASSAGES, host: Host | None = None, target: float = 500) -> str:
    """The table, as Markdown."""
    host = host or Host()
    lines = [
        f"| passages | engine | hosts | RAM per host, GB | disk per host, GB | queries/s | hosts for {target:g}/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for count in passages:
        for engine in ENGINES:
            head = f"| {count // 1_000_000:,}M | {engine.name}"
            hosts = engine.shards(count, host)
            if hosts is None:
                needed = engine.ram_bytes(count) / USABLE / 1e9
                lines.append(f"{head} | not on such a host: {needed:,.0f} GB of memory | | | | |")
                continue
            ram, disk = engine.ram_bytes(count) / hosts, (engine.disk_bytes(count) + count * TEXT_BYTES) / hosts
            figures = [_short(ram / 1e9), _short(disk / 1e9), _short(engine.rate(count / hosts, host))]
            lines.append(f"{head} | {hosts:,} | {' | '.join(figures)} | {engine.hosts(count, host, target):,} |")
    return "\n".join(lines)


def sources() -> str:
    """The source of each figure, as Markdown."""
    rows = [f"| {one.name} | {one.queries_s:g} with {one.shard:,} passages | {one.source} |" for one in ENGINES]
    return "\n".join(["| engine | queries/s on two cores | source |", "|---|---|---|", *rows])


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="+", default=PASSAGES)
    parser.add_argument("--cores", type=int, default=Host().cores, help="cores per host (default: %(default)s)")
    parser.add_argument(
        "--ram-gb", type=int, default=Host().ram_gb, help="memory in GB per host (default: %(default)s)"
    )
    parser.add_argument("--target", type=float, default=500, help="queries per second (default: %(default)s)")
    args = parser.parse_args()
    print(table(args.passages, Host(args.cores, args.ram_gb), args.target))
    print()
    print(sources())


if __name__ == "__main__":
    main()
