"""Prefix attention (R3) by itself: the tokens of a modality attend to each other and to a prefix of fusion tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from avfkernels import prefix_attention
from bench.attention import PASSES, Case, compiled, flash_attn, on_backend, run_case, xformers

HEADS, WIDTH = 12, 64
SCALE = WIDTH**-0.5


def released(q, k, v, k_prefix, v_prefix):
    """As released, the prefix asks too: its rows are computed and thrown away."""
    prefix, k, v = k_prefix.shape[2], torch.cat((k_prefix, k), 2), torch.cat((v_prefix, v), 2)
    out = F.scaled_dot_product_attention(torch.cat((k_prefix, q), 2), k, v, scale=SCALE)
    return out[:, :, prefix:]


def concatenated(attend):
    """Somebody else's attention over what is joined first."""
    return lambda q, k, v, k_prefix, v_prefix: attend(q, torch.cat((k_prefix, k), 2), torch.cat((v_prefix, v), 2))


EAGER = on_backend(prefix_attention, "eager", scale=SCALE)
ROWS = {
    "concatenate, SDPA": EAGER,
    "concatenate, flash-attn": concatenated(flash_attn(SCALE)),
    "concatenate, xformers": concatenated(xformers(SCALE)),
    "prefix asks too": released,
    "reference": on_backend(prefix_attention, "reference", scale=SCALE),
    "eager, compiled": compiled(EAGER),
}


def case(name: str, batch: int, tokens: int, prefix: int) -> Case:
    product = 2 * batch * HEADS * tokens * (tokens + prefix) * WIDTH
    return Case(
        name=f"prefix_attention: {name}",
        title=f"Prefix attention: {tokens} tokens and a prefix of {prefix}, {WIDTH} wide",
        batch=f"{batch}, {HEADS} heads",
        rows=ROWS,
        gate=on_backend(prefix_attention, "reference", scale=SCALE),
        sizes=tuple((batch, HEADS, n, WIDTH) for n in (tokens, tokens, tokens, prefix, prefix)),
        flop={"forward": 2 * product, "backward": 5 * product, "both": 7 * product},
        skipped={},
        no_backward={},
    )


CASES = {
    made.name: made
    for made in (
        case("image", 8, 196, 32),
        case("audio", 8, 96, 32),
        case("masked", 8, 49, 32),
        case("dense", 8, 196, 16),
    )
}


@pytest.fixture(scope="module", params=CASES)
def section(request, device, progress, publish):
    return run_case(CASES[request.param], device, progress, publish)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("row", ROWS)
def test_prefix_attention(section, row, pass_, replay):
    title, results = section
    result, times = results[row]
    replay(result, times.get(pass_, []), group=f"{title}, {pass_}")
