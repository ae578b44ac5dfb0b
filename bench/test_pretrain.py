"""A step of masked pre-training: `AVMAE` around ViT-B, forward and backward, decoders included, against the release.

The materialised model is built as the release builds it: all pairs in memory, fusion tokens carried through the
unimodal blocks, every row through the last decoder block. Before anything is timed, its losses and gradients and ours
must agree.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import avfkernels
from avfusion import AVMAE, DeepAVFusion
from bench import measure
from bench.encoder import DENSE, FACTORIZED, NONE

BATCH = {"cpu": 8, "cuda": 64}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # largest relative difference of losses and gradients
CONFIGS = {"dense": DENSE, "factorized": FACTORIZED}
ROWS = ("materialised", "ours", "no fusion")
UNITS = {
    "seconds": "s for a batch",
    "per_second": "videos/s, at the median time",
    "time_ratio": "to the materialised model's time in the same round",
    "saved": "bytes that forward keeps for backward",
    "saved_ratio": "to the materialised model's",
}


def saved_bytes(loss, model: AVMAE) -> int:
    """Bytes that `loss()` keeps for backward: each storage once, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    del value
    return sum(kept.values())


@pytest.fixture(scope="module", params=[f"pretrain_{kind}" for kind in CONFIGS])
def section(request, device, progress, publish):
    """One table, measured whole: its title, and for each row its results and recorded times."""
    kind, dtype = request.param.removeprefix("pretrain_"), torch.bfloat16 if device.type == "cuda" else torch.float32
    batch = BATCH[device.type]
    torch.manual_seed(0)
    models = {"ours": AVMAE(DeepAVFusion(CONFIGS[kind])), "no fusion": AVMAE(DeepAVFusion(NONE))}
    models["materialised"] = models["ours"]
    inputs = [torch.randn(batch, 3, 224, 224), torch.randn(batch, 1, 128, 192), torch.rand(batch, 196),
              torch.rand(batch, 96)]  # fmt: skip
    inputs = [x.to(device) for x in inputs]

    def bind(name: str):
        model, materialised = models[name].to(device), name == "materialised"

        def loss() -> Tensor:
            with (
                avfkernels.backend("reference" if materialised else None),
                torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"),
            ):
                loss_image, loss_audio, *_ = model(*inputs, predict=materialised)
            return loss_image + loss_audio

        def step() -> None:
            loss().backward()
            model.zero_grad()

        return loss, step

    checked, saved, steps = {}, {}, {}
    for name in ROWS:
        progress(f"A step of pre-training, {kind}: the first step of each row", name)
        loss, steps[name] = bind(name)
        saved[name] = saved_bytes(loss, models[name])
        if name != "no fusion":
            value = loss()
            value.backward()
            gradients = [p.grad.flatten() for p in models[name].encoder.fusion_blocks.parameters()]
            checked[name] = value.detach(), torch.cat(gradients)
            models[name].zero_grad()
    pairs = zip(checked["ours"], checked["materialised"], strict=True)
    worst = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    assert worst < TOLERANCE[dtype], f"{kind}: loss or gradients are off by {worst:.1e} relative"

    title = f"A step of masked pre-training, ViT-B and decoders, {kind}"
    times = measure.in_turns(steps, device, progress=lambda text: progress(f"{title}: timing", text))
    summary = measure.summarise(times)
    rows = [
        {"name": f"{kind}, {name}" if name != "no fusion" else name, "saved": saved[name],
         "saved_ratio": saved[name] / saved["materialised"],
         "per_second": batch / summary[name]["seconds"]["median"]} | summary[name]
        for name in ROWS
    ]  # fmt: skip
    publish(request.param, {
        "title": title,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch.") + (" autocast" if device.type == "cuda" else ""),
        "baseline": rows[0]["name"],
        "units": UNITS,
        "checks": {"relative_difference": worst},
        "rows": rows,
        "notes": [
            "Forward and backward, 75 % of image and 80 % of audio patches hidden. materialised: as the release "
            "computes it. saved: what forward keeps for backward, each storage once, parameters left out.",
            "Checked before timing: the loss, and the gradients of the fusion blocks as one vector, of ours and "
            f"materialised differ by {worst:.0e} relative.",
        ],
    })  # fmt: skip
    return title, {name: (row, times[name]) for name, row in zip(ROWS, rows, strict=True)}


@pytest.mark.parametrize("row", ROWS)
def test_pretrain(section, row, replay):
    title, rows = section
    replay(*rows[row], group=title)
