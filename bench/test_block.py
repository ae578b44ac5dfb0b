"""The parts of a ViT block by themselves, four pictures of 196 patches: linear layers with what comes behind them, and
self-attention over a prefix of 16 tokens and the patches."""

from __future__ import annotations

import os
from functools import cache, partial
from unittest.mock import patch

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from avfkernels.ops.attention import attention
from avfkernels.ops.linear import linear
from bench.attention import PASSES, Case, run_case

BATCH, TOKENS, DIM, HEADS, PREFIX = 4, 196, 768, 12, 16
SCALE = (DIM // HEADS) ** -0.5


@cache
def parameter(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach(), requires_grad=False)


def plain_linear(x, weight, bias, add=None, *, gelu=False):
    y = F.linear(x, weight, bias)
    y = F.gelu(y) if gelu else y
    return y if add is None else y + add


def our_linear(x, weight, bias, add=None, *, gelu=False):
    return linear(x, weight if weight.requires_grad else parameter(weight), bias, gelu=gelu, add=add)


def without_a_copy(*args, **options):
    with patch.dict(os.environ, AVF_PACK="0"):
        return our_linear(*args, **options)


def linear_case(name: str, d_in: int, d_out: int, *, gelu: bool = False, add: bool = False) -> Case:
    rows = {"F.linear": plain_linear, "ours, AVF_PACK=0": without_a_copy, "ours": our_linear}
    product = 2 * BATCH * TOKENS * d_in * d_out
    residual = ((BATCH, TOKENS, d_out),) if add else ()
    behind = " and GELU" if gelu else " and the residual" if add else ""
    return Case(
        name=f"block: {name}",
        title=f"Linear layer {d_in} -> {d_out}{behind}, {TOKENS} tokens",
        batch=f"{BATCH}",
        rows={row: partial(run, gelu=gelu) for row, run in rows.items()},
        gate=partial(plain_linear, gelu=gelu),
        sizes=((BATCH, TOKENS, d_in), (d_out, d_in), (d_out,), *residual),
        flop={"forward": product, "backward": 2 * product, "both": 3 * product},
        skipped={},
        no_backward={},
        gate_batch=10**6,  # a slice of a weight is another layer
    )


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=SCALE)


def products(q, k, v):
    return (q @ k.transpose(-2, -1) * SCALE).softmax(-1) @ v


def attention_case() -> Case:
    width, keys = DIM // HEADS, TOKENS + PREFIX
    forward = 4 * BATCH * TOKENS * keys * DIM
    return Case(
        name="block: attention",
        title=f"Self-attention: {HEADS} heads of {width}, {TOKENS} queries, {keys} keys",
        batch=f"{BATCH}",
        rows={"SDPA": sdpa, "matrix products": products, "ours": partial(attention, scale=SCALE)},
        gate=products,
        sizes=((BATCH, HEADS, TOKENS, width), *[(BATCH, HEADS, keys, width)] * 2),
        flop={"forward": forward, "backward": 2 * forward, "both": 3 * forward},
        skipped={},
        no_backward={},
    )


CASES = {
    case.name: case
    for case in (
        linear_case("qkv", DIM, 3 * DIM),
        linear_case("proj", DIM, DIM, add=True),
        linear_case("fc1", DIM, 4 * DIM, gelu=True),
        linear_case("fc2", 4 * DIM, DIM, add=True),
        attention_case(),
    )
}


@pytest.fixture(scope="module", params=CASES)
def section(request, device, progress, publish):
    return run_case(CASES[request.param], device, progress, publish)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("row", ["F.linear", "ours, AVF_PACK=0", "ours", "SDPA", "matrix products"])
def test_block(section, row, pass_, replay):
    title, results = section
    if row not in results:
        pytest.skip("of another table")
    result, times = results[row]
    replay(result, times.get(pass_, []), group=f"{title}, {pass_}")
