"""The FLOP counts: the figures of the design, and what torch counts in the real modules."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import avfkernels
from avfkernels.attentions import Tokens
from avfusion import DeepAVFusion, EncoderConfig
from bench import flops
from bench.encoder import PASSES, ROWS

FULL, MASKED = (196, 96), (49, 19)

SMALL = EncoderConfig(
    dim=64, depth=3, num_heads=4, patch_size=16, image_size=(64, 64), audio_size=(32, 64), fusion_tokens=5,
    image_agg_tokens=3, audio_agg_tokens=2, fusion_mlp_ratio=2.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("row", "tokens", "gflop"),
    [
        ("no fusion", FULL, 51.4),
        ("dense, materialised", FULL, 326.9),
        ("dense, ours", FULL, 55.1),
        ("factorized, materialised", FULL, 75.3),
        ("factorized, ours", FULL, 56.9),
        ("no fusion", MASKED, 11.7),
        ("dense, materialised", MASKED, 31.1),
        ("dense, ours", MASKED, 13.7),
        ("factorized, materialised", MASKED, 28.6),
        ("factorized, ours", MASKED, 16.2),
    ],
)
def test_design_figures(row, tokens, gflop):
    count = flops.layers(ROWS[row].config, *tokens, materialised=ROWS[row].materialised)
    assert count / 1e9 == pytest.approx(gflop, rel=0.005)


def test_passes_have_the_tokens_of_the_paper():
    tokens = {pass_.name: pass_.tokens(EncoderConfig()) for pass_ in PASSES}
    assert tokens == {"full": FULL, "masked": MASKED, "training": MASKED}


@pytest.mark.parametrize("materialised", [True, False], ids=["materialised", "ours"])
@pytest.mark.parametrize("fusion_layers", ["all", "late"])
@pytest.mark.parametrize("fusion", ["none", "token", "dense", "factorized"])
def test_counts_what_runs(fusion, fusion_layers, materialised):
    config = replace(SMALL, fusion=fusion, fusion_layers=fusion_layers)
    n_image, n_audio = 16, 8
    with torch.device("meta"):
        model = DeepAVFusion(config)
        inputs = torch.empty(1, 3, 64, 64), torch.empty(1, 1, 32, 64)
    counter = FlopCounterMode(display=False)
    # The counter knows neither torch's fused attention on the CPU nor native kernels.
    with avfkernels.backend("reference" if materialised else "eager"), sdpa_kernel(SDPBackend.MATH), counter:
        model(*inputs)
    expected = flops.layers(config, n_image, n_audio, materialised=materialised) + flops.patch_embedding(config)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_aggregation_counts_the_cheaper_way(tokens):
    """The module absorbs its projections (R2) where that is less; both sides of the switch."""
    config = replace(SMALL, depth=1, image_agg_tokens=8, num_heads=8)
    with torch.device("meta"):
        latents, x = torch.empty(1, 8, config.dim), torch.empty(1, tokens, config.dim)
        attention = avfkernels.FactorizedFusion(config.dim, config.num_heads, fusion_tkns=(1, 8, 8)).attn.attn_v
    counter = FlopCounterMode(display=False)
    with avfkernels.backend("eager"), sdpa_kernel(SDPBackend.MATH), counter:
        attention(latents, Tokens(x, attention.kv.weight, attention.kv.bias))
    assert counter.get_total_flops() == flops.aggregation(config, 8, tokens, materialised=False)


def test_training_step_on_the_counter():
    """Backward takes twice the forward, but for the first layer: nothing asks for the gradient of the input."""
    config = replace(SMALL, fusion="dense")
    model, counter = DeepAVFusion(config), FlopCounterMode(display=False)
    with avfkernels.backend("eager"), sdpa_kernel(SDPBackend.MATH), counter:
        sum(out[..., ::2].sum() for out in model(torch.randn(1, 3, 64, 64), torch.randn(1, 1, 32, 64))).backward()
    expected = 3 * flops.layers(config, 16, 8, materialised=False) + 2 * flops.patch_embedding(config)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)
