"""A whole step of masked pre-training."""

from __future__ import annotations

from dataclasses import replace

import torch

import avfkernels
from avfusion import AVMAE
from bench import encoder, flops, measure
from bench.gpu.encoder import MATERIALISED, ROWS, build, inputs, matmul_peak
from bench.gpu.rows import BATCHES, CUDA, DEVICE, HALF, TOY, Rows, captured, check, compiled, timing


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
    """A whole step: forward under autocast, backward, fused AdamW."""
    peak = matmul_peak()
    for batch in BATCHES[:2]:
        cases = [*ROWS[:3], *(MATERIALISED if batch == BATCHES[0] else [])]
        for kind, backend in cases:
            for way in ("eager", "graph", "compiled + graph"):
                if backend and way != "eager":
                    continue
                what = {"fusion": kind, "backend": backend or "auto", "batch": batch, "dtype": "bfloat16 autocast",
                        "way": way}  # fmt: skip
                with rows.measuring("pretrain", 25.0 if "compiled" in way else 4.0, **what) as row:
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=CUDA)
    run = compiled(model) if "compiled" in way else model

    def losses(function=run, name=backend, size=batch):
        with avfkernels.backend(name), torch.autocast(DEVICE.type, HALF):
            return function(*(x[:size] for x in given), predict=False)[:2]

    with torch.no_grad():  # of a few clips, all pairs of which fit
        row["error_norm"] = check(losses(model, backend, 2), losses(model, "reference", 2), HALF)

    def step():
        optimizer.zero_grad(set_to_none=True)
        sum(losses()).backward()
        optimizer.step()

    step()
    if way == "eager":
        row["peak_MiB"] = round(measure.peak_memory(step, DEVICE) / 2**20, 1)
    row |= timing(captured(step) if "graph" in way else step, 0.8)
    row["clips_per_s"] = batch / row["ms"] * 1e3
    if backend is None:
        row["matmul_share"] = step_flop(model, batch) / row["ms"] / 1e9 / peak
