"""Losses of training in plain and in fused layers, on top of each other: `python -m bench.curves [--steps 50]`.

A small encoder is pre-trained on synthetic clips from the same weights, once in plain layers and once in fused ones,
compiled, as on a GPU (and there recorded as CUDA graphs). Writes bench/results/curves-<device>.json and .png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from avfusion.tasks.pretrain import PRESETS, Pretrain, PretrainConfig
from avfusion.training.optim import set_rate
from avfusion.training.step import RecordedStep, Step
from bench import measure
from bench.report import COLOURS, GRID, INK

FUSIONS = ("dense", "factorized")
WAYS = ("plain", "fused")


def losses(config: PretrainConfig, steps: int, way: str) -> list[float]:
    """The sum of both losses, a step each."""
    task, device = Pretrain(config), measure.DEVICE
    loader = task.loader(task.open(make=True), config.optim.batch_size, train=True)
    torch.manual_seed(config.optim.seed)
    model = task.build().to(device).train()
    model.encoder.compiled = way == "fused"
    optimizer = task.optimizer(model)
    kind = RecordedStep if way == "fused" and device.type == "cuda" else Step
    taking = kind(partial(task.losses, model), model, optimizer, device=device, dtype=torch.float32)
    found, batches, epoch = [], iter(loader), 0
    for step in range(steps):
        batch = next(batches, None)
        if batch is None:
            epoch += 1
            loader.epoch, loader.consumed = epoch, 0
            batches = iter(loader)
            batch = next(batches)
        set_rate(optimizer, config.optim.blr * config.optim.batch_size / 256, step, steps, steps // 5)
        taking.part(task.prepare(batch, epoch, device), 0)
        *values, _ = taking.update()()
        found.append(sum(values[: len(taking.names)]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.curves", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("bench/results"), help="default: %(default)s")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    curves = {}
    with tempfile.TemporaryDirectory() as clips:
        for fusion in FUSIONS:
            for way in WAYS:
                changes = {"data": f"{clips}/set", "synth_clips": 200, "workers": 0, "fusion": fusion}
                config = PretrainConfig.of(**PRESETS["tiny"] | changes)
                curves[f"{fusion}, {way}"] = losses(config, args.steps, way)
                print(f"{fusion}, {way}: {curves[f'{fusion}, {way}'][0]:.6f} -> {curves[f'{fusion}, {way}'][-1]:.6f}")
    apart = {
        fusion: max(abs(a / b - 1) for a, b in zip(*(curves[f"{fusion}, {way}"] for way in WAYS), strict=True))
        for fusion in FUSIONS
    }
    path = args.folder / f"curves-{measure.slug(measure.device_name(measure.DEVICE))}.json"
    facts = {"command": f"python -m bench.curves --steps {args.steps}", "dtype": "float32", "batch": config.batch_size,
             "device": measure.device_name(measure.DEVICE), "largest_relative_difference": apart}  # fmt: skip
    path.write_text(json.dumps(facts | measure.environment(measure.DEVICE) | {"losses": curves}, indent=1) + "\n")
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, fusion in zip(figure.subplots(1, 2, sharey=True), FUSIONS, strict=True):
        axes.plot(curves[f"{fusion}, plain"], color=COLOURS["materialised"], linewidth=4, alpha=0.5, label="plain")
        axes.plot(curves[f"{fusion}, fused"], color=COLOURS["ours"], linewidth=1.2, label="fused, compiled")
        axes.set_title(f"{fusion}: at most {apart[fusion]:.0e} apart", loc="left", fontsize=10, color=INK)
        axes.set_xlabel("step", color=INK)
        axes.grid(color=GRID)
        axes.legend(frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=130, facecolor="white", metadata={"Software": None})
    print(path)


if __name__ == "__main__":
    main()
