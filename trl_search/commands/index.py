"""Builds an index of a corpus, once, so that training and search open it in a second.

    trl-search index --corpus corpus.jsonl --kind bm25 --output indexes/corpus

The corpus is a file with one passage a line, `.jsonl` or `.jsonl.gz`, in either shape:

    {"id": "17", "contents": "\\"Mira Talvane\\"\\nMira Talvane was born in Orlune ..."}
    {"id": "17", "title": "Mira Talvane", "text": "Mira Talvane was born in Orlune ..."}

A line that is not JSON, lacks a field or repeats an id ends the build, and is named. The output folder holds
everything a search needs, the passages too, and appears only when it is whole: a build that is killed leaves nothing
under its name.

Try it with `trl-search search indexes/corpus "where was Mira Talvane born?"`, train on it with

    retriever: bm25
    retriever_options: '{"index": "indexes/corpus"}'

bm25 is good to about two million passages; count on 5 GB of memory for each million while it builds.
"""

from __future__ import annotations

import argparse

from trl_search.retrieval.index import build_index


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", required=True, metavar="FILE", help="the passages, .jsonl or .jsonl.gz")
    parser.add_argument("--output", required=True, metavar="DIR", help="the index folder to make")
    parser.add_argument("--kind", default="bm25", choices=["bm25"], help="how to search (default: bm25)")
    parser.add_argument("--overwrite", action="store_true", help="replace the index in DIR when the new one is whole")
    bm25 = parser.add_argument_group("bm25", "Recorded in the index and applied to every query.")
    bm25.add_argument(
        "--stemmer", type=_name_or_none, default="english", help="a Snowball algorithm, or none (default: english)"
    )
    bm25.add_argument(
        "--stopwords", type=_name_or_none, default="english", help="stop words to drop, or none (default: english)"
    )
    bm25.add_argument("--k1", type=float, default=1.5, help="how soon a repeated word stops counting (default: 1.5)")
    bm25.add_argument("--b", type=float, default=0.75, help="how much long passages are held back (default: 0.75)")


def run(args: argparse.Namespace) -> int:
    manifest = build_index(
        args.corpus,
        args.output,
        args.kind,
        overwrite=args.overwrite,
        stemmer=args.stemmer,
        stopwords=args.stopwords,
        k1=args.k1,
        b=args.b,
    )
    print(f"{args.output}: {manifest.passages:,} passages, {sum(manifest.files.values()) / 1e6:,.1f} MB")
    return 0


def _name_or_none(value: str) -> str | None:
    return None if value.lower() == "none" else value
