"""An encoder as a program that runs where this package is not: by torch.export, or ONNX."""

import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfusion.files import writing
from avfusion.media.transforms import LogMel, normalize
from avfusion.models.deepavfusion import DeepAVFusion

INPUTS, OUTPUTS = ("pixels", "waveform"), ("x_image", "x_audio", "x_fusion", "pooled")
TOLERANCE = 1e-4  # by norm
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}


class Spectrogram(nn.Module):
    """`LogMel`, waveform [B, samples] -> [B, 1, n_mels, frames], as a product with a Fourier basis in float64.

    onnxruntime's own transform is off by 1e-3, after the logarithm, where bands are silent.
    """

    def __init__(self, mel: LogMel):
        super().__init__()
        self.n_fft, self.hop = mel.n_fft, mel.hop
        turns = torch.outer(torch.arange(mel.n_fft), torch.arange(mel.n_fft // 2 + 1)).double() / mel.n_fft
        angles = 2 * torch.pi * turns
        basis = torch.cat([angles.cos(), angles.sin()], 1) * mel.window.double()[:, None]
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("fbanks", mel.fbanks.double(), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        padded = F.pad(waveform.double()[:, None], (self.n_fft // 2, self.n_fft // 2), mode="reflect")
        real, imaginary = (padded.unfold(-1, self.n_fft, self.hop) @ self.basis).chunk(2, -1)
        mel = (real**2 + imaginary**2) @ self.fbanks
        return torch.log10(mel[:, :, : waveform.shape[-1] // self.hop] + 1e-7).mT.float()


class Program(nn.Module):
    """Pre-processing and encoder: `pixels` [B, 3, H, W] uint8, `waveform` [B, samples] float32 -> features.

    The pixels are of the upright RGB frame, its short side scaled to 8/7 of the picture's (256 pixels, bilinear with
    antialiasing), and its centre cut out; the waveform is mono, at 16 kHz, in [-1, 1], as long as the model's window.

    Returns `x_image`, `x_audio`, `x_fusion` [B, tokens, D], and `pooled` [B, 3, D], the means over their tokens.
    """

    def __init__(self, encoder: DeepAVFusion):
        super().__init__()
        self.encoder, self.mel = encoder, Spectrogram(LogMel(n_mels=encoder.config.audio_size[0]))

    def forward(self, pixels: Tensor, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = self.encoder(normalize(pixels), self.mel(waveform))
        return (*x, pooled(x))


def pooled(x: Sequence[Tensor]) -> Tensor:
    """[B, 3, D]: means over the image, the audio and the fusion tokens."""
    return torch.stack([tokens.mean(1) for tokens in x], 1)


def missing_packages(kind: str) -> list[str]:
    """What an export of this kind, and its check, need that is not installed."""
    return [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None] if kind == "onnx" else []


def export_program(encoder: DeepAVFusion, out: Path, kind: str, clip: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Write an encoder, on the CPU, as one program with a dynamic batch, by `Program`; returns how far it is off.

    Args:
        kind: "onnx" or "torch-export".
        clip: pixels [3, H, W] and waveform [samples]. The file is loaded and run on one and on three of it: by
            onnxruntime, or torch. Per output, the norm of the difference to the encoder over the norm.

    Raises RuntimeError, and writes nothing, where it is off by more than `TOLERANCE`.
    """
    program, batches = Program(encoder).eval(), [_batch(clip, 3), _batch(clip, 1)]
    mel = LogMel(n_mels=encoder.config.audio_size[0])
    batch = torch.export.Dim("B")
    dynamic = ({0: batch}, {0: batch})
    with writing(out) as part, torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"program{SUFFIXES[kind]}")  # whose suffix those who read it want
        if kind == "onnx":
            torch.onnx.export(program, batches[0], dynamo=True, dynamic_shapes=dynamic, input_names=INPUTS,
                              output_names=OUTPUTS, verbose=False).save(path, external_data=False)  # fmt: skip
            run = _onnx(path)
        else:
            torch.export.save(torch.export.export(program, batches[0], dynamic_shapes=dynamic), path)
            run = torch.export.load(path).module()
        off = dict.fromkeys(OUTPUTS, 0.0)
        for inputs in batches:
            expected = encoder(normalize(inputs[0]), mel(inputs[1][:, None]))
            for name, own, x in zip(OUTPUTS, run(*inputs), (*expected, pooled(expected)), strict=True):
                off[name] = max(off[name], ((own - x).norm() / x.norm()).item())
        if not max(off.values()) <= TOLERANCE:
            raise RuntimeError(f"{out}: not written: on the clip it differs from the encoder by {off}")
        part.write_bytes(path.read_bytes())
    return off


def _batch(clip: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Copies of a clip that differ: its mirror image, softer."""
    pixels, waveform = clip
    return (torch.stack([pixels.flip(-1) if n % 2 else pixels for n in range(count)]),
            torch.stack([waveform * 0.5**n for n in range(count)]))  # fmt: skip


def _onnx(path: Path) -> Callable[..., Sequence[Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> list[Tensor]:
        given: dict[str, np.ndarray] = {name: x.numpy() for name, x in zip(INPUTS, inputs, strict=True)}
        return [torch.from_numpy(out) for out in session.run(None, given)]

    return run
