"""What the benchmarks of single ops share: cases, three passes, the correctness gate, rates and memory.

    python -m bench.attention "pair_attention: sum, full" eager

measures the peak memory of a row on the CPU, in a process of its own, and prints the bytes.
"""

from __future__ import annotations

import ctypes
import importlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

import avfkernels
from bench import measure

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # largest relative difference to the reference in float64
SAMPLE_SECONDS = 0.02  # a sample repeats the call for about this long
PASSES = ("forward", "backward", "both")
EFFORT = measure.Effort(seconds=0.8)  # for a pass of a row


@dataclass(frozen=True)
class Case:
    """One table: shapes of the inputs, the implementations (rows) that are compared, and what they cost at least."""

    name: str  # "pair_attention: sum, full": the module bench.test_pair_attention has it among its CASES
    title: str
    batch: str
    rows: dict[str, Callable[..., Tensor]]  # the first is the baseline
    gate: Callable[..., Tensor]  # the reference
    sizes: tuple[tuple[int, ...], ...]
    flop: dict[str, int]  # per pass, in the best exact algebra: what GFLOP/s are counted in
    skipped: dict[str, str]  # row -> why it is not run
    no_backward: dict[str, str]  # row -> why it has no gradients
    gate_batch: int = 1  # entries of the batch that are compared with the reference

    def inputs(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Seeded inputs, as the modules pass them: [B, H, N, d] are views of projections [B, N, H * d]."""
        generator = torch.Generator().manual_seed(0)
        tensors = []
        for size in self.sizes:
            layout = (size[0], size[2], size[1], size[3]) if len(size) == 4 else size
            x = torch.randn(layout, generator=generator).to(device, dtype)
            tensors.append(x.transpose(1, 2) if len(size) == 4 else x)
        return tensors

    def bind(self, row: str, inputs: list[Tensor]) -> dict[str, Callable]:
        """Calls without arguments, one a pass. The backward pass alone runs again and again on one graph."""
        function = self.rows[row]

        def forward():
            with torch.inference_mode():
                return function(*inputs)

        if row in self.no_backward:
            return {"forward": forward}
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        return {
            "forward": forward,
            "backward": lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True),
            "both": lambda: torch.autograd.grad(function(*leaves), leaves, upstream),
        }

    def check(self, row: str, inputs: list[Tensor]) -> None:
        """Output and every gradient of the first batch entries against the reference in float64."""
        tolerance = TOLERANCE[inputs[0].dtype]
        results = []
        for function, dtype in ((self.gate, torch.float64), (self.rows[row], inputs[0].dtype)):
            leaves = [x[: self.gate_batch].to(dtype).requires_grad_(row not in self.no_backward) for x in inputs]
            with torch.set_grad_enabled(row not in self.no_backward):
                out = function(*leaves)
            grads = torch.autograd.grad(out[..., ::2].sum(), leaves) if row not in self.no_backward else ()
            results.append((out, *grads))
        for what, (expected, actual) in enumerate(zip(*results, strict=True)):
            error = ((actual.double() - expected).norm() / expected.norm()).item()
            name = f"the gradient of input {what}" if what else "the output"
            assert error < tolerance, f"{self.name}, {row}: {name} is off by {error:.1e} from the float64 reference"


def peer(package: str, attend: Callable) -> Callable[..., Tensor]:
    """softmax(q k^T) v by attend(q, k, v) of an optional package, which takes [B, N, H, d]; [B, H, N, d] here."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if find_spec(package) is None:
            raise RuntimeError(f"{package} cannot run: it is not installed")
        if not q.is_cuda:
            raise RuntimeError(f"{package} cannot run: it needs CUDA")
        if q.shape[-1] != v.shape[-1]:
            raise RuntimeError(f"{package} cannot run: it takes keys and values of one width")
        return attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return run


def flash_attn(scale: float) -> Callable[..., Tensor]:
    def attend(q, k, v):
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v, softmax_scale=scale)

    return peer("flash_attn", attend)


def xformers(scale: float) -> Callable[..., Tensor]:
    def attend(q, k, v):
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v, scale=scale)

    return peer("xformers", attend)


def on_backend(op: Callable, name: str | None, **options) -> Callable[..., Tensor]:
    def run(*tensors):
        with avfkernels.backend(name):
            return op(*tensors, **options)

    return run


@cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


