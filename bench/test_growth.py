"""How time and memory of pair attention grow with the number of pairs, from 10^2 to 10^5 tokens a side.

    python -m bench.test_growth "sum, automatic" 4096

prints the peak memory of one point on the CPU, in bytes above the inputs, forward and backward.
"""

from __future__ import annotations

import sys

import pytest
import torch

from avfkernels import pair_attention
from bench import measure
from bench.attention import on_backend

BATCH, HEADS, QUERIES, WIDTH, SCALE = 1, 12, 16, 16, 0.125
MOST_SAMPLES = 20
TOKENS = (100, 316, 1000, 3162, 4096, 10_000, 31_623, 100_000)
# Line -> interaction, backend, and the most tokens a side that it is run with.
LINES = {
    "sum, materialised": ("sum", "reference", 1000),
    "sum, eager": ("sum", "eager", 100_000),
    "sum, automatic": ("sum", None, 100_000),
    "product, materialised": ("product", "reference", 1000),
    "product, automatic": ("product", None, 4096),
}


def inputs(tokens: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, n, HEADS, WIDTH) for n in (QUERIES, tokens, tokens, tokens, tokens)]
    return [torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2) for shape in shapes]


def bind(line: str, tensors: list[torch.Tensor]):
    interaction, backend, _ = LINES[line]
    function = on_backend(pair_attention, backend, scale=SCALE, interaction=interaction)
    leaves = [x.detach().requires_grad_() for x in tensors]

    def forward():
        with torch.inference_mode():
            return function(*tensors)

    def both():
        out = function(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return forward, both


def peak_memory(line: str, tokens: int, tensors: list[torch.Tensor]) -> int:
    if tensors[0].is_cuda:
        return measure.peak_memory(bind(line, tensors)[1], tensors[0].device)
    return int(measure.run_module("bench.test_growth", line, str(tokens)))


@pytest.fixture(scope="module", params=[f"growth: {line}" for line in LINES])
def section(request, device, progress, publish):
    """One line, measured whole: its name, and pass -> tokens -> recorded times."""
    line, dtype = request.param.removeprefix("growth: "), torch.bfloat16 if device.type == "cuda" else torch.float32
    points, times = [], {"forward": {}, "both": {}}
    tensors = inputs(100, device, dtype)
    expected = on_backend(pair_attention, "reference", scale=SCALE, interaction=LINES[line][0])(
        *(x.double() for x in tensors)
    )
    error = ((bind(line, tensors)[0]().double() - expected).norm() / expected.norm()).item()
    assert error < 1e-5 or (dtype == torch.bfloat16 and error < 2e-2), f"{line}: off by {error:.1e}"
    for tokens in TOKENS:
        if tokens > LINES[line][2]:
            break
        progress(f"growth, {line}", f"{tokens:,} tokens a side")
        tensors = inputs(tokens, device, dtype)
        point = {"name": f"{tokens:,} tokens a side", "tokens": tokens, "pairs": tokens**2}
        for pass_, call in zip(times, bind(line, tensors), strict=True):
            call()
            once = measure.seconds(call, device)
            rounds = 1 if once > 3 else min(MOST_SAMPLES, max(3, round(1 / once)))
            repeats = max(1, round(0.01 / once))
            times[pass_][tokens] = [measure.seconds(call, device, repeats) for _ in range(rounds)]
            point[pass_] = {"seconds": measure.quantiles(times[pass_][tokens]), "rounds": rounds}
        point["peak_memory"] = peak_memory(line, tokens, tensors)
        points.append(point)
    publish(request.param, {
        "title": f"Growth of pair attention: {line}",
        "batch": f"{BATCH}, {HEADS} heads, {QUERIES} queries, width {WIDTH}",
        "dtype": str(dtype).removeprefix("torch."),
        "line": line,
        "units": {"seconds": "s for a call", "peak_memory": "bytes above the inputs, forward and backward"},
        "rows": points,
        "notes": [f"The smallest size agrees with the float64 reference. A point is timed in up to {MOST_SAMPLES} "
                  "samples; one that takes more than 3 s, once."],
    })  # fmt: skip
    return line, times


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("pass_", ["forward", "both"])
def test_growth(section, pass_, tokens, replay):
    line, times = section
    row = {"name": line, "note": f"{line} stops at {LINES[line][2]:,} tokens"}
    replay(row, times[pass_].get(tokens, []), group=f"growth, {pass_}, {tokens} tokens a side")


if __name__ == "__main__":
    tensors = inputs(int(sys.argv[2]), torch.device("cpu"), torch.float32)
    call = bind(sys.argv[1], tensors)[1]
    bind(sys.argv[1], inputs(8, torch.device("cpu"), torch.float32))[1]()
    print(measure.peak_memory(call, torch.device("cpu")))
