"""What a GPU says of this code: `bench/gpu.sh` runs the parts below, each in a process of its own.

    python -m bench.gpu PART [PART ...] --seconds S    build, encoder, pretrain, variants, ops, tests, sanitizers

A measurement is a row of JSON in $OUT/<device>-gpu.jsonl, flushed at once. What fails, runs out of memory or finds no
time left is a row too. Outputs are compared with the materialised equations before they are timed. Without a GPU, and
with AVF_BENCH_TOY=1 in place of full sizes, every line runs on a CPU: `bench/gpu.sh --rehearse`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from bench.gpu.encoder import part_encoder, part_variants
from bench.gpu.ops import part_ops
from bench.gpu.pretrain import part_pretrain
from bench.gpu.rows import CUDA, ROOT, TOY, Rows


def command(rows: Rows, section: str, line: list[str], seconds: float, **what) -> dict | None:
    """Runs a command within what is left; its row, to be completed by the caller: None where it did not run."""
    begin, environment = time.monotonic(), os.environ | what.pop("environment", {})
    try:
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
        ended, said = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        ended, said = None, str(error)
    row = what | {"seconds": round(time.monotonic() - begin, 1), "exit": ended}
    if ended != 0:
        row["error"] = f"cut short after {seconds:.0f} s" if ended is None else said.strip().splitlines()[-1][:200]
        print(said, file=sys.stderr)
    return row


def part_build(rows: Rows) -> None:
    line, environment = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], {"AVF_REQUIRE_NATIVE": "1"}
    if CUDA:
        major, minor = torch.cuda.get_device_capability()
        environment["AVF_CUDA_ARCHS"] = f"{major}.{minor}{'a' * (major == 9)}"
    if TOY:
        line = [sys.executable, "-c", "pass"]
    rows.add("build", **command(rows, "build", line, rows.deadline - time.monotonic() - 5, environment=environment))


def part_tests(rows: Rows) -> None:
    files = [f"tests/avfkernels/{name}.py" for name in ("test_gpu", "test_gpu_launches", "test_triton")]
    processes = 0 if TOY else max(1, (os.cpu_count() or 2) - 2)
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        line = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
            *files,
            f"--junitxml={junit}",
        ]
        line += ["-n", str(processes), "--dist=worksteal"] if processes else ["-k", "sanitizer"]
        row = command(rows, "tests", line, rows.deadline - time.monotonic() - 5)
        if junit.exists():
            suite = ElementTree.parse(junit).getroot().find("testsuite")
            row |= {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
            for case in suite.iter("testcase"):
                for failure in case.iter("failure"):
                    rows.add("test", name=case.get("name"), error=failure.get("message", "").splitlines()[0][:200])
            if not row["failures"] + row["errors"]:
                row.pop("error", None)  # all are skipped, or there is none to run
    rows.add("tests", **row)


def part_sanitizers(rows: Rows) -> None:
    program = shutil.which("compute-sanitizer")
    for tool, backend in (("memcheck", "cuda"), ("racecheck", "cuda"), ("memcheck", "triton")):
        what = {"tool": tool, "backend": backend}
        if program is None:
            rows.add("sanitizer", **what, skipped="there is no compute-sanitizer on PATH")
            continue
        tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider",
                 "tests/avfkernels/test_gpu.py", "-k", f"sanitizer and {backend}"]  # fmt: skip
        line = [program, "--tool", tool, "--error-exitcode", "1", *tests]
        # Without torch's cache each tensor is an allocation of its own, so that a step beyond one is seen.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        left = rows.deadline - time.monotonic() - 3
        if left > 5:
            rows.add("sanitizer", **command(rows, "sanitizer", line, left, environment=environment, **what))
        else:
            rows.add("sanitizer", **what, error="skipped: no time is left")


PARTS = {
    "build": part_build,
    "encoder": part_encoder,
    "pretrain": part_pretrain,
    "variants": part_variants,
    "ops": part_ops,
    "tests": part_tests,
    "sanitizers": part_sanitizers,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", metavar="PART", choices=PARTS, help=", ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=120.0, help="how long a part may take (default: %(default)s)")
    args = parser.parse_args()
    if not (CUDA or TOY):
        parser.error("torch finds no CUDA device; bench/gpu.sh --rehearse runs at toy size on a CPU")
    for part in args.parts:
        PARTS[part](Rows(part, args.seconds - 6))


if __name__ == "__main__":
    main()
