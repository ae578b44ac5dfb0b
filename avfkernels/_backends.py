"""Which implementation of an op runs: the names, the override, the choice.

    reference   the paper's equations, materialising every pair; the oracle that everything is tested against
    eager       the exact rewrites R1-R3 in plain PyTorch; runs everywhere
    cpu         C++ (csrc/)
    triton      Triton
    cuda        CUDA C++ (csrc/)

An op that has a fused backend for the device uses it where it is at least as fast as `eager` by measurement or where
`eager` cannot run, and `eager` otherwise. `AVF_BACKEND=name` and `with avfkernels.backend(name):` override the choice.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from avfkernels._autograd import transformed

NAMES = ("reference", "eager", "cpu", "triton", "cuda")
FUSED = ("cuda", "triton", "cpu")  # in order of preference

# A module global, not a context variable: torch.compile guards on it, as `_ops.call` and modules read it in a trace.
_forced: str | None = None


@dataclass(frozen=True)
class Backend:
    """One implementation of an op. All three callables take the op's own arguments."""

    forward: Callable
    why_not: Callable[..., str | None]  # None if it can run with these arguments, else the reason
    is_faster: Callable[..., bool] = lambda **_: True  # at least as fast as eager, by measurement


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: no backend is called {name!r}; expected one of {', '.join(NAMES)}")
    return name


def forced() -> str | None:
    """The backend that an override names, or None while the choice is automatic."""
    return _forced


def materialises() -> bool:
    """True while the `reference` backend is forced: modules then follow the paper's equations to the letter."""
    return _forced == "reference"


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


def select(op: str, table: dict[str, Backend], arguments: dict, forced: str | None = None) -> Backend:
    """The backend of `table` that runs `op` with these arguments; `forced` names it in place of the override.

    Raises RuntimeError if the forced one cannot.
    """
    forced = forced or _forced

    def why_not(name: str) -> str | None:
        if name in FUSED and transformed():
            return "torch.func and forward-mode differentiation need operators of PyTorch"
        return table[name].why_not(**arguments)

    if forced in table:
        if reason := why_not(forced):
            raise RuntimeError(f"{op}: the backend {forced!r} was asked for and cannot run: {reason}")
        return table[forced]
    eager = why_not("eager") is None
    if forced is None:
        for name in FUSED:
            if name not in table or why_not(name):
                continue
            # Where eager has no algebra, the alternative holds every pair in memory.
            if not eager or table[name].is_faster(**arguments):
                return table[name]
    return table["eager" if eager else "reference"]


if os.environ.get("AVF_BACKEND"):
    _forced = _check_name(os.environ["AVF_BACKEND"], "AVF_BACKEND")
