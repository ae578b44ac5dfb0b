"""What share of the machine the encoder reaches, and clips a second beside what people would take instead.

The share is of multiply-adds in float32 on registers, measured in the same run (bench/fma.cpp); on a GPU of a large
matrix product. Peers are timm's ViT-B alone (the picture, no sound, no fusion) and two of its ViTs side by side: the
encoder's sizes without fusion, on PyTorch's own operators. Before anything is timed, ours without fusion must agree
with the two ViTs, given the same weights.
"""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import avfkernels
from bench import encoder, flops, measure
from bench.attention import peak_flops
from bench.encoder import DENSE, FACTORIZED, NONE, PASSES

BATCH = {"cpu": 4, "cuda": 64}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # largest relative difference to the two ViTs in float32
ALONE, TWO = "timm ViT-B, image alone", "two timm ViTs"
OURS = {"ours, no fusion": NONE, "ours, dense": DENSE, "ours, factorized": FACTORIZED}
ROWS = [f"{name}, {dtype}" for dtype in ("float32", "bfloat16") for name in (TWO, ALONE, *OURS)]


class Two(nn.Module):
    """A picture and a spectrogram through a ViT each."""

    def __init__(self):
        super().__init__()
        self.image, self.audio = (
            VisionTransformer(size, NONE.patch_size, channels, 0, global_pool="", class_token=False, fc_norm=False)
            for size, channels in ((NONE.image_size, 3), (NONE.audio_size, 1))
        )

    def forward(self, image: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.audio(audio)


def build(device: torch.device) -> dict[str, nn.Module]:
    models = dict(zip(OURS, encoder.build(list(OURS.values())).values(), strict=True))
    two, ours = Two(), models["ours, no fusion"]
    for theirs, vit in ((two.image, ours.image), (two.audio, ours.audio)):
        theirs.load_state_dict(vit.state_dict())
    models = {TWO: two, ALONE: two.image} | models
    nn.ModuleList(models.values()).to(device).eval()
    return models


@pytest.fixture(scope="module", params=["encoder_0_peers"])
def section(request, device, progress, publish):
    """The table, measured whole: its title, and for each row its results and recorded times."""
    title = "ViT-B, inference, all tokens: the share of this machine's peak, and peers"
    progress(title, "making the models")
    cpu, batch, peak = device.type == "cpu", BATCH[device.type], peak_flops(device)
    inputs = [x.to(device) for x in PASSES[0].inputs(NONE, batch)]
    models = {torch.float32: build(device)}
    patches = NONE.image_grid[0] * NONE.image_grid[1]
    flop = {ALONE: NONE.depth * flops.unimodal_block(NONE, patches, 0, materialised=False)}
    flop |= {name: PASSES[0].flop(encoder.Row(name, config)) for name, config in ({TWO: NONE} | OURS).items()}
    if not cpu or avfkernels.multiplies_bf16():
        models[torch.bfloat16] = copy.deepcopy(models[torch.float32])
        nn.ModuleList(models[torch.bfloat16].values()).bfloat16()

    calls, work, errors, expected = {}, {}, {}, None
    for dtype, named in models.items():
        x = [t.to(dtype) for t in inputs]
        for name, model in named.items():
            row = f"{name}, {str(dtype).removeprefix('torch.')}"
            calls[row] = lambda model=model, x=x[: 1 if name == ALONE else 2]: infer(model, x)
            work[row] = flop[name]
        outputs = infer(named["ours, no fusion"], x)[:2]
        expected = expected or infer(named[TWO], x)
        errors[str(dtype)] = error = encoder.difference(outputs, expected)
        assert error < TOLERANCE[dtype], f"ours, no fusion: off by {error:.1e} from two timm ViTs in {dtype}"

    times = measure.in_turns(calls, device, measure.Effort(5.0), progress=lambda text: progress(title, text))
    rows = {}
    for name, result in measure.summarise(times).items():
        rate = work[name] * batch / result["seconds"]["median"]
        share = {"flops": rate} | ({"peak_share": rate / peak} if peak else {})
        rows[name] = {"name": name, "per_second": batch / result["seconds"]["median"]} | result | share
    publish(request.param, {
        "title": title,
        "batch": batch,
        "dtype": " and ".join(str(dtype).removeprefix("torch.") for dtype in models),
        "baseline": ROWS[0],
        "peak_flops": peak,
        "units": {"seconds": "s for a batch", "per_second": "videos/s, at the median time", "flops": "FLOP/s"},
        "checks": {"relative_difference": errors},
        "rows": list(rows.values()),
        "notes": notes(peak, device, errors),
    })  # fmt: skip
    return title, {name: (rows.get(name, {"note": "this processor does not multiply bfloat16"}), times.get(name, []))
                   for name in ROWS}  # fmt: skip


def notes(peak: float | None, device: torch.device, errors: dict[str, float]) -> list[str]:
    """How to read the table."""
    share = "No share of the peak: g++, which measures it, is not here."
    if peak:
        of = "multiply-adds in float32 on registers" if device.type == "cpu" else "a matrix product in bfloat16"
        share = f"The share is of {peak / 1e9:,.0f} GFLOP/s, {of}, measured in this run; bfloat16 may exceed it."
    agreement = ", ".join(f"{error:.0e} ({dtype.removeprefix('torch.')})" for dtype, error in errors.items())
    return [
        f"{share} FLOP are those of the layers.",
        "timm: on PyTorch's own operators. Checked before timing: with the same weights ours without fusion differs "
        f"from the two ViTs in float32 by at most {agreement}, relative.",
    ]


@torch.inference_mode()
def infer(model: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return model(*inputs)


@pytest.mark.parametrize("row", ROWS)
def test_peers(section, row, replay):
    title, rows = section
    replay(*rows[row], group=title)
