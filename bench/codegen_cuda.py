"""What nvcc makes of csrc/*.cu: registers, spills, shared memory and tensor-core instructions. Needs no GPU."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

CSRC = Path(__file__).parents[1] / "csrc"
ARCHS = ("80", "90a", "100", "120")
MAX_WARPS = 8  # of a block, csrc/pair_attention.cuh
KERNEL = re.compile(r"_Z\d+(pair_\w+)_kernelI4(Bf16|Fp16)Li(\d+)ELi(\d+)E")


def why_not() -> str | None:
    """What is missing here, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    return None if _cuobjdump() else "there is no cuobjdump on PATH and none in triton's package"


def _cuobjdump() -> str | None:
    if path := shutil.which("cuobjdump"):
        return path
    spec = find_spec("triton")
    path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else None
    return str(path) if path and path.exists() else None


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}")
    return done.stdout


def _compile(source: Path, arch: str, folder: Path) -> tuple[str, str]:
    """ptxas' report and the machine code."""
    built = folder / f"{source.stem}.{arch}.cubin"
    report = _run("nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin", source, "-o", built)
    return report, _run(_cuobjdump(), "-sass", built)


@functools.cache
def rows() -> list[dict]:
    """One row a kernel, dtype, widths and architecture; shared memory in bytes, that of the largest block."""
    jobs = [(source, arch) for source in sorted(CSRC.glob("pair_*.cu"), reverse=True) for arch in ARCHS]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(lambda job: _compile(*job, Path(folder)), jobs))
    table = []
    for (_, arch), (report, sass) in zip(jobs, compiled, strict=True):
        bodies = dict(function.split(maxsplit=1) for function in sass.split("Function : ")[1:])
        for text in report.split("Compiling entry function ")[1:]:
            name = text.split("'")[1]
            kernel, dtype, dk, dv = KERNEL.match(name).groups()
            static = re.search(r"(\d+) bytes smem", text)
            width = int(dk) if kernel == "pair_sum_backward" else int(dv) + 2
            table.append(
                {
                    "kernel": f"{kernel} {dtype.lower()} {dk}/{dv}",
                    "arch": f"sm_{arch}",
                    "registers": int(re.search(r"Used (\d+) registers", text)[1]),
                    "spills": int(re.search(r"(\d+) bytes spill stores", text)[1]),
                    "shared memory": int(static[1] if static else 0) + MAX_WARPS * 16 * width * 4,
                    "mma instructions": len(re.findall(r"\bHMMA\.", bodies[name])),
                    "transposes": len(re.findall(r"\bMOVM\.", bodies[name])),
                }
            )
    return sorted(table, key=lambda row: (row["kernel"], ARCHS.index(row["arch"].removeprefix("sm_"))))
