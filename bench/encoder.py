"""What the table compares: ViT-B encoders (rows), the passes they run, and the proof that equal rows are equal.

    python -m bench.encoder "dense, ours" 4 full masked

measures the peak memory of a row at batch 4 on the CPU, in a process of its own, and prints a JSON line for each pass.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

import avfkernels
from avfusion import DeepAVFusion, EncoderConfig
from bench import flops, measure


@dataclass(frozen=True)
class Row:
    """An encoder and how it runs; `paper` is what Table 6 of the paper says of it, on its own hardware."""

    name: str
    config: EncoderConfig
    backend: str | None = None  # None: the automatic choice
    way: str = "plain"  # "plain" | "compiled" | "graphs"
    paper: dict | None = None

    @property
    def materialised(self) -> bool:
        return self.backend == "reference"

    def why_not(self, device: torch.device, *, training: bool) -> str | None:
        """Why the row is not measured, or None."""
        if self.way != "plain" and device.type != "cuda":
            return "on CUDA"  # on CPUs compiling takes longer than the table, and what it fuses is little of the time
        return "inference only" if self.way == "graphs" and training else None


NONE, TOKEN, DENSE, FACTORIZED = (EncoderConfig(fusion=fusion) for fusion in ("none", "token", "dense", "factorized"))
LATE = replace(FACTORIZED, fusion_layers="late")  # one fusion block, in the last layer

ROWS = {
    row.name: row
    for row in (
        Row("no fusion", NONE, paper={"per_second": 14.5, "memory_gb": 10.3}),
        Row("late", LATE),
        Row("token", TOKEN),
        Row("dense, materialised", DENSE, "reference", paper={"per_second": 4.3, "memory_gb": 31.6}),
        Row("factorized, materialised", FACTORIZED, "reference", paper={"per_second": 12.8, "memory_gb": 13.1}),
        Row("dense, eager", DENSE, "eager"),
        Row("factorized, eager", FACTORIZED, "eager"),
        Row("dense, ours", DENSE),
        Row("factorized, ours", FACTORIZED),
        *(
            Row(f"{name}, {way}", config, way=way)
            for way in ("compiled", "graphs")
            for name, config in (("no fusion", NONE), ("dense", DENSE), ("factorized", FACTORIZED))
        ),
    )
}
BASELINE = ROWS["no fusion"]
# Rows that compute the same function.
TWINS = (("dense, ours", "dense, materialised"), ("factorized, ours", "factorized, materialised"))


@dataclass(frozen=True)
class Pass:
    """One way of running an encoder; a table of results each."""

    name: str
    title: str
    masked: bool = False
    training: bool = False

    def tokens(self, config: EncoderConfig) -> tuple[int, int]:
        """Image and audio patches that an encoder sees: 196 + 96, or 49 + 19 with 75 % and 80 % hidden."""
        n_image, n_audio = (rows * columns for rows, columns in (config.image_grid, config.audio_grid))
        return (n_image // 4, n_audio // 5) if self.masked else (n_image, n_audio)

    def flop(self, row: Row) -> int:
        """FLOP of one video through the layers; the backward pass counts twice the forward one."""
        forward = flops.layers(row.config, *self.tokens(row.config), materialised=row.materialised)
        return 3 * forward if self.training else forward

    def inputs(self, config: EncoderConfig, batch: int) -> list[Tensor]:
        """A seeded batch: image, audio and, if masked, the ids of the visible patches."""
        generator = torch.Generator().manual_seed(0)
        inputs = [
            torch.randn(batch, 3, *config.image_size, generator=generator),
            torch.randn(batch, 1, *config.audio_size, generator=generator),
        ]
        if self.masked:
            for (rows, columns), keep in zip((config.image_grid, config.audio_grid), self.tokens(config), strict=True):
                inputs.append(torch.rand(batch, rows * columns, generator=generator).argsort(1)[:, :keep])
        return inputs

    def bind(
        self, model: DeepAVFusion, inputs: list[Tensor], backend: str | None, way: str = "plain"
    ) -> Callable[[], tuple[Tensor, ...]]:
        """A call without arguments that runs the pass and returns the encoder's three outputs."""
        run = model
        if way == "compiled":
            run = torch.compile(model, dynamic=False)
        elif way == "graphs":
            run = model.graphed(*inputs)

        def infer():
            with torch.inference_mode(), avfkernels.backend(backend):
                return run(*inputs)

        def train():
            with avfkernels.backend(backend):
                try:
                    with torch.autocast("cuda", torch.bfloat16, enabled=inputs[0].is_cuda):
                        outputs = run(*inputs)
                    scalar(outputs).backward()
                finally:
                    model.zero_grad()
            return tuple(output.detach() for output in outputs)

        return train if self.training else infer


