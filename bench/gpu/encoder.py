"""The encoder's forward pass: kinds of fusion, ways to run it, the authors' classes, launches; and ceilings."""

from __future__ import annotations

import contextlib
import sys
import time
from functools import partial

import torch

import avfkernels
from avfkernels import layer
from avfusion import DeepAVFusion
from bench import encoder, flops, measure
from bench.gpu.rows import BATCHES, CONFIGS, CUDA, DEVICE, HALF, ROOT, TOY, Rows, captured, check, timing

# Of the encoder: kind of fusion, and the backend of its ops (None: the automatic choice).
ROWS = [("none", None), ("dense", None), ("factorized", None), ("token", None)]
MATERIALISED = [("dense", "reference"), ("factorized", "reference")]
FORCED = [
    (kind, backend) for backend in (("triton", "eager") if CUDA else ("cpu",)) for kind in ("dense", "factorized")
]


def build(kind: str, dtype: torch.dtype) -> DeepAVFusion:
    return encoder.build([CONFIGS[kind]])[CONFIGS[kind]].to(DEVICE, dtype).eval()


def inputs(batch: int, masked: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    tensors = encoder.PASSES[1 if masked else 0].inputs(CONFIGS["none"], batch)
    return [x.to(DEVICE, dtype if x.is_floating_point() else x.dtype) for x in tensors]


def measure_encoder(rows: Rows, cases, batches, ways, dtype=HALF, passes=(False, True), **which) -> None:
    for batch in batches:
        for masked in passes:
            given = inputs(batch, masked, dtype)
            for kind, backend in cases:
                what = {"fusion": kind, "backend": backend or "auto", "batch": batch, "masked": masked,
                        "dtype": str(dtype)[6:], **which}  # fmt: skip
                for way in ways:
                    with rows.measuring("encoder", 15.0 if way == "captured" else 4.0, **what, way=way) as row:
                        if row is not None:
                            measure_one(row, kind, backend, given, way, dtype)


def measure_one(row: dict, kind: str, backend: str | None, given, way: str, dtype: torch.dtype) -> None:
    """A way is "eager", "graph", which is a graph of that, or "captured": compiled and recorded, as `embed` does."""
    model = build(kind, dtype)
    with torch.no_grad(), avfkernels.backend("reference"):
        expected = model.float()(*(x[:2].float() if x.is_floating_point() else x[:2] for x in given))
    model.to(dtype).compiled = way == "captured"
    begin = time.monotonic()

    def call():
        with torch.no_grad(), avfkernels.backend(backend):
            return model(*given)

    row["error_norm"] = check([out[:2] for out in call()], expected, dtype)
    if way == "captured":
        row["compile_s"] = round(time.monotonic() - begin, 1)
        if model._captured.failure is not None:
            raise model._captured.failure
    if way == "eager":
        row["peak_MiB"] = round(measure.peak_memory(call, DEVICE) / 2**20, 1)
    row |= timing(captured(call) if way == "graph" else call)
    tokens = encoder.PASSES[1 if len(given) > 2 else 0].tokens(CONFIGS[kind])
    row["flop_ratio"] = flops.layers(CONFIGS[kind], *tokens, materialised=backend == "reference") / flops.layers(
        CONFIGS["none"], *tokens, materialised=False
    )


def part_encoder(rows: Rows) -> None:
    """Goals are ratios of "captured": no fusion is compiled and recorded in the same way."""
    ceilings(rows)
    first, *others = BATCHES
    measure_encoder(rows, ROWS[:3], [first], ["eager", "captured"])
    authors(rows)
    measure_encoder(rows, ROWS[:3], others, ["captured"], passes=(False,))
    measure_encoder(rows, MATERIALISED, [first], ["eager"])
    launches(rows)
    measure_encoder(rows, ROWS[:3], others, ["eager"], passes=(False,))


def matmul_peak(rows: Rows | None = None) -> float:
    """TFLOP/s of a large product in bfloat16."""
    n = 256 if TOY else 8192
    x, w = (torch.randn(n, n, device=DEVICE, dtype=HALF) for _ in range(2))
    spread = timing(lambda: x @ w)
    rate = 2 * n**3 / spread["ms"] / 1e9
    if rows:
        rows.add("ceiling", what=f"matmul {n} x {n} x {n}", dtype="bfloat16", TFLOP_per_s=rate, **spread)
    return rate


def ceilings(rows: Rows) -> None:
    with rows.measuring("ceiling", what="copy", dtype="float32") as row:
        a = torch.randn(2**16 if TOY else 2**29, device=DEVICE)
        b = torch.empty_like(a)
        row |= timing(lambda: b.copy_(a))
        row["GB_per_s"] = 2 * a.nbytes / row["ms"] / 1e6
    matmul_peak(rows)


def launches(rows: Rows) -> None:
    """Events of one forward pass that the profiler sees: kernels on a GPU, operators on a CPU."""
    given = inputs(BATCHES[0], False, HALF)
    kinds = [torch.profiler.ProfilerActivity.CUDA if CUDA else torch.profiler.ProfilerActivity.CPU]
    for kind in ("none", "dense", "factorized"):
        with rows.measuring("launches", fusion=kind, batch=BATCHES[0], dtype="bfloat16") as row, torch.no_grad():
            model = build(kind, HALF)
            model.compiled = False
            model(*given)
            with torch.profiler.profile(activities=kinds) as profile:
                model(*given)
                torch.cuda.synchronize() if CUDA else None
            averages = profile.key_averages()
            row["launches"] = sum(event.count for event in averages)
            slowest = sorted(averages, key=lambda event: -getattr(event, "device_time_total", 0))[:8]
            row["slowest"] = {event.key[:60]: event.count for event in slowest}


def authors(rows: Rows) -> None:
    """`avfkernels.accelerate` on a stand-in with the structure of the authors' classes."""
    sys.path.insert(0, str(ROOT / "tests" / "avfkernels"))
    from bench.authors_style import Encoder

    config = CONFIGS["none"]
    shape = (config.dim, config.depth, config.num_heads, config.image_size, config.audio_size)
    for kind in ("dense", "factorized", "token"):
        given, outputs = inputs(BATCHES[0], False, HALF), []
        model = Encoder(kind, (16, 8, 8), None, *shape).to(DEVICE, HALF).eval()
        for way in ("as released", "accelerated, compile=False", "accelerated"):
            what = {"fusion": kind, "batch": BATCHES[0], "masked": False, "dtype": "bfloat16", "way": way}
            with rows.measuring("accelerate", 15.0 if way == "accelerated" else 4.0, **what) as row, torch.no_grad():
                if row is None:
                    continue
                if way != "as released":
                    restore = avfkernels.accelerate(model, compile=way == "accelerated")
                call = partial(model, *given)
                for _ in range(-(-avfkernels.CLIPS // BATCHES[0])):  # until it is compiled and recorded
                    call()
                outputs.append(call()[:3])
                row["error_norm"] = check(outputs[-1], outputs[0], HALF)
                row["peak_MiB"] = round(measure.peak_memory(call, DEVICE) / 2**20, 1)
                row |= timing(call)
                if way == "accelerated, compile=False":
                    restore()


def part_variants(rows: Rows) -> None:
    """What the release uses on AudioSet; factorized fusion by R2 and by projecting; the fusion branch beside or not."""
    first = BATCHES[:1]
    sizes = [("none", None), ("dense, AudioSet", None), ("factorized, AudioSet", None)]
    measure_encoder(rows, sizes, first, ["captured"], passes=(False,))
    for masked, least in ((False, 10**9), (True, 0)):  # what is not chosen
        with setting(layer, "ABSORB_FROM", least):
            variant = "by R2" if least == 0 else "by projecting"
            measure_encoder(rows, ROWS[2:3], first, ["captured"], passes=(masked,), variant=variant)
    with setting(layer, "FEW_ROWS", 0):
        measure_encoder(rows, ROWS[:3], first, ["captured"], passes=(True,), variant="one stream")
    measure_encoder(rows, [*ROWS[:3], *FORCED], first, ["graph"])
    measure_encoder(rows, [*ROWS[:3], *MATERIALISED], first, ["eager"], torch.float32, passes=(False,))


@contextlib.contextmanager
def setting(module, name: str, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
