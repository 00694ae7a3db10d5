"""Downloads wiki-18, the corpus of 21,015,324 passages behind published numbers, and an e5 index of it.

It first prints the files, their sizes, the disk and memory they need and the free disk space, then asks for
confirmation (--yes skips it). It stops if the disk is too small, and never overwrites a file.

    trl-search data wiki18 --output data/wiki18                    corpus and exact index: 69.7 GB; 84.2 GB of disk
    trl-search data wiki18 --what corpus --output data/wiki18      the corpus: 5.1 GB; 19.7 GB of disk
    trl-search data wiki18 --output data/wiki18 --check            checks the files in DIR and downloads nothing

  corpus    wiki-18.jsonl, for BM25 and every other kind of index
  e5-flat   e5_Flat.index: exact, 64.6 GB; memory-mapped, or 32.3 GB on a GPU
  e5-hnsw   e5_HNSW64.index: a graph, approximate, about 75 GB, all of it in memory

The same command resumes an interrupted download at the same byte, and uses files that are in DIR already (part_aa,
part_ab, wiki-18.jsonl.gz). Downloads are compared with the hub's SHA-256, existing index files with the hub's size;
the corpus must have the published number of passages, in order. At the end, it prints what was checked and the next
commands. --check does not contact the hub. The published BM25 index needs Lucene and cannot be used here: build one
from the corpus with `trl-search index`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from trl_search.common.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--what",
        default="corpus,e5-flat",
        metavar="WHAT",
        help="parts to download: corpus, e5-flat, e5-hnsw (default: %(default)s)",
    )
    parser.add_argument("--output", default="data/wiki18", metavar="DIR", help="target folder (default: %(default)s)")
    parser.add_argument("--yes", action="store_true", help="download without asking")
    parser.add_argument("--check", action="store_true", help="download nothing; check the files in DIR")


def run(args: argparse.Namespace) -> int:
    from trl_search.data.hub_download import free_bytes
    from trl_search.data.wiki18 import PIECES, check_wiki18, fetch_wiki18, next_commands, plan_wiki18
    from trl_search.retrieval.dense.vectors.search import gb

    what = list(dict.fromkeys(word.strip() for word in args.what.split(",") if word.strip()))
    if not what:
        raise UserError(f"--what is empty: give some of {', '.join(PIECES)}")
    folder = Path(args.output).expanduser()
    if not args.check:
        planned = plan_wiki18(what, folder)
        free = free_bytes(folder)
        print(f"{planned.describe()}\nfree      {gb(free)} of disk", flush=True)
        planned.check_disk(free)
        if planned.files and not (args.yes or _agreed()):
            print("nothing was downloaded")
            return 1
        checked = fetch_wiki18(planned)
    else:
        checked = check_wiki18(what, folder)
    print("\n".join(f"{word:<9} checked: {said}" for word, said in checked.items()))
    print("Next commands:\n")
    print("\n".join(f"    {command}" for command in next_commands(folder)))
    archive = folder / "wiki-18.jsonl.gz"
    if archive.exists():
        print(f"\nThe archive is no longer needed: rm {shlex.quote(str(archive))}")
    return 0


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise UserError("the download needs a confirmation, and stdin is not a terminal: give --yes")
    return input("download? [y/N] ").strip().lower() in ("y", "yes")
