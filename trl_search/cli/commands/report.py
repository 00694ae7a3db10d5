"""Writes what a run did as one HTML page: its curves, and its trajectories with every token's mask.

    trl-search report runs/quickstart                                 runs/quickstart/report.html
    trl-search report runs/seed_0 runs/seed_1 -o compared.html        two runs in the same charts
    trl-search report runs/quickstart --figures figures               and the curves as PNG

The page is one file: it opens offline, in any browser of 2024 or later, and asks no other machine for anything. A run
may still be going on, or have been killed: what is half-written is named at the top of the page and left out of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", help="the output_dir of a run")
    parser.add_argument("other", nargs="?", metavar="OTHER_RUN", help="a run to compare it with")
    parser.add_argument("-o", "--output", metavar="FILE", help="the page (default: RUN_DIR/report.html)")
    parser.add_argument(
        "--max_trajectories",
        type=int,
        default=2000,
        metavar="N",
        help="trajectories on the page; of more, whole steps are taken evenly (default: 2000)",
    )
    parser.add_argument("--figures", metavar="DIR", help="write the curves as PNG, too, and the reflection figure")
    parser.add_argument("--force", action="store_true", help="replace FILE even if it is no report")


def run(args: argparse.Namespace) -> int:
    from trl_search.records.folder import read_run
    from trl_search.records.report.page import write_report

    runs = [read_run(folder) for folder in (args.run, args.other) if folder is not None]
    output = Path(args.output) if args.output is not None else Path(args.run, "report.html")
    write_report(runs, output, max_trajectories=args.max_trajectories, force=args.force)
    for one in runs:
        for problem in one.problems:
            print(f"trl-search report: {one.folder}: {problem}", file=sys.stderr)
    print(f"{output}  {output.stat().st_size / 1e6:.1f} MB")
    if args.figures is not None:
        from trl_search.records.report.figures import draw_figures

        for path in draw_figures(runs, Path(args.figures)):
            print(path)
    return 0
