"""Latent attention (R2) by itself: 8 latents x 12 heads aggregate the tokens of a modality at full width."""

from __future__ import annotations

import pytest
import torch.nn.functional as F

from avfkernels import latent_attention
from bench.attention import PASSES, Case, compiled, on_backend, run_case

DIM, HEADS, LATENTS = 768, 12, 8
SCALE = 64**-0.5


def written_out(q, x):
    return (q @ x.transpose(-2, -1) * SCALE).softmax(-1) @ x


def sdpa(q, x):
    return F.scaled_dot_product_attention(q.unsqueeze(1), x.unsqueeze(1), x.unsqueeze(1), scale=SCALE).squeeze(1)


EAGER = on_backend(latent_attention, "eager", scale=SCALE)
ROWS = {
    "matrix products, written out": written_out,
    "one SDPA": sdpa,
    "eager": EAGER,
    "eager, compiled": compiled(EAGER),
}


def case(name: str, batch: int, tokens: int) -> Case:
    queries = LATENTS * HEADS
    product = 2 * batch * queries * tokens * DIM
    return Case(
        name=f"latent_attention: {name}",
        title=f"Latent attention: {LATENTS} latents x {HEADS} heads over {tokens} tokens of width {DIM}",
        batch=f"{batch}",
        rows=ROWS,
        gate=on_backend(latent_attention, "reference", scale=SCALE),
        sizes=((batch, queries, DIM), (batch, tokens, DIM)),
        flop={"forward": 2 * product, "backward": 4 * product, "both": 6 * product},
        skipped={},
        no_backward={},
    )


CASES = {
    made.name: made
    for made in (case("image", 8, 196), case("audio", 8, 96), case("masked", 8, 49), case("video", 2, 3136))
}


@pytest.fixture(scope="module", params=CASES)
def section(request, device, progress, publish):
    return run_case(CASES[request.param], device, progress, publish)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("row", ROWS)
def test_latent_attention(section, row, pass_, replay):
    title, results = section
    result, times = results[row]
    replay(result, times.get(pass_, []), group=f"{title}, {pass_}")