PASSES = (
    Pass("full", "ViT-B encoder, inference, all 196 + 96 tokens"),
    Pass("masked", "ViT-B encoder, inference on masked input, 49 + 19 visible tokens", masked=True),
    Pass("training", "ViT-B encoder, forward and backward on masked input, 49 + 19 visible tokens", True, True),
)


def scalar(outputs: tuple[Tensor, ...]) -> Tensor:
    """Something to differentiate: every second feature (all of them sum to a constant after a LayerNorm)."""
    return sum(output[..., ::2].sum() for output in outputs)


def build(configs: list[EncoderConfig], dtype: torch.dtype = torch.float32) -> dict[EncoderConfig, DeepAVFusion]:
    """Models that share their ViTs. Every tensor is random (and seeded), so that equality is about all of them."""
    with torch.device("meta"):  # random values cost time: none are drawn for ViTs that are not kept
        models = {config: DeepAVFusion(config) for config in configs}
    first, *others = models.values()
    for model in others:
        model.image, model.audio = first.image, first.audio
    weights = nn.ModuleList(models.values()).to(dtype).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in chain(weights.named_parameters(), weights.named_buffers()):
            tensor.normal_(std=0.04, generator=generator)
            if "norm" in name and name.endswith("weight"):
                tensor.add_(1)
    return models


def difference(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest relative difference, in the Euclidean norm, among corresponding tensors; NaN if there is a NaN."""
    pairs = zip(actual, expected, strict=True)
    return torch.stack([(a.double() - e.double()).norm() / e.double().norm() for a, e in pairs]).max().item()


def exactness() -> float:
    """The largest absolute difference between twins in float64: two layers of full width, one video.

    Over the outputs of both inference passes and the gradients of all parameters in the training pass. NaN if any is.
    """
    worst = []
    for twins in TWINS:
        ours, materialised = (ROWS[name] for name in twins)
        config = replace(ours.config, depth=2)
        model = build([config], torch.float64)[config]
        for pass_ in PASSES:
            image, audio, *ids = pass_.inputs(config, batch=1)
            results = []
            for row in (ours, materialised):
                with torch.set_grad_enabled(pass_.training), avfkernels.backend(row.backend):
                    outputs = model(image.double(), audio.double(), *ids)
                    gradients = torch.autograd.grad(scalar(outputs), list(model.parameters())) if pass_.training else ()
                results.append((*outputs, *gradients))
            worst += [(a - b).abs().max() for a, b in zip(*results, strict=True)]
    return torch.stack(worst).max().item()


def peak_memory_on_cpu(row: Row, batch: int) -> dict[str, int]:
    """Pass -> bytes above the loaded model, measured in a process of its own; a pass that it did not survive is absent.

    Resident memory at its highest during the pass, minus that before it: activations and, in training, gradients.
    Weights and inputs are loaded before, and a pass on the automatic backend has been run: buffers that libraries
    allocate once and keep do not count.
    """
    peaks, names = {}, [pass_.name for pass_ in PASSES]
    while names:
        done = subprocess.run(
            [sys.executable, "-m", "bench.encoder", row.name, str(batch), *names],
            cwd=Path(__file__).parent.parent,
            env=os.environ | measure.MALLOC_RETURNS_MEMORY,
            capture_output=True,
            text=True,
        )
        if done.returncode not in (0, -signal.SIGKILL):  # SIGKILL is how Linux ends what runs out of memory
            raise RuntimeError(f"measuring the memory of {row.name!r} failed:\n{done.stderr}")
        measured = dict(json.loads(line) for line in done.stdout.splitlines())
        peaks |= measured
        names = names[len(measured) + 1 :]  # those after the pass that it died in, if it did
    return peaks


def main(name: str, batch: int, passes: list[str]) -> None:
    row = ROWS[name]
    model = build([row.config])[row.config]
    for pass_ in PASSES:
        if pass_.name in passes:
            inputs = pass_.inputs(row.config, batch)
            pass_.bind(model, inputs, None)()
            call = pass_.bind(model, inputs, row.backend)
            print(json.dumps([pass_.name, measure.peak_memory(call, torch.device("cpu"))]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
