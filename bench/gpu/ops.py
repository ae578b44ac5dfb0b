"""The ops by themselves."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import avfkernels
from bench.gpu.rows import BATCHES, CUDA, DEVICE, HALF, TOY, Rows, captured, check, timing

# interaction, B, H, F, N1, N2, dk, dv
PAIRS = [("sum", batch, 12, 16, 96, 196, 16, 16) for batch in (64, 256, 1024)] + [
    ("sum", 64, 12, 16, 8, 8, 16, 64),
    ("product", 64, 12, 16, 96, 196, 16, 16),
    ("sum", 1, 12, 16, 100_000, 100_000, 16, 16),
    ("product", 256, 12, 16, 96, 196, 16, 16),
    ("product", 1, 12, 16, 8192, 8192, 64, 64),
    ("product", 1024, 12, 16, 96, 196, 16, 16),
    ("product", 1, 12, 16, 2048, 2048, 16, 16),
    ("product", 64, 12, 16, 96, 196, 64, 64),
    ("sum", 1, 12, 196, 4096, 4096, 64, 64),
]


def library_sum(q, k1, v1, k2, v2, scale):
    sides = ((k1, v1), (k2, v2))
    return sum(F.scaled_dot_product_attention(q, k, v, scale=scale) for k, v in sides)


def part_ops(rows: Rows) -> None:
    """Each op by replaying a graph, forward and forward + backward; and the host's time of one call as it is."""
    for interaction, *shape in [(kind, 1, 2, 5, 9, 12, 16, 16) for kind in ("sum", "product")] if TOY else PAIRS:
        B, H, tokens, N1, N2, dk, dv = shape
        tensors = [torch.randn(B, n, H, d, device=DEVICE, dtype=HALF).transpose(1, 2).requires_grad_()
                   for n, d in ((tokens, dk), (N1, dk), (N1, dv), (N2, dk), (N2, dv))]  # fmt: skip
        ours = partial(avfkernels.pair_attention, scale=dk**-0.5, interaction=interaction)
        ways = {"cpu": ours}
        if CUDA:  # the plain form of products is R4, by FlexAttention; CUDA C++ is for them, up to 32 wide
            narrow = interaction == "product" and dk <= 32
            ways = dict.fromkeys(("triton", *(["eager"] * (interaction == "product")), *(["cuda"] * narrow)), ours)
        if interaction == "sum":
            ways["SDPA x 2 + add"] = partial(library_sum, scale=dk**-0.5)
        what = {"interaction": interaction, "shape": shape, "batch": B, "dtype": "bfloat16"}
        measure_op(rows, "pair_attention", tensors, ways, what)
    M, N, D = (6, 9, 32) if TOY else (96, 196, 768)
    for batch in BATCHES[:2]:
        tensors = [torch.randn(batch, n, D, device=DEVICE, dtype=HALF, requires_grad=True) for n in (M, N)]
        ways = {"eager": partial(avfkernels.latent_attention, scale=D**-0.5)}
        measure_op(
            rows, "latent_attention", tensors, ways, {"shape": [batch, M, N, D], "batch": batch, "dtype": "bfloat16"}
        )


def measure_op(rows: Rows, op: str, tensors: list, ways: dict[str, Callable], what: dict) -> None:
    few = [t[:1, ..., :256, :].detach() for t in tensors]  # what the equations, with every pair in memory, can hold
    for backend, function in ways.items():
        forced = None if backend.startswith("SDPA") else backend
        with rows.measuring(op, **what, backend=backend) as row, avfkernels.backend(forced):
            if row is None:
                continue
            with avfkernels.backend("reference"):
                expected = next(iter(ways.values()))(*(t.float() for t in few))
            row["error_norm"] = check([function(*few)], [expected], HALF)
            upstream = torch.randn_like(function(*tensors))

            def forward(function=function):
                with torch.no_grad():
                    return function(*tensors)

            def both(function=function, upstream=upstream):
                return torch.autograd.grad(function(*tensors), tensors, upstream)

            begin, calls = time.perf_counter(), 2 if TOY else 200
            for _ in range(calls):
                function(*few)
            row["host_us"] = (time.perf_counter() - begin) / calls * 1e6
            for name, call in (("forward", forward), ("both", both)):
                for key, value in timing(captured(call), 0.2).items():
                    row[f"{name}_{key.replace('ms', 'us')}"] = value * 1e3
