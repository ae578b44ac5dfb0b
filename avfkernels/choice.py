"""Which implementation of an op runs where, the measurement that says so, and the override.

    reference   the paper's equations, materialising every pair; the oracle that everything is tested against
    eager       the exact rewrites R1, R2 and R4 in plain PyTorch; runs everywhere
    cpu         C++ (csrc/)
    triton      Triton
    cuda        CUDA C++ (csrc/), whose backward is Triton's

`TABLE` names one for every op, kind of device and regime. Ops that are not in it are plain PyTorch everywhere, linear
layers and attention on a CPU apart (ops/onednn.py, ops/attention.py).
`AVF_BACKEND=name` and `with avfkernels.backend(name):` override it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

NAMES = ("reference", "eager", "cpu", "triton", "cuda")
KERNELS = ("cpu", "triton", "cuda")
HALF = (torch.bfloat16, torch.float16)

# A module global, not a context variable: torch.compile guards on it, as it is read in a trace.
_forced: str | None = None


class Choice(NamedTuple):
    """A row of the table: where `holds` is true of an op's arguments, `implementation` is the fastest by `evidence`."""

    op: str
    device: str
    regime: str
    implementation: str
    evidence: str | None  # of bench/results/; None: what is left where no kernel runs, or is not measured
    holds: Callable[..., bool]


def _small_product(a) -> bool:
    pairs = a.k1.shape[2] * a.k2.shape[2]
    return a.interaction == "product" and max(a.q.shape[3], a.v1.shape[3]) <= 32 and pairs <= 1 << 16


# From top to bottom: the first that holds and can run.
TABLE = (
    Choice("pair_attention", "cpu", "sums, 8 queries or more", "cpu", "cpu-amd-epyc-2-cores-avx512.md",
           lambda a: a.separates() and a.q.shape[2] >= 8),
    Choice("pair_attention", "cpu", "products and dropped pairs", "cpu", "cpu-amd-epyc-2-cores-avx512.md",
           lambda a: not a.separates()),
    Choice("pair_attention", "cuda", "sums", "triton", "nvidia-h200-gpu.md", lambda a: a.separates()),
    Choice("pair_attention", "cuda", "dropped pairs", "triton", "nvidia-h200-gpu.md", lambda a: a.dropout_p > 0.0),
    Choice("pair_attention", "cuda", "products of 16 bits, up to 32 wide and 65536 pairs", "cuda",
           "nvidia-h200-gpu.md", lambda a: a.q.dtype in HALF and _small_product(a)),
    # On a GPU that is larger and wider products, by FlexAttention: bench/gpu.sh times it beside the kernels.
    Choice("pair_attention", "any", "other sums and products", "eager", None, lambda a: a.dropout_p == 0.0),
    Choice("pair_attention", "any", "other dropped pairs", "reference", None, lambda a: True),
)  # fmt: skip


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: no backend is called {name!r}; expected one of {', '.join(NAMES)}")
    return name


def forced() -> str | None:
    """The backend that an override names, or None while the table chooses."""
    return _forced


def materialises() -> bool:
    """True while the `reference` backend is forced: modules then follow the paper's equations to the letter."""
    return _forced == "reference"


def transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is active: they see PyTorch's operators."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def untraced() -> bool:
    """Whether operators that only this machine has may run: nothing records, counts or replaces PyTorch's own, and no
    override asks for them."""
    return (
        _forced in (None, "cpu")
        and not torch.compiler.is_compiling()
        and not transformed()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


@cache
def cpu_flags() -> frozenset[str]:
    """What the processor calls itself and can do ("AuthenticAMD", "avx512_bf16"), in Linux's words; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return frozenset()
    pairs = [line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line]
    lines = {name.strip(): value.strip() for name, value in pairs}
    return frozenset((*lines.get("flags", "").split(), lines.get("vendor_id", "")))


def multiplies_bf16() -> bool:
    """Whether the processor multiplies bfloat16 faster than float32: AMD's with avx512_bf16, Intel's with AMX.

    Inference takes 0.56 of the time on the first (bench/results/cpu-amd-epyc-2-cores-avx512.md); AMX is not measured;
    Intel's avx512_bf16 alone takes 1.6 times as long (cpu-intel-xeon-2-cores-avx512.md).
    """
    return "amx_bf16" in cpu_flags() or {"AuthenticAMD", "avx512_bf16"} <= cpu_flags()


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Runs the ops inside the block on the named backend; None restores the automatic choice.

    An op without that backend runs as `eager`; an op that has it but cannot run it with the arguments at hand
    raises RuntimeError with the reason. The override holds for the whole process, not for one thread.

    Raises ValueError for an unknown name.
    """
    global _forced
    previous, _forced = _forced, None if name is None else _check_name(name, "avfkernels.backend")
    try:
        yield
    finally:
        _forced = previous


def choose(op: str, arguments, why_not: Mapping[str, Callable]) -> str:
    """The name of the implementation that runs `op` with these arguments (`arguments.q` has their device).

    why_not: name -> function of the arguments that returns the reason it cannot run, or None. An exported program
    holds operators of PyTorch alone, so that it runs where this package is not.

    Raises RuntimeError if the forced one cannot run.
    """
    exporting = torch.compiler.is_exporting()
    plain = exporting or transformed()
    if _forced and not (exporting and _forced in KERNELS):
        reason = why_not[_forced](arguments)
        if _forced in KERNELS and plain:
            reason = "torch.func and forward-mode differentiation need operators of PyTorch"
        if reason:
            raise RuntimeError(f"{op}: the backend {_forced!r} was asked for and cannot run: {reason}")
        return _forced
    device = arguments.q.device.type
    for row in TABLE:
        name = row.implementation
        if row.op != op or row.device not in (device, "any") or (plain and name in KERNELS):
            continue
        if row.holds(arguments) and why_not[name](arguments) is None:
            return name
    raise AssertionError("the last row holds always")


if os.environ.get("AVF_BACKEND"):
    _forced = _check_name(os.environ["AVF_BACKEND"], "AVF_BACKEND")
