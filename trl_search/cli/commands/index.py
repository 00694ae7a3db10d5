"""Builds an index of a corpus, so that training and search open it in a second.

    trl-search index --corpus corpus.jsonl --kind bm25 --output indexes/corpus
    trl-search index --corpus corpus.parquet --kind dense --encoder intfloat/e5-base-v2 --output indexes/dense
    accelerate launch -m trl_search index --corpus org/dataset --kind dense ...        encodes on every GPU

The corpus is a file (`.jsonl`, `.json`, `.csv`, `.tsv`, each also as `.gz`, `.bz2`, `.xz` or `.zst`; `.parquet`), a
folder of `.txt` or `.md` files (one passage each: `trl-search data chunk` cuts long ones), a BEIR folder, or a dataset
on the hub (`name`, `name:config`, `name:config:split`). Its rows have one of two forms:

    {"id": "17", "contents": "\\"Mira Talvane\\"\\nMira Talvane was born in Orlune ..."}
    {"id": "17", "title": "Mira Talvane", "text": "Mira Talvane was born in Orlune ..."}

The id may also be called `_id`, `doc_id` or `docid`; give other names with --id_field, --title_field and --text_field.
A line that is not JSON, lacks a field or repeats an id ends the build with an error that names the line. The output
folder holds everything a search needs, including the passages, and appears only when it is complete. After an
interrupted build, the same command reuses the passages that were already encoded.

For a dense index, the expected memory, disk space, time and recall are printed before the build, and the measured
recall@3 (against exact search) after it. --index_type is one of:

    flat         exact; 3 GB per million passages of 768 dimensions
    fp16         exact to the third digit; half the size of flat
    int8         a quarter of flat; recall .99
    small        a thirtieth of flat in memory, a quarter on disk; recall at least .95
    small-ivf    the size of small, but faster from ten million passages on
    hnsw         fastest; 3.4 GB in memory; recall at least .87

An index that is too large for one host can be kept in Qdrant or OpenSearch (docs/scaling.md). The folder then holds
the passages and the server's address:

    trl-search index --corpus corpus.jsonl --kind qdrant --url http://qdrant:6333 --collection wiki --output out
    trl-search index --corpus corpus.jsonl --kind opensearch --url http://search:9200 --collection wiki --output out

Try the index with `trl-search search indexes/corpus "where was Mira Talvane born?"`. To train with it, pass
`--retriever indexes/corpus`, or add to the recipe:

    retriever: indexes/corpus

Up to two million passages, --kind bm25 uses the bm25s engine, which needs 5 GB of memory per million passages while it
builds. Above, it uses tantivy.
"""

from __future__ import annotations

import argparse
import re
import textwrap
import types
from collections.abc import Callable
from dataclasses import Field, fields
from functools import partial
from typing import Any, Union, get_args, get_origin, get_type_hints

from trl_search.cli.options import add_passage_fields, explained_interrupt, passage_fields
from trl_search.retrieval.index.folder import build_index, join_build
from trl_search.retrieval.index.workers import launched_workers
from trl_search.retrieval.registry import INDEX_KINDS

OWN = ("corpus", "output", "kind", "overwrite", "skip_duplicates", "id_field", "title_field", "text_field")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--corpus", required=True, metavar="FILE", help="the passages: a file, a folder, or a dataset's name"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the index folder to write")
    parser.add_argument("--kind", default="bm25", choices=INDEX_KINDS.names(), help="kind of index (default: bm25)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the index in DIR once the new one is complete"
    )
    add_passage_fields(parser)
    parser.add_argument(
        "--skip_duplicates", action="store_true", help="if ids repeat, keep the first passage instead of stopping"
    )
    added: set[str] = set()
    for kind in INDEX_KINDS.names():
        make = INDEX_KINDS.get(kind)
        shared = ", ".join(f"--{option.name}" for option in fields(make) if option.name in added)
        also = f" Also {shared}, as above." if shared else ""
        said = f"The index records these options, and its searches use them.{also}"
        group = parser.add_argument_group(f"--kind {kind}", textwrap.fill(said, 115))
        helps, hints = _documented(make), get_type_hints(make)
        for option in fields(make):
            if option.name not in added:  # several kinds may share an option
                added.add(option.name)
                _add_option(group, option, hints[option.name], helps.get(option.name, ""))


def run(args: argparse.Namespace) -> int:
    options = {name: value for name, value in vars(args).items() if name not in OWN}
    workers = launched_workers()
    if workers.rank > 0:
        join_build(args.output, args.kind, workers, **options)
        return 0
    with explained_interrupt(lambda: "the same command resumes the build"):
        manifest = build_index(
            args.corpus,
            args.output,
            args.kind,
            overwrite=args.overwrite,
            fields=passage_fields(args),
            skip_duplicates=args.skip_duplicates,
            announce=partial(print, flush=True),
            workers=workers,
            **options,
        )
    print(f"{args.output}: {manifest.passages:,} passages, {sum(manifest.files.values()) / 1e6:,.1f} MB")
    measured = manifest.details.get("vectors", {})
    if "recall_at_3" in measured:
        print(f"recall@3 {measured['recall_at_3']:.3f} of exact search, built in {measured['build_s']:,.0f} s")
    return 0


def _documented(make: Any) -> dict[str, str]:
    """The text about each option in the `Args:` of a builder and of its base classes."""
    documents = "\n".join(cls.__doc__ or "" for cls in reversed(make.__mro__))
    entries = re.findall(r"^ {8}(\w+) \([^)]*\): (.*(?:\n {12}.*)*)", documents, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _add_option(group: Any, option: Field[Any], hint: Any, text: str) -> None:
    """Adds one field of a builder as `--name`. If it is not given, the builder's own default applies."""
    said = text.rstrip(".").replace("%", "%%").replace("`None`", "none")  # the word that `_reader` reads
    default = "" if option.default is None else f" (default: {option.default})"
    common = {"dest": option.name, "default": argparse.SUPPRESS, "help": f"{said}{default}"}
    if hint is bool:
        group.add_argument(f"--{option.name}", action="store_true", **common)
        group.add_argument(f"--no_{option.name}", action="store_false", **{**common, "help": "the opposite"})
    else:
        group.add_argument(f"--{option.name}", type=_reader(hint), metavar=option.name.upper(), **common)


def _reader(hint: Any) -> Callable[[str], Any]:
    """The function that parses a value of this type; the word `none` is `None` if the type allows it."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    (read,) = [kind for kind in get_args(hint) if kind is not type(None)]

    def read_or_none(value: str) -> Any:
        return None if value.lower() == "none" else read(value)

    read_or_none.__name__ = read.__name__  # argparse: "invalid int value"
    return read_or_none
