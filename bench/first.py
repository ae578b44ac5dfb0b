"""The first five minutes, by the clock: `python -m bench.first` writes bench/results/first.json.

In a new folder: a virtual environment, the install as the README gives it (packages may come from pip's cache, and a
mirror may be nearer than the index is to others), `avfusion demo`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench import measure

ROOT = Path(__file__).parents[1]
PATH = ROOT / "bench" / "results" / "first.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.first", description=__doc__.split("\n\n")[0],
                                     epilog=__doc__.split("\n\n")[1])  # fmt: skip
    parser.parse_args()
    facts = {"device": measure.device_name(torch.device("cpu")), "load before": round(os.getloadavg()[0], 1)}
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, ".venv", "bin", "python")
        for name, command in {
            "venv": [sys.executable, "-m", "venv", str(python.parents[1])],
            "install": [str(python), "-m", "pip", "install", "--quiet", "-e", f"{ROOT}[train]"],
            "demo": [str(python), "-m", "avfusion", "demo", "--no-open"],
        }.items():
            clock = time.perf_counter()
            subprocess.run(command, cwd=folder, check=True)
            facts[f"{name}, seconds"] = round(time.perf_counter() - clock, 1)
        assert Path(folder, "demo", "mixed.html").stat().st_size > 10**5  # it is there, with its sounds in it
    facts |= {"command": "python -m bench.first"} | measure.environment(torch.device("cpu"))
    PATH.write_text(json.dumps(facts, indent=1) + "\n")
    print(PATH.read_text())


if __name__ == "__main__":
    main()
