"""What nvcc made of csrc/*.cu, read from the installed library: registers, spills, shared memory, tensor-core
instructions. Needs no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from avfkernels import native

MAX_WARPS = 8  # of a block, csrc/pair_product.cu
KERNEL = re.compile(r"_Z\d+(pair_\w+)_kernelI4(Bf16|Fp16)((?:Li\d+E)+)E")
USAGE = re.compile(r"Function (_Z\S+):\n +REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def why_not() -> str | None:
    """What is missing here, or None."""
    if not native.CUDA_PATH.exists():
        return "the CUDA library is not built"
    return None if _cuobjdump() else "there is no cuobjdump on PATH and none in triton's package"


def _cuobjdump() -> str | None:
    if path := shutil.which("cuobjdump"):
        return path
    spec = find_spec("triton")
    path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else None
    return str(path) if path and path.exists() else None


def _dump(*options: str) -> str:
    command = [_cuobjdump(), *options, str(native.CUDA_PATH)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _label(symbol: str) -> str:
    kernel, dtype, widths = KERNEL.match(symbol).groups()
    return f"{kernel} {dtype.lower()} {'/'.join(re.findall('[0-9]+', widths))}"


def usage() -> list[dict]:
    """One row a kernel, dtype, widths and architecture; shared memory in bytes, that of the largest block."""
    rows = []
    for section in _dump("-res-usage").split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (\S+)", section)[1]
        for symbol, registers, stack, shared, local in USAGE.findall(section):
            dv = int(_label(symbol).rpartition("/")[2])
            rows.append(
                {
                    "kernel": _label(symbol),
                    "arch": arch,
                    "registers": int(registers),
                    "spills": int(stack) + int(local),
                    "shared memory": int(shared) + MAX_WARPS * 16 * (dv + 2) * 4,  # of a launch: what a warp has
                }
            )
    return sorted(rows, key=lambda row: (row["kernel"], int(re.search(r"\d+", row["arch"])[0])))


def instructions(arch: str) -> dict[str, dict]:
    """Kernel -> how many instructions of tensor cores, and of transposes of their tiles, its machine code has."""
    functions = (text.split(maxsplit=1) for text in _dump("-sass", "-arch", arch).split("Function : ")[1:])
    return {
        _label(symbol): {
            "mma instructions": body.count(" HMMA."),
            "transposes": body.count(" MOVM."),
        }
        for symbol, body in functions
    }


def rows() -> list[dict]:
    """The rows of `usage` with the instructions of each."""
    table = usage()
    found = {arch: instructions(arch) for arch in {row["arch"] for row in table}}
    return [row | found[row["arch"]][row["kernel"]] for row in table]
