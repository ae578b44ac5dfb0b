"""A whole step of masked pre-training."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

import avfkernels
from avfusion import AVMAE
from avfusion.training.step import RecordedStep, Step
from bench import encoder, flops, measure
from bench.gpu.encoder import MATERIALISED, ROWS, build, inputs, matmul_peak
from bench.gpu.rows import BATCHES, CUDA, DEVICE, HALF, TOY, Rows, check, timing


def step_flop(model: AVMAE, batch: int) -> int:
    """Of a step: three forward passes of the layers, hidden patches in the decoders alone."""
    config = model.encoder.config
    total = flops.layers(config, *encoder.PASSES[1].tokens(config), materialised=False) + flops.patch_embedding(config)
    for decoder, patches in (("image", config.image_grid), ("audio", config.audio_grid)):
        blocks = getattr(model, f"{decoder}_decoder_blocks")
        width = blocks[0].attn.proj.in_features
        inside = replace(config, dim=width, num_heads=1, depth=len(blocks), fusion="none")
        total += flops.layers(inside, patches[0] * patches[1] + config.num_fusion_tokens, 0, materialised=False)
    return 3 * batch * total


def part_pretrain(rows: Rows) -> None:
    """A whole step: forward under autocast, backward, fused AdamW; "recorded" is how `avfusion pretrain` takes it."""
    peak = matmul_peak()
    for batch in BATCHES[:2]:
        for kind, backend in [*ROWS[:3], *(MATERIALISED if batch == BATCHES[0] else [])]:
            for way in ("eager",) if backend else ("eager", "recorded"):
                what = {"fusion": kind, "backend": backend or "auto", "batch": batch, "dtype": "bfloat16 autocast",
                        "way": way}  # fmt: skip
                with rows.measuring("pretrain", 30.0 if way == "recorded" else 4.0, **what) as row:
                    if row is not None:
                        measure_step(row, kind, backend, batch, way, peak)


def measure_step(row: dict, kind: str, backend: str | None, batch: int, way: str, peak: float) -> None:
    torch.manual_seed(0)
    small = {"decoder_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2} if TOY else {}
    model = AVMAE(build(kind, torch.float32), **small).to(DEVICE).train()
    generator = torch.Generator().manual_seed(1)
    noise = [torch.rand(batch, a * b, generator=generator).to(DEVICE)
             for a, b in (model.encoder.config.image_grid, model.encoder.config.audio_grid)]  # fmt: skip
    given = [*inputs(batch, False, torch.float32), *noise]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=CUDA)
    model.encoder.compiled = way == "recorded"

    def losses(*given):
        with avfkernels.backend(backend):
            return dict(zip(("image", "audio"), model(*given, predict=False)[:2], strict=True))

    with torch.no_grad(), torch.autocast(DEVICE.type, HALF):  # of a few clips, all pairs of which fit
        few = [x[:2] for x in given]
        found = losses(*few)
        with avfkernels.backend("reference"):
            expected = model(*few, predict=False)[:2]
        row["error_norm"] = check(found.values(), expected, HALF)
    kind_of_step = RecordedStep if way == "recorded" else Step
    taking = kind_of_step(losses, model, optimizer, device=DEVICE, dtype=HALF)
    begin = time.monotonic()

    def step():
        taking.part(given, 0)
        return taking.update()

    step()
    if way == "recorded":
        row["compile_s"] = round(time.monotonic() - begin, 1)
        if not taking.recording:
            raise RuntimeError("it was not recorded")
    else:
        row["peak_MiB"] = round(measure.peak_memory(step, DEVICE) / 2**20, 1)
    row |= timing(step, 0.8)
    row["clips_per_s"] = batch / row["ms"] * 1e3
    if backend is None:
        row["matmul_share"] = step_flop(model, batch) / row["ms"] / 1e9 / peak
