"""`avfkernels.accelerate` on a stand-in for the authors' model (bench/authors_style.py): before and after.

ViT-B with the release's 16 + 8 + 8 fusion tokens, inference, all 196 + 96 tokens. Outputs must agree before anything is
timed.
"""

from __future__ import annotations

import copy

import pytest
import torch

import avfkernels
from bench import measure
from bench.authors_style import Encoder
from bench.encoder import BASELINE, PASSES, difference

BATCH = {"cpu": 4, "cuda": 64}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # largest relative difference of the outputs
KINDS = ("dense", "factorized", "token")
WAYS = ("as released", "accelerated")


@pytest.fixture(scope="module", params=["accelerate"])
def section(request, device, progress, publish):
    """The table, measured whole: its title, and for each row its results and recorded times."""
    title = "`accelerate` on the authors' classes, ViT-B, inference, all 196 + 96 tokens"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    batch = BATCH[device.type]
    inputs = [x.to(device, dtype) for x in PASSES[0].inputs(BASELINE.config, batch)]
    rows, worst = {}, 0.0
    for kind in KINDS:
        progress(title, kind)
        torch.manual_seed(0)
        released = Encoder(kind).to(device, dtype).eval()
        accelerated = copy.deepcopy(released)
        avfkernels.accelerate(accelerated)
        with torch.inference_mode():
            error = difference(accelerated(*inputs), released(*inputs))
            assert error < TOLERANCE[dtype], f"{kind}: the accelerated model is off by {error:.1e}"
            if device.type == "cuda":  # until it is compiled and recorded
                for _ in range(-(-avfkernels.CLIPS // batch)):
                    accelerated(*inputs)
            names = [f"{kind}, {way}" for way in WAYS]
            calls = {name: lambda m=m: m(*inputs) for name, m in zip(names, (released, accelerated), strict=True)}
            times = measure.in_turns(calls, device, progress=lambda text: progress(title, text))
        for name, result in measure.summarise(times).items():
            per_second = batch / result["seconds"]["median"]
            rows[name] = {"name": name, "per_second": per_second} | result, times[name]
        rows[names[1]][0]["speed_up"] = 1 / rows[names[1]][0]["time_ratio"]["median"]
        worst = max(worst, error)
    publish(request.param, {
        "title": title,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "baseline": "the same model as released",
        "units": {"seconds": "s for a batch", "per_second": "videos/s, at the median time"},
        "checks": {"timed_relative_difference": worst},
        "rows": [row for row, _ in rows.values()],
        "notes": [
            "as released: a stand-in with the structure, names and numbers of the authors' classes, on timm's blocks; "
            "16 + 8 + 8 fusion tokens in all three.",
            f"Checked before timing: outputs differ by at most {worst:.0e} relative.",
        ],
    })  # fmt: skip
    return title, rows


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_accelerate(section, kind, way, replay):
    title, rows = section
    replay(*rows[f"{kind}, {way}"], group=title)
