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
KERNEL = re.compile(r"_Z\d+(pair_\w+)_kernelI4(Bf16|Fp16)((?:Li\d+E)+)E")


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
    report = _run(
        "nvcc",
        "-std=c++17",
        "-O3",
        "-gencode",
        f"arch=compute_{ARCHS[0]},code=sm_{arch}",
        "-Xptxas=-v",
        "-cubin",
        source,
        "-o",
        built,
    )
    return report, _run(_cuobjdump(), "-sass", built)


def _dynamic(kernel: str, dk: int, dv: int = 0) -> int:
    """Bytes of shared memory that a launch asks for: 16 queries of a warp, fp32."""
    widths = {
        "pair_sum_forward": dv + 2,
        "pair_product_forward": dv + 2,
        "pair_sum_backward": dk,
        "pair_product_delta": 1,
        "pair_product_first": dk,
        "pair_product_second": 0,
        "pair_product_merge": 0,
    }
    return MAX_WARPS * 16 * widths[kernel] * 4


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
            kernel, dtype, widths = KERNEL.match(name).groups()
            widths = re.findall(r"\d+", widths)
            static = re.search(r"(\d+) bytes smem", text)
            table.append(
                {
                    "kernel": f"{kernel} {dtype.lower()} {'/'.join(widths)}",
                    "arch": f"sm_{arch}",
                    "registers": int(re.search(r"Used (\d+) registers", text)[1]),
                    "spills": int(re.search(r"(\d+) bytes spill stores", text)[1]),
                    "shared memory": int(static[1] if static else 0) + _dynamic(kernel, *map(int, widths)),
                    "mma instructions": len(re.findall(r"\bHMMA\.", bodies[name])),
                    "transposes": len(re.findall(r"\bMOVM\.", bodies[name])),
                }
            )
    return sorted(table, key=lambda row: (row["kernel"], ARCHS.index(row["arch"].removeprefix("sm_"))))
