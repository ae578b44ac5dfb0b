"""Pair attention by itself: each backend and two plain attentions, at the shapes of the fusion blocks.

Before a shape is timed, every row must agree with the reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import avfkernels
from bench import measure

BATCH, HEADS, QUERIES = 8, 12, 16
SCALE = 64**-0.5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # largest relative difference to the reference in float64
MANY_PAIRS = 1000  # beyond so many the reference is only checked against, not timed
SAMPLE_SECONDS = 0.02  # a sample repeats the call for about this long


@dataclass(frozen=True)
class Shape:
    n1: int
    n2: int
    d_qk: int
    d_v: int

    def __str__(self) -> str:
        return f"{self.n1} + {self.n2} keys of width {self.d_qk}, values of width {self.d_v}"


SHAPES = (
    Shape(96, 196, 16, 16),  # dense, inference
    Shape(96, 196, 16, 64),
    Shape(19, 49, 16, 16),  # dense, masked
    Shape(8, 8, 16, 64),  # factorized
)


def two_attentions(q, k1, v1, k2, v2):
    return F.scaled_dot_product_attention(q, k1, v1, scale=SCALE) + F.scaled_dot_product_attention(
        q, k2, v2, scale=SCALE
    )


def on_backend(name: str | None) -> Callable[..., Tensor]:
    def run(*tensors):
        with avfkernels.backend(name):
            return avfkernels.pair_attention(*tensors, scale=SCALE)

    return run


BASELINE = "two attentions, added"
ROWS = {
    BASELINE: two_attentions,
    "reference": on_backend("reference"),
    "eager": on_backend("eager"),
    "cpu": on_backend("cpu"),
    "automatic": on_backend(None),
}


def tensors(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k1, v1, k2, v2 [B, H, N, d], as the modules pass them: views of projections [B, N, H * d]."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(QUERIES, shape.d_qk), *((n, d) for n in (shape.n1, shape.n2) for d in (shape.d_qk, shape.d_v))]
    return [torch.randn(BATCH, n, HEADS, d, generator=generator).to(device, dtype).transpose(1, 2) for n, d in sizes]


@pytest.fixture(scope="session", params=SHAPES, ids=str)
def measured(request, device, effort, progress, publish):
    """One shape, all rows measured together: its title, and for each row its results and recorded times."""
    shape = request.param
    progress(f"pair attention, {shape}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    arguments = tensors(shape, device, dtype)
    with torch.inference_mode():
        expected = ROWS["reference"](*(x[:1].double() for x in arguments))  # one batch entry: all pairs exist here
        calls, skipped = {}, {}
        for name, function in ROWS.items():
            if name == "reference" and shape.n1 * shape.n2 > MANY_PAIRS:
                skipped[name] = f"not timed: {shape.n1 * shape.n2} pairs"
                continue
            try:
                actual = function(*arguments)[:1].double()
            except RuntimeError as error:
                if "cannot run" not in str(error):  # avfkernels' refusal of a backend, with the reason
                    raise
                skipped[name] = str(error)
                continue
            error = ((actual - expected).norm() / expected.norm()).item()
            assert error < TOLERANCE[dtype], f"{name} at {shape} is off by {error:.1e} from the reference in float64"
            calls[name] = lambda function=function: function(*arguments)
        once = measure.seconds(calls[BASELINE], device, repeats=3)
        repeats = max(1, round(SAMPLE_SECONDS / once))
        times = measure.in_turns(calls, device, effort, repeats=repeats)
    summary = measure.summarise(times)
    rows = {name: {"name": name} | (summary[name] if name in calls else {"note": skipped[name]}) for name in ROWS}
    section = {
        "title": f"Pair attention, forward, {shape}",
        "batch": f"{BATCH}, {HEADS} heads, {QUERIES} queries",
        "dtype": str(dtype).removeprefix("torch."),
        "baseline": BASELINE,
        "units": {"seconds": "s for a call", "time_ratio": "to the baseline's time in the same round"},
        "rows": list(rows.values()),
        "notes": ["Rows are timed in turns, each sample a run of calls, once they agree with the float64 reference."],
    }
    publish(f"pair_attention_{1 + SHAPES.index(shape)}", section)
    return section["title"], {name: (rows[name], times.get(name, [])) for name in ROWS}


@pytest.mark.parametrize("row", ROWS)
def test_pair_attention(measured, row, replay):
    title, rows = measured
    replay(*rows[row], group=title)