@cache
def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that shares refer to: multiply-adds on registers (CPU) or a large bf16 matrix product (CUDA), measured."""
    if device.type == "cpu":
        return fma_flops(0.5)
    x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    seconds = [measure.seconds(lambda: x @ x, device, repeats=5) for _ in range(5)]
    return 2 * 8192**3 / min(seconds)


def fma_flops(seconds: float) -> float | None:
    """FLOP/s of multiply-adds on registers, all threads (bench/fma.cpp); None without g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fma.so"
        flags = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
        subprocess.run([compiler, *flags, Path(__file__).with_name("fma.cpp"), "-o", path], check=True)
        rate = ctypes.CDLL(str(path)).fma_flops
    rate.restype, rate.argtypes = ctypes.c_double, [ctypes.c_double]
    return rate(seconds)


def peak_memory(case: Case, row: str, inputs: list[Tensor]) -> int:
    """Bytes above the inputs, forward and backward; forward alone for a row that has no backward."""
    device = inputs[0].device
    if device.type == "cuda":
        calls = case.bind(row, inputs)
        return measure.peak_memory(calls.get("both", calls["forward"]), device)
    return int(measure.run_module("bench.attention", case.name, row))


def run_case(case: Case, device: torch.device, progress: Callable, publish: Callable) -> tuple[str, dict[str, tuple]]:
    """Checks, measures and publishes a case. Returns its title, and row -> (results, pass -> recorded times)."""
    progress(case.title, "checking")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs, calls, skipped = case.inputs(device, dtype), {}, dict(case.skipped)
    for row in case.rows:
        if row in skipped:
            continue
        try:
            case.check(row, inputs)
        except RuntimeError as error:
            if "cannot run" not in str(error):  # avfkernels' refusal of a backend, with the reason
                raise
            skipped[row] = str(error).partition("cannot run: ")[2]
            continue
        calls[row] = case.bind(row, inputs)

    peak, times, rows = peak_flops(device), {row: {} for row in case.rows}, {row: {"name": row} for row in case.rows}
    for pass_ in PASSES:
        taking = {row: passes[pass_] for row, passes in calls.items() if pass_ in passes}
        for call in taking.values():
            call()
        repeats = max(1, round(SAMPLE_SECONDS / measure.seconds(next(iter(taking.values())), device, repeats=3)))
        taken = measure.in_turns(
            taking, device, EFFORT, repeats=repeats, progress=lambda text, p=pass_: progress(case.title, f"{p}, {text}")
        )
        for row, result in measure.summarise(taken).items():
            times[row][pass_] = taken[row]
            rows[row][pass_] = result | {"flops": case.flop[pass_] / result["seconds"]["median"]}
            if peak:
                rows[row][pass_]["peak_share"] = rows[row][pass_]["flops"] / peak
    for row, result in rows.items():
        if row in skipped:
            result["note"] = skipped[row]
        elif row in case.no_backward:
            result["note"] = f"{case.no_backward[row]}; peak memory is that of forward"
        if row in calls:
            progress(case.title, f"memory: {row}")
            result["peak_memory"] = peak_memory(case, row, inputs)

    moved = 2 * sum(x.numel() for x in inputs) * inputs[0].element_size()
    rate = f"; the share is of {peak / 1e9:,.0f} GFLOP/s, measured in this run" if peak else ""
    publish(case.name, {
        "title": case.title,
        "batch": case.batch,
        "dtype": str(dtype).removeprefix("torch."),
        "baseline": next(iter(case.rows)),
        "flop": case.flop,
        "peak_flops": peak,
        "bytes_moved": moved,
        "units": {"seconds": "s for a call", "flops": "FLOP/s", "peak_memory": "bytes, forward and backward"},
        "rows": list(rows.values()),
        "notes": [
            "Rows are timed in turns, each sample a run of calls, once output and gradients agree with float64.",
            f"GFLOP/s count the best exact algebra ({case.flop['forward'] / 1e6:,.1f} MFLOP forward, "
            f"{case.flop['backward'] / 1e6:,.1f} backward), whatever a row computes{rate}.",
            f"Inputs and their gradients are {moved / 1e6:,.1f} MB; peak memory is that of forward and backward.",
        ],
    })  # fmt: skip
    return case.title, {row: (rows[row], times[row]) for row in case.rows}


def main(name: str, row: str) -> None:
    case = importlib.import_module(f"bench.test_{name.partition(':')[0]}").CASES[name]
    inputs = case.inputs(torch.device("cpu"), torch.float32)
    calls = case.bind(row, inputs)
    call = calls.get("both", calls["forward"])
    call()
    print(measure.peak_memory(call, torch.device("cpu")))


if __name__ == "__main__":
    main(*sys.argv[1:])
