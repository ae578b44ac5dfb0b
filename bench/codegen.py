"""What the kernels compile to, without a GPU: `python -m bench.codegen [FILE]` writes bench/results/codegen.md, or FILE
(that of another version of Triton is bench/results/codegen-triton-3.6.md).

The backends run on tensors without memory, and every kernel that they would launch is compiled for each architecture
with the sizes of tiles that they choose.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

PATH = Path(__file__).parent / "results" / "codegen.md"
PACKAGE = Path(__file__).parents[1] / "avfkernels"
ARCHITECTURES = (80, 90, 100)
# The most shared memory that a block may have, in bytes: 163, 227 and 227 KiB (CUDA C++ Programming Guide).
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
TENSOR_CORES = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
COLUMNS = ("kernel", "shape", "dtype", "arch", "registers", "spills", "shared memory", "tensor cores")
CUDA_COLUMNS = ("kernel", "arch", "registers", "spills", "shared memory", "mma instructions", "transposes")


def _pair(interaction: str, F: int, dk: int, dv: int, dropout_p: float = 0.0, tokens: tuple[int, int] = (96, 196)):
    from avfkernels.ops import pair, pair_triton
    from avfkernels.ops.pair_plain import Pairs

    def run(dtype):
        N1, N2 = tokens
        shapes = ((F, dk), (N1, dk), (N1, dv), (N2, dk), (N2, dv))
        tensors = [torch.empty(64, 12, *shape, dtype=dtype, device="meta") for shape in shapes]
        if min(tokens) > 1000:
            tensors = [t[:1, :1] for t in tensors]
        seed = torch.empty((), dtype=torch.int64, device="meta") if dropout_p else None
        options = (None, None, seed, 0.125, interaction, dropout_p)
        out, lse, saved = pair.fake(*tensors, *options, "triton", True)
        pair_triton.forward(Pairs(*tensors, *options), out, lse, saved)
        grads = [torch.empty_like(t) for t in tensors]
        pair_triton.backward(Pairs(*tensors, *options), saved, out, lse, grads)

    what = f"pair {interaction}{', dropout' if dropout_p else ''}{', split' if min(tokens) > 1000 else ''}"
    return what, f"{F} queries, {dk} / {dv}", run


def cases(every: bool = True) -> list[tuple[str, str, Callable]]:
    """(what, shape, function of a dtype that runs forward and backward): every kernel once, or each size of tile."""
    once = [_pair("sum", 16, 16, 16, tokens=(4096, 4096)), _pair("product", 16, 16, 16)]
    if not every:
        return once
    return [
        *once,
        *(_pair("sum", F, *widths) for F in (16, 196) for widths in ((16, 16), (16, 64), (64, 64), (128, 128))),
        *(_pair("product", 16, *widths) for widths in ((16, 64), (64, 64), (128, 128))),
        _pair("sum", 16, 16, 16, dropout_p=0.1),
        _pair("product", 16, 64, 64, dropout_p=0.1),
    ]


def entry_kernels() -> set[str]:
    """The kernels of the sources, as module.function: what is @triton.jit and not called by what is."""
    defined, called = set(), set()
    for file in _files():
        module = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                defined.add(f"{module}.{node.name}")
                calls = (inner.func for inner in ast.walk(node) if isinstance(inner, ast.Call))
                called |= {function.id for function in calls if isinstance(function, ast.Name)}
    return {name for name in defined if name.rpartition(".")[2] not in called}


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[list]:
    """Inside, launches compile for `arch` and do nothing else; the list fills with the compiled kernels."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class NoDriver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))
        get_current_device = staticmethod(lambda: arch)  # kernels are kept by device
        get_current_stream = staticmethod(lambda device: 0)

    launch, kernels = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel not in kernels:
            kernels.append(kernel)

    driver.set_active(NoDriver())
    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = launch


def resources(kernel) -> dict:
    """Registers a thread, bytes spilled a thread, bytes of shared memory, and the tensor-core instructions."""
    from triton.knobs import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    number = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    return {
        "registers": number["REG"],
        "spills": number["STACK"] + number["LOCAL"],
        "shared memory": kernel.metadata.shared,
        "tensor cores": ", ".join(name for name in TENSOR_CORES if name in kernel.asm["ptx"]),
    }


def triton_rows(
    every: bool = True, dtype: torch.dtype = torch.bfloat16, architectures: tuple[int, ...] = ARCHITECTURES
) -> list[dict]:
    rows = []
    for arch in architectures:
        for what, shape, run in cases(every):
            with compiling(arch) as kernels:
                run(dtype)
            for kernel in kernels:
                function = kernel.src.fn
                names = {"kernel": f"{what}: {function.__name__.removesuffix('_kernel')}", "shape": shape}
                names["function"] = f"{function.__module__}.{function.__name__}"
                rows.append(names | {"dtype": str(dtype)[6:], "arch": f"sm_{arch}"} | resources(kernel))
    return rows


def table(rows: list[dict], columns: tuple[str, ...] = COLUMNS) -> str:
    lines = [columns, ["---"] * len(columns), *([str(row[column]) for column in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def committed() -> tuple[str, str, list[dict]]:
    """Of the committed table: Triton's version, the fingerprint of the sources, and the rows of Triton's kernels."""
    text = PATH.read_text().split("## CUDA")[0]
    version, fingerprint = (re.search(rf"{before} (\S+)", text)[1] for before in ("## Triton", "Sources:"))
    header, _, *lines = (line for line in text.splitlines() if line.startswith("|"))
    names, *cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines))
    return version, fingerprint, [dict(zip(names, row, strict=True)) for row in cells]


def _files() -> list[Path]:
    """What the Triton kernels are made of."""
    return sorted([PACKAGE / "ops" / "tiles.py", *PACKAGE.glob("ops/*_triton.py")])


def sources() -> str:
    """A fingerprint of the files that the Triton kernels are made of."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in _files())).hexdigest()[:16]


def markdown() -> str:
    import triton

    from bench import codegen_cuda

    reason = codegen_cuda.why_not()
    cuda = f"Not compiled: {reason}.\n" if reason else table(codegen_cuda.rows(), CUDA_COLUMNS)
    return (
        "# What the kernels compile to\n\nWritten by `python -m bench.codegen`, without a GPU. Registers and bytes "
        "spilled are those of a thread, bytes of shared memory those of a block.\n\n"
        f"## Triton {triton.__version__}\n\nSources: {sources()}\n\n{table(triton_rows())}\n## CUDA\n\n{cuda}"
    )


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else PATH).write_text(markdown())
