"""Cuts documents into passages of N words or tokens.

    trl-search data chunk documents.jsonl --size 100 --output corpus.jsonl                    words, as in wiki-18
    trl-search data chunk docs.parquet --size 200 --overlap 40 --output corpus.jsonl          overlap of 40 words
    trl-search data chunk notes/ --output corpus.jsonl                                        a folder of .txt files
    trl-search data chunk docs.tsv --size 254 --tokenizer intfloat/e5-base-v2 --output ...    tokens of an encoder

DOCUMENTS has the formats of `trl-search index --corpus`. A passage is a verbatim piece of its document, with the same
title and url. Its id is the document's id, `#` and a number: "17#0", "17#1". In scripts without spaces between words,
such as Chinese, each character counts as a word. With --tokenizer, leave room for the encoder's prompt and special
tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trl_search.cli.options import add_passage_fields, passage_fields
from trl_search.common.errors import UserError
from trl_search.common.files import written_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("documents", metavar="DOCUMENTS", help="a file, a folder, or a dataset's name")
    parser.add_argument("--output", required=True, metavar="FILE", help="the corpus to write, a .jsonl file")
    parser.add_argument(
        "--size", type=int, default=100, metavar="N", help="words or tokens per passage (default: 100)"
    )
    parser.add_argument(
        "--overlap",
        type=int,
        default=0,
        metavar="N",
        help="words or tokens shared with the previous passage (default: 0)",
    )
    parser.add_argument("--tokenizer", metavar="MODEL", help="count this model's tokens instead of words")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    add_passage_fields(parser)


def run(args: argparse.Namespace) -> int:
    from trl_search.retrieval.corpus.chunks import Split, cut_documents, split_words, token_splitter
    from trl_search.retrieval.corpus.passages import passage_line, read_corpus

    output = Path(args.output).expanduser()
    if output.suffix != ".jsonl":
        raise UserError(f"--output {output}: give a file that ends in .jsonl")
    if output.exists() and not args.overwrite:
        raise UserError(f"{output} exists already: give --overwrite to replace it, or another name")
    split: Split = split_words
    if args.tokenizer is not None:
        from trl_search.policies.loading import load_tokenizer

        split = token_splitter(load_tokenizer(args.tokenizer))
    documents, chunks = 0, 0
    read = read_corpus(args.documents, passage_fields(args))
    with written_whole(output) as unfinished, unfinished.open("wb") as file:
        for chunk in cut_documents(read, args.size, overlap=args.overlap, split=split):
            documents += chunk.id.endswith("#0")
            chunks += 1
            file.write(passage_line(chunk) + b"\n")
    print(f"{output}: {documents:,} documents, {chunks:,} passages")
    return 0
