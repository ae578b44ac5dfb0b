"""How the price of early fusion changes with the batch, and with longer inputs: more frames, more sound.

ViT-B, inference. Frames lie below each other in one tall picture, so that n frames are 196 n image tokens; 3 s of sound
are 96 audio tokens. (Pair attention by itself, up to 10^5 tokens a side: bench/test_growth.py.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from bench import encoder, measure
from bench.encoder import BASELINE, PASSES, ROWS, TWINS

FULL = PASSES[0]
EFFORT = measure.Effort(max_rounds=9)
KINDS = (BASELINE.name, *(name for twins in TWINS for name in twins))
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # largest relative difference of the outputs
MOST_FLOP = {"cpu": 2.5e12, "cuda": float("inf")}  # of a call, or the row is left out


@dataclass(frozen=True)
class Point:
    """One size of the input."""

    batch: int
    frames: int = 1
    seconds: int = 3

    def config(self, name: str):
        sizes = {"image_size": (224 * self.frames, 224), "audio_size": (128, 64 * self.seconds)}
        return replace(ROWS[name].config, **sizes)


POINTS = {
    "batch": {"cpu": [Point(n) for n in (1, 4, 16)], "cuda": [Point(n) for n in (1, 8, 64, 256, 512)]},
    "tokens": {
        "cpu": [Point(1, *size) for size in ((1, 3), (4, 9), (16, 30))],
        "cuda": [Point(8, *size) for size in ((1, 3), (2, 6), (4, 9), (8, 15), (16, 30))],
    },
}
TITLES = {"batch": "The batch", "tokens": "Longer clips"}


def label(curve: str, point: Point) -> str:
    if curve == "batch":
        return f"batch {point.batch}"
    image, audio = FULL.tokens(point.config(BASELINE.name))
    return f"{point.frames} frame{'s' if point.frames > 1 else ''}, {point.seconds} s ({image} + {audio} tokens)"


@torch.no_grad()
def measure_point(curve: str, point: Point, device, progress) -> tuple[list[dict], dict[str, list[float]]]:
    """The rows of one point, relative to no fusion there, and their recorded times."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    title, x = f"{TITLES[curve]}: {label(curve, point)}", point.batch if curve == "batch" else point.frames
    configs = {name: point.config(name) for name in KINDS}
    models = encoder.build(list(dict.fromkeys(configs.values())))
    for model in models.values():
        model.to(device, dtype)
    inputs = [t.to(device, dtype) for t in FULL.inputs(configs[BASELINE.name], point.batch)]
    calls, outputs, rows = {}, {}, {}
    for name in KINDS:
        progress(title, f"first pass of {name}")
        flop = FULL.flop(replace(ROWS[name], config=configs[name]))
        rows[name] = {"name": f"{label(curve, point)}: {name}", "line": name, "x": x, "flop": flop,
                      "flop_ratio": flop / rows[BASELINE.name]["flop"] if rows else 1.0}  # fmt: skip
        flop *= point.batch
        if ROWS[name].materialised and flop > MOST_FLOP[device.type]:
            rows[name]["note"] = f"left out: {flop / 1e12:.0f} TFLOP a call"
            continue
        call = FULL.bind(models[configs[name]], inputs, ROWS[name].backend)
        try:
            outputs[name] = call()
            if device.type == "cuda":
                rows[name]["peak_memory"] = measure.peak_memory(call, device)
        except torch.OutOfMemoryError:
            outputs.pop(name, None)
            rows[name]["note"] = "out of memory"
            continue
        calls[name] = call
    for ours, materialised in TWINS:
        if calls.keys() >= {ours, materialised}:
            error = encoder.difference(outputs[ours], outputs[materialised])
            assert error < TOLERANCE[dtype], f"{title}: {ours} is off by {error:.1e}"
    outputs.clear()
    times = measure.in_turns(calls, device, EFFORT, progress=lambda text: progress(title, text))
    for name, result in measure.summarise(times).items():
        rows[name] |= result | {"per_second": point.batch / result["seconds"]["median"]}
        if "peak_memory" in rows[name]:
            rows[name]["memory_ratio"] = rows[name]["peak_memory"] / rows[BASELINE.name]["peak_memory"]
    return list(rows.values()), times


@pytest.fixture(scope="module", params=[f"scaling_{curve}" for curve in POINTS])
def section(request, device, progress, publish):
    """One curve, measured whole: its name, and (row, recorded times) by the row's name."""
    name = request.param.removeprefix("scaling_")
    points, rows, recorded = POINTS[name][device.type], [], {}
    for point in points:
        made, times = measure_point(name, point, device, progress)
        rows += made
        recorded |= {row["name"]: (row, times.get(row["line"], [])) for row in made}
    publish(request.param, {
        "title": f"{TITLES[name]}: ViT-B encoder, inference",
        "batch": "as named" if name == "batch" else points[0].batch,
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "baseline": f"{BASELINE.name} at the same point",
        "x": {"batch": "batch", "tokens": "frames, with sound to match"}[name],
        "units": {"seconds": "s for a batch", "per_second": "videos/s", "peak_memory": "bytes above the model"},
        "rows": rows,
        "notes": ["Ours and materialised agree at every point where both run, checked before timing."],
    })  # fmt: skip
    return name, recorded


@pytest.mark.parametrize("row", KINDS)
@pytest.mark.parametrize("index", range(5))
def test_scaling(section, index, row, device, replay):
    name, recorded = section
    points = POINTS[name][device.type]
    if index >= len(points):
        pytest.skip(f"{len(points)} points on this device")
    point = label(name, points[index])
    replay(*recorded[f"{point}: {row}"], group=f"{TITLES[name]}: {point}")
