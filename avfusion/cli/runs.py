"""`avfusion runs`: how training runs stand."""

import argparse
import json
from pathlib import Path

from avfusion.cli.options import report_failed


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description = (
        "List training runs, the last that moved first: whether it runs, how far it is and how long it will take, its "
        "losses, and what its last evaluation found. RUN/run.html shows a run in pictures."
    )
    add = parser.add_argument
    add("folders", nargs="*", type=Path, default=[Path("runs")], metavar="DIR",
        help="runs, or folders with runs (default: runs)")  # fmt: skip
    add("--json", action="store_true", help="a JSON object a run")
    parser.set_defaults(run=run, parser=parser, stopped="Nothing is written.")


def run(args: argparse.Namespace) -> int:
    from avfusion.training.runs import COLUMNS, RunStatus, find_runs

    missing = next((folder for folder in args.folders if not folder.is_dir()), None)
    if missing is not None:
        args.parser.error(f"{missing}: no such folder; train something, or name the folder of your runs")
    folders = list(dict.fromkeys(found for folder in args.folders for found in find_runs(folder)))
    if not folders:
        print(f"no runs in {', '.join(map(str, args.folders))}: `avfusion pretrain tiny` starts one")
        return 0
    statuses, failed = [], []
    for folder in folders:
        try:
            statuses.append(RunStatus.of(folder))
        except ValueError as error:
            failed.append(error)
    if args.json:
        for status in statuses:
            print(json.dumps(vars(status) | {"folder": str(status.folder)}))
        return report_failed(failed, len(folders), "runs")
    rows = [list(COLUMNS), *(status.cells() for status in statuses)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    page = folders[0] / "run.html"
    if page.exists():
        print(f"\n{page}: the last of them in pictures")
    return report_failed(failed, len(folders), "runs")
