"""The paper's claims on the synthetic world: `python -m bench.study`.

Pre-trains and evaluates a small encoder for every cell of a grid (bench/study/grid.py) and appends a row a cell to
bench/results/study.jsonl. Started again it runs what is missing, the most informative first. `--report` writes
bench/results/study.md and .png from the rows, and the tables of docs/science.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

import torch

from bench import measure
from bench.study.cell import Cell, row_of
from bench.study.grid import order

RESULTS = Path(__file__).parents[1] / "results"
PAGE = Path(__file__).parents[2] / "docs" / "science.md"
REHEARSAL = 1 / 16  # of the moments, and a few cells


def rows_of(path: Path) -> list[dict]:
    """The rows of a file; a last one that was cut off in writing is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__.split("\n\n")[0],
                                     epilog=__doc__.split("\n\n")[1])  # fmt: skip
    parser.add_argument("--hours", type=float, default=float("inf"), metavar="H", help="start no cell that would end "
                        "later (default: all cells)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=None, metavar="N", help="cells at a time (default: one a core, 8 "
                        "on a GPU)")  # fmt: skip
    parser.add_argument("--device", default=str(measure.DEVICE), help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "avf-study", metavar="FOLDER",
                        help="rendered worlds, 60 MB in all (default: %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS / "study.jsonl", metavar="FILE",
                        help="rows (default: bench/results/study.jsonl)")  # fmt: skip
    parser.add_argument("--report", action="store_true", help="write tables and plots of the rows, and run nothing")
    parser.add_argument("--rehearse", action="store_true", help="two cells of a small world, as a check of a machine")
    args = parser.parse_args()
    if args.report:
        from bench.study.report import filled, report, tables

        rows = rows_of(args.out)
        print(*report(rows, args.out.with_suffix("")), sep="\n")
        if args.out == RESULTS / "study.jsonl":
            PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables(rows)), encoding="utf-8")
            print(f"{PAGE}: its tables")
        return

    begun, device = time.perf_counter(), torch.device(args.device)
    jobs = args.jobs or (8 if device.type == "cuda" else os.cpu_count() or 1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = rows_of(args.out)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = {Cell(**row["cell"]) for row in rows}
    todo = [cell for cell in order() if cell not in done][: 2 if args.rehearse else None]
    print(f"{len(done)} cells are there, {len(todo)} to run, {jobs} at a time", flush=True)
    threads = max((os.cpu_count() or 1) // jobs, 1)  # more than there are cores would wait for each other
    facts = measure.environment(device) | {"device": measure.device_name(device), "threads": threads, "jobs": jobs}
    longest, running = 0.0, {}
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        while todo or running:
            while todo and len(running) < jobs and time.perf_counter() - begun + longest < args.hours * 3600:
                cell = todo.pop(0)
                share = REHEARSAL if args.rehearse else 1.0
                running[pool.submit(row_of, cell, args.cache, args.device, share)] = cell
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, row = running.pop(future), future.result()
                longest = max(longest, row["seconds"]["all"])
                with open(args.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row | {"machine": facts}) + "\n")
                print(f"{(time.perf_counter() - begun) / 60:.1f} min: {cell.name}, {row['seconds']['all']} s, "
                      f"{len(todo) + len(running)} to go", flush=True)  # fmt: skip
    if todo:
        print(f"out of time: {len(todo)} cells are missing; the same command goes on")


if __name__ == "__main__":
    main()
