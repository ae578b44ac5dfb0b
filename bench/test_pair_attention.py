"""Pair attention by itself, at the shapes of the fusion blocks: every backend and what people would write instead."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from avfkernels import pair_attention
from bench.attention import PASSES, Case, compiled, flash_attn, on_backend, run_case, xformers

HEADS, QUERIES, SCALE = 12, 16, 64**-0.5
MANY_PAIRS = 20_000  # rows that hold every pair are left out beyond so many


def two_attentions(q, k1, v1, k2, v2):
    return F.scaled_dot_product_attention(q, k1, v1, scale=SCALE) + F.scaled_dot_product_attention(
        q, k2, v2, scale=SCALE
    )


def added(attend):
    """R1 by somebody else's attention."""
    return lambda q, k1, v1, k2, v2: attend(q, k1, v1) + attend(q, k2, v2)


def pairs(join, a, b):
    return join(a.unsqueeze(3), b.unsqueeze(2)).flatten(2, 3)


def flex(join):
    """FlexAttention has no hook for values: the pairs must exist."""

    def run(q, k1, v1, k2, v2):
        from torch.nn.attention.flex_attention import flex_attention

        k, v = pairs(join, k1, k2), pairs(join, v1, v2)
        return compiled(flex_attention)(q.contiguous(), k, v, scale=SCALE)

    return run


def rows(interaction: str) -> dict:
    backends = {
        name: on_backend(pair_attention, name, scale=SCALE, interaction=interaction)
        for name in ("reference", "eager", "cpu", "triton", "cuda")
    }
    ours = on_backend(pair_attention, None, scale=SCALE, interaction=interaction)
    if interaction == "product":
        return {
            "reference": backends["reference"],
            "FlexAttention over pairs": flex(torch.mul),
            "eager": backends["eager"],  # R4
            "triton": backends["triton"],
            "cuda": backends["cuda"],
            "automatic": ours,
        }
    return {
        "two SDPA, added": two_attentions,
        "two flash-attn, added": added(flash_attn(SCALE)),
        "two xformers, added": added(xformers(SCALE)),
        "reference": backends["reference"],
        "FlexAttention over pairs": flex(torch.add),
        "eager": backends["eager"],
        "eager, compiled": compiled(backends["eager"]),
        "cpu": backends["cpu"],
        "triton": backends["triton"],
        "automatic": ours,
    }


ROWS = list(rows("sum") | rows("product"))


def case(name: str, title: str, interaction: str, batch: int, n1: int, n2: int, dk: int, dv: int) -> Case:
    units = n1 * n2 if interaction == "product" else n1 + n2  # what queries meet, pairs or tokens
    forward, backward = (2 * batch * HEADS * QUERIES * units * width for width in (dk + dv, 3 * dk + 2 * dv))
    if interaction == "product":  # da and du come with db and dw
        backward += 2 * batch * HEADS * units * 2 * (dk + dv)
    skipped = {}
    if n1 * n2 > MANY_PAIRS:
        skipped = dict.fromkeys(("reference", "FlexAttention over pairs"), f"{n1 * n2:,} pairs a head: not run")
    return Case(
        name=f"pair_attention: {name}",
        title=f"Pair attention, {title}: {n1} + {n2} tokens, keys {dk} wide, values {dv}",
        batch=f"{batch}, {HEADS} heads, {QUERIES} queries",
        rows=rows(interaction),
        gate=on_backend(pair_attention, "reference", scale=SCALE, interaction=interaction),
        sizes=tuple((batch, HEADS, n, d) for n, d in ((QUERIES, dk), (n1, dk), (n1, dv), (n2, dk), (n2, dv))),
        flop={"forward": forward, "backward": backward, "both": forward + backward},
        skipped=skipped,
        no_backward={} if torch.cuda.is_available() else {"FlexAttention over pairs": "it has no backward on a CPU"},
    )


CASES = {
    made.name: made
    for made in (
        case("sum, full", "sums", "sum", 8, 96, 196, 16, 16),
        case("sum, full, wide values", "sums", "sum", 8, 96, 196, 16, 64),
        case("sum, masked", "sums", "sum", 8, 19, 49, 16, 16),
        case("sum, factorized", "sums of aggregates", "sum", 8, 8, 8, 16, 64),
        case("sum, video", "sums", "sum", 2, 640, 3136, 16, 16),
        case("product, full", "products", "product", 8, 96, 196, 16, 16),
        case("product, masked", "products", "product", 8, 19, 49, 16, 16),
    )
}


@pytest.fixture(scope="module", params=CASES)
def section(request, device, progress, publish):
    return run_case(CASES[request.param], device, progress, publish)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("row", ROWS)
def test_pair_attention(section, row, pass_, replay):
    title, results = section
    if row not in results:
        pytest.skip("no such row for this interaction")
    result, times = results[row]
    replay(result, times.get(pass_, []), group=f"{title}, {pass_}")
