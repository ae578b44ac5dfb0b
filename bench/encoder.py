"""What the table compares: ViT-B encoders (rows), the passes they run, and the proof that equal rows are equal.

    python -m bench.encoder 4 '[["full", "no fusion"], ["full", "dense, ours"]]'

measures the peak memory of passes of rows at batch 4 on the CPU, one after the other, and prints the bytes of each.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product

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
    way: str = "plain"  # "plain" | "compiled": and, in inference, recorded as a CUDA graph
    paper: dict | None = None

    @property
    def materialised(self) -> bool:
        return self.backend == "reference"

    def why_not(self, device: torch.device) -> str | None:
        """Why the row is not measured, or None."""
        # On CPUs compiling takes longer than the table, and what it fuses is little of the time.
        return "on CUDA" if self.way != "plain" and device.type != "cuda" else None


NONE, TOKEN, DENSE, FACTORIZED = (EncoderConfig(fusion=fusion) for fusion in ("none", "token", "dense", "factorized"))
LATE = replace(FACTORIZED, fusion_layers="late")  # one fusion block, in the last layer
# Fusion blocks as wide as the released AudioSet model's: queries and keys 64 wide a head, MLPs of 4 x 768.
AUDIOSET = {"fusion_attn_ratio": 1.0, "fusion_mlp_ratio": 4.0}

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
        Row("AudioSet dense, ours", replace(DENSE, **AUDIOSET)),
        Row("AudioSet factorized, ours", replace(FACTORIZED, **AUDIOSET)),
        *(
            Row(f"{name}, compiled", config, way="compiled")
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

        def run(*inputs):
            model.compiled = way == "compiled"
            return model(*inputs)

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
    weights = nn.ModuleList(models.values()).to(dtype).to_empty(device="cpu").eval()
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
    """The largest absolute difference between ours and the materialised equations in float64: two layers, one video.

    At the sizes of both released models; over the outputs of both inference passes and the gradients of all parameters
    in the training pass. NaN if any is.
    """
    configs = [replace(config, depth=2, **sizes) for config in (DENSE, FACTORIZED) for sizes in ({}, AUDIOSET)]
    models, worst = build(configs, torch.float64), []
    for config, pass_ in product(configs, PASSES):
        model = models[config]
        image, audio, *ids = pass_.inputs(config, batch=1)
        results = []
        for backend in (None, "reference"):
            with torch.set_grad_enabled(pass_.training), avfkernels.backend(backend):
                outputs = model(image.double(), audio.double(), *ids)
                gradients = torch.autograd.grad(scalar(outputs), list(model.parameters())) if pass_.training else ()
            results.append((*outputs, *gradients))
        worst += [(a - b).abs().max() for a, b in zip(*results, strict=True)]
    return torch.stack(worst).max().item()


def peak_memory_on_cpu(runs: list[tuple[str, str]], batch: int) -> dict[tuple[str, str], int]:
    """(pass, row) -> bytes above the loaded models, in a process of its own; what it did not survive is absent.

    Resident memory at its highest during the pass, minus that before it: activations and, in training, gradients.
    Weights and inputs are loaded before, and the row has run: what libraries allocate once and keep does not count.
    """
    peaks = {}
    survives = (0, -signal.SIGKILL)  # SIGKILL is how Linux ends what runs out of memory
    while runs:
        printed = measure.run_module("bench.encoder", str(batch), json.dumps(runs), survives=survives).split()
        peaks |= dict(zip(runs, map(int, printed), strict=False))
        runs = runs[len(printed) + 1 :]  # those after the one that it died in, if it did
    return peaks


def main(batch: int, runs: list[tuple[str, str]]) -> None:
    passes, models = {pass_.name: pass_ for pass_ in PASSES}, build([ROWS[name].config for _, name in runs])
    ran = set()
    for pass_, name in runs:
        row, inputs = ROWS[name], passes[pass_].inputs(ROWS[name].config, batch)
        bind = partial(passes[pass_].bind, models[row.config], backend=row.backend)
        if pass_ not in ran:  # what is allocated once grows with the input, but is the same for all rows
            bind(inputs=inputs)()
        elif name not in ran:
            bind(inputs=[x[:1] for x in inputs])()
        ran |= {pass_, name}
        print(measure.peak_memory(bind(inputs=inputs), torch.device("cpu")), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
