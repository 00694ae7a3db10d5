"""Lists the question sets that can be given by name."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This action takes no arguments."""


def run(args: argparse.Namespace) -> int:
    from trl_search.data import HUB_SETS

    splits = ("train", "dev", "test")
    print(f"{'name':<17}{'repository':<30}{'config':<17}" + "".join(f"{split:>10} " for split in splits))
    for name, held in HUB_SETS.items():
        rows = [f"{held.splits[split]:,}" if split in held.splits else "" for split in splits]
        marked = [f"{n:>10}{'*' if split == held.split else ' '}" for n, split in zip(rows, splits, strict=True)]
        print(f"{name:<17}{held.repository:<30}{held.config or '':<17}{''.join(marked)}".rstrip())
    print("* the default split: the one that published numbers use")
    return 0
