"""Rows of results, and how they are measured."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

import avfkernels
from avfkernels import capture, layer
from avfusion import EncoderConfig
from bench import encoder, measure

ROOT = Path(__file__).parents[2]
CUDA = torch.cuda.is_available()
TOY = os.environ.get("AVF_BENCH_TOY") == "1"
DEVICE = torch.device("cuda" if CUDA else "cpu")
HALF = torch.bfloat16
TOLERANCE = {torch.float32: 1e-3, HALF: 3e-2}  # largest relative error, by norm, against the equations in float32
BATCHES = (1,) if TOY else (64, 256, 1)
SIZES = {"dim": 64, "depth": 1, "num_heads": 4, "image_size": (64, 64), "audio_size": (32, 64)} if TOY else {}
CONFIGS = {kind: EncoderConfig(fusion=kind, **SIZES) for kind in ("none", "dense", "factorized", "token")}
# As the release trains on AudioSet: heads of the fusion attention 64 wide.
CONFIGS |= {
    f"{kind}, AudioSet": replace(CONFIGS[kind], fusion_attn_ratio=1.0, fusion_mlp_ratio=4.0)
    for kind in ("dense", "factorized")
}
if not CUDA:  # a rehearsal: what is compiled on a GPU runs as it is, and what is recorded is run again
    layer._compiled = lambda function: function
    capture.pays = avfkernels.pays = lambda device: True
    capture.record = avfkernels.record = lambda function, device: (function(), function)


class Rows:
    """The file of results. Every row says what measured it, and with which versions."""

    def __init__(self, part: str, seconds: float):
        self.deadline = time.monotonic() + seconds
        name = measure.device_name(DEVICE)
        self.path = Path(os.environ.get("OUT", ROOT / "bench" / "results")) / f"{measure.slug(name)}-gpu.jsonl"
        triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None
        made = measure.environment(DEVICE)
        self.common = {"part": part, "device": name, "commit": made["commit"], "date": made["date"],
                       "torch": torch.__version__, "triton": triton}  # fmt: skip

    def add(self, section: str, **row) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps({"section": section, **row, **self.common}) + "\n")
        print(section, *(f"{key}={value}" for key, value in row.items() if value is not None), flush=True)

    @contextlib.contextmanager
    def measuring(self, section: str, seconds: float = 4.0, **what) -> Iterator[dict | None]:
        """Around one row: yields the dictionary to fill, or None where less than `seconds` are left."""
        left = self.deadline - time.monotonic()
        if left < seconds and not TOY:
            self.add(section, **what, error=f"skipped: {left:.0f} s of this part are left")
            yield None
            return
        row = {}
        try:
            yield row
        except Exception as error:
            out = isinstance(error, torch.OutOfMemoryError)
            first, _, _ = str(error).strip().partition("\n")
            row["error"] = "out of memory" if out else f"{type(error).__name__}: {first[:300]}"
        self.add(section, **what, **row)
        if CUDA:
            torch.cuda.empty_cache()


def timing(call: Callable, budget: float = 0.4) -> dict[str, float]:
    """Median, p20 and p80 of a call in ms, of seven groups of calls."""
    for _ in range(2):
        call()
    once = measure.seconds(call, DEVICE)
    repeats = 1 if TOY else max(1, min(200, int(budget / 7 / max(once, 1e-6))))
    spread = measure.quantiles([measure.seconds(call, DEVICE, repeats) for _ in range(1 if TOY else 7)])
    return {"ms": spread["median"] * 1e3, "ms_p20": spread["p20"] * 1e3, "ms_p80": spread["p80"] * 1e3}


def captured(call: Callable) -> Callable:
    """The call as a CUDA graph; without a GPU, the call itself. What it computes stays where it was captured."""
    result, replay = capture.record(call, DEVICE)

    def run():
        replay()
        return result

    return run


def check(got, expected, dtype: torch.dtype) -> float:
    error = encoder.difference(tuple(got), tuple(expected))
    assert error < TOLERANCE[dtype], f"off by {error:.1e} from the materialised equations"
    return error
