"""Writes an HTML report of one or several runs: results, charts, and every token of the trajectories.

    trl-search report runs/quickstart                                       writes runs/quickstart/report.html
    trl-search report runs/seed_0 runs/seed_1 runs/seed_2 -o compared.html  shows several runs in the same charts
    trl-search report runs/quickstart --figures figures                     also writes the charts as PNG

The page is one file. It works offline, in any browser of 2024 or later, and loads nothing from other machines. A run
may still be in progress or may have been killed: half-written files are left out and named at the top of the page.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="the output_dir of a run; several are compared")
    parser.add_argument("-o", "--output", metavar="FILE", help="the page (default: report.html in the first RUN_DIR)")
    parser.add_argument(
        "--max_trajectories",
        type=int,
        default=2000,
        metavar="N",
        help="maximum trajectories on the page; a longer run shows evenly spaced steps (default: 2000)",
    )
    parser.add_argument("--figures", metavar="DIR", help="also write the charts and the reflection figure as PNG")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE even if it is not a report")


def run(args: argparse.Namespace) -> int:
    from trl_search.records.folder import read_run
    from trl_search.records.report.page import write_report

    runs = [read_run(folder) for folder in args.runs]
    output = Path(args.output) if args.output is not None else Path(args.runs[0], "report.html")
    write_report(runs, output, max_trajectories=args.max_trajectories, overwrite=args.overwrite)
    for one in runs:
        for problem in one.problems:
            print(f"trl-search report: {one.folder}: {problem}", file=sys.stderr)
    print(f"{output}  {output.stat().st_size / 1e6:.1f} MB")
    if args.figures is not None:
        from trl_search.records.report.figures import draw_figures

        for path in draw_figures(runs, Path(args.figures)):
            print(path)
    return 0
