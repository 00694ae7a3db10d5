"""Fetches wiki-18, the 21,015,324 passages that published numbers were searched in, and an e5 index of them.
First it says which files, how large, what disk and memory they take and what is free; then it asks (--yes: it does
not). It refuses where the disk is too small, and overwrites nothing.

    trl-search data wiki18 --output data/wiki18                    corpus and exact index: 69.7 GB; 84.2 GB of disk
    trl-search data wiki18 --what corpus --output data/wiki18      the corpus: 5.1 GB; 19.7 GB of disk
    trl-search data wiki18 --output data/wiki18 --check            looks at what is there, and fetches nothing

  corpus    wiki-18.jsonl, for BM25 and everything else
  e5-flat   e5_Flat.index: exact, 64.6 GB; memory-mapped, or 32.3 GB on a GPU
  e5-hnsw   e5_HNSW64.index: a graph, approximate, about 75 GB, all of it in memory

Killed or cut off, the same command goes on at the byte where it was. Parts that lie in DIR already (part_aa, part_ab,
wiki-18.jsonl.gz) are used. What is fetched is compared with the hub's SHA-256, an index that is there with the hub's
size; the corpus must have the published number of passages, in their order. In the end it says what was checked, and
prints the commands that come next. --check does not ask the hub. The published BM25 index is Lucene's and is not read
here; build one with `trl-search index`, from the corpus.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from trl_search.common.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--what", default="corpus,e5-flat", metavar="WHAT", help="of corpus, e5-flat, e5-hnsw (default: %(default)s)"
    )
    parser.add_argument("--output", default="data/wiki18", metavar="DIR", help="where to (default: %(default)s)")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--check", action="store_true", help="fetch nothing; check what is there")


def run(args: argparse.Namespace) -> int:
    from trl_search.data.hub_download import free_bytes
    from trl_search.data.wiki18 import PIECES, check_wiki18, fetch_wiki18, next_commands, plan_wiki18
    from trl_search.retrieval.dense.vectors.search import gb

    what = list(dict.fromkeys(word.strip() for word in args.what.split(",") if word.strip()))
    if not what:
        raise UserError(f"--what names nothing: give some of {', '.join(PIECES)}")
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
    print("What comes next:\n")
    print("\n".join(f"    {command}" for command in next_commands(folder)))
    archive = folder / "wiki-18.jsonl.gz"
    if archive.exists():
        print(f"\nThe archive is not needed any more: rm {shlex.quote(str(archive))}")
    return 0


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise UserError("there is no terminal to ask on: give --yes to download")
    return input("download? [y/N] ").strip().lower() in ("y", "yes")
