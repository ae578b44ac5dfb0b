"""Pictures: what the fusion tokens look at, what masked modelling reconstructs, how losses fall and scores rise."""

import math
import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import BinaryIO

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image
from torch import Tensor

from avfusion.files import writing
from avfusion.media.clip import Clip
from avfusion.media.transforms import IMAGENET_MEAN, IMAGENET_STD

SPECTROGRAM, ATTENTION = "magma", "inferno"  # both perceptually uniform
TOKENS = 8  # fusion tokens shown one by one
TITLE_WIDTH = 24  # letters above a frame of `plot_clips`
GREY, LINES = "#808080", ("#3a87c8", "#d9651d", "#3a9a58", "#a05dbf", "#c9348f", "#8c7a31")  # on white and on black


def plot_clip(
    path: str | os.PathLike,
    clip: Clip,
    image: Tensor,
    spectrogram: Tensor,
    attention_image: Tensor | None = None,
    attention_audio: Tensor | None = None,
    *,
    note: str = "",
) -> None:
    """Draw one clip, and where its fusion tokens attend, into an image file (PNG, PDF or SVG by `path`'s suffix).

    Args:
        clip: names the clip and places the window and the frame in time.
        image: the model's input [3, H, W], ImageNet-normalised.
        spectrogram: the model's input [mels, frames], log10 of power, as `LogMel` makes it.
        attention_image: [heads, tokens, patches] over image patches, row by row; one layer of `attention_maps`.
        attention_audio: likewise over spectrogram patches, lowest frequencies first. Without the two (a model without
            fusion) only the inputs are drawn.
        note: shown beside the title: which weights, which layer.

    Attention is averaged over heads (and, in the large panels, over tokens) and given relative to uniform attention:
    1 means that a patch gets its even share.
    """
    image, spectrogram = pixels(image), spectrogram.float().cpu()
    span = (clip.start, clip.start + spectrogram.shape[1] / 64)  # LogMel makes 64 frames a second

    fused = attention_image is not None and attention_audio is not None
    figure = Figure(figsize=(15, 6.9) if fused else (9, 3.6), dpi=110, layout="constrained")
    figure.suptitle(Path(clip.path).name, x=0.01, ha="left", fontsize=14, fontweight="bold", parse_math=False)
    figure.text(0.99, 0.98, note, ha="right", va="top", fontsize=11, color="0.35", parse_math=False)
    rows = figure.add_gridspec(3 if fused else 1, 1, height_ratios=[3.1, 1.75, 1.15] if fused else None)
    large = rows[0].subgridspec(1, 4 if fused else 2, width_ratios=[1.12, 1.11, 1.5, 1.45] if fused else [1, 1.7])

    frame_panel, sound_panel = figure.add_subplot(large[0]), figure.add_subplot(large[2 if fused else 1])
    frame_panel.imshow(image.numpy())
    _bare(frame_panel, f"frame at {clip.frame_time:.2f} s")
    decibels = 10 * spectrogram
    shades = _spectrogram(sound_panel, decibels, span, SPECTROGRAM)
    _time_and_pitch(sound_panel, spectrogram.shape, clip)
    sound_panel.set_title("log-mel spectrogram", fontsize=10)
    figure.colorbar(shades, ax=sound_panel, label="dB", pad=0.02)
    if fused:
        gray = (image @ torch.tensor([0.299, 0.587, 0.114])).numpy()
        patch = math.isqrt(spectrogram.numel() // attention_audio.shape[-1])
        over_image = _relative(attention_image, [side // patch for side in image.shape[:2]])
        over_audio = _relative(attention_audio, [side // patch for side in spectrogram.shape])

        panel = figure.add_subplot(large[1])
        panel.imshow(gray, cmap="gray", extent=(0, 1, 0, 1))
        heat = _heat(panel, over_image.mean(0), (0, 1, 0, 1), "upper")
        _bare(panel, "attention over the frame")
        figure.colorbar(heat, ax=panel, label="× uniform", pad=0.02, shrink=0.8)

        panel = figure.add_subplot(large[3])
        _spectrogram(panel, decibels, span, "gray")
        heat = _heat(panel, over_audio.mean(0), _extent(spectrogram, span), "lower")
        _time_and_pitch(panel, spectrogram.shape, clip)
        panel.set_title("attention over the spectrogram", fontsize=10)
        figure.colorbar(heat, ax=panel, label="× uniform", pad=0.02)

        shown = min(TOKENS, len(over_image))
        seen, heard = rows[1].subgridspec(1, shown), rows[2].subgridspec(1, shown)
        for token in range(shown):
            panel = figure.add_subplot(seen[token])
            panel.imshow(gray, cmap="gray", extent=(0, 1, 0, 1))
            _heat(panel, over_image[token], (0, 1, 0, 1), "upper", over_image[:shown])
            _bare(panel, f"fusion token {token}")
            panel = figure.add_subplot(heard[token])
            _spectrogram(panel, decibels, span, "gray")
            _heat(panel, over_audio[token], _extent(spectrogram, span), "lower", over_audio[:shown])
            _bare(panel)
    _save(figure, path)


QUANTITIES = {  # what a score is, by how its name begins or what is in it
    "dB": ("SDR", "SIR", "SAR"),
    "rank": ("median_rank",),
    "d prime": ("d_prime",),
    "": ("left_out",),  # counts of classes, which are not drawn
}


def quantity(name: str) -> str:
    """What a score is: the label of its axis."""
    return next((kind for kind, parts in QUANTITIES.items() if any(part in name for part in parts)), "share")


def families(names: Iterable[str]) -> dict[str, list[str]]:
    """Scores that share a plot: those whose names begin alike ("top-1", "top-1 image"), and the rest of a kind."""
    scores = [name for name in names if quantity(name)]
    firsts = Counter(name.split()[0] for name in scores)
    found: dict[str, list[str]] = {}
    for name in scores:
        first = name.split()[0]
        found.setdefault(first if firsts[first] > 1 else quantity(name), []).append(name)
    return found


def plot_lines(
    file: str | os.PathLike | BinaryIO, x: Sequence[float], lines: dict[str, list[float]], *, xlabel: str, ylabel: str
) -> None:
    """Draw lines over `x` to an SVG file, in colours that can be read on white and on black; NaN leaves a gap."""
    with rc_context({"text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY,
                     "ytick.color": GREY, "svg.hashsalt": "avfusion"}):  # fmt: skip
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        panel = figure.subplots()
        for (name, values), colour in zip(lines.items(), cycle(LINES), strict=False):
            style = {"linestyle": ":", "color": GREY} if "chance" in name else {"color": colour}
            panel.plot(x, values, label=name, marker="o" if len(x) < 40 else None, markersize=3, **style)
        panel.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if ylabel == "rank" else "linear")
        if ylabel == "dB":  # a mixture as it is has no artefacts: its SAR of 140 would flatten the rest
            panel.set_ylim(top=min(panel.get_ylim()[1], 50))
        panel.grid(alpha=0.3)
        columns = max(1, min(3, 80 // (max(map(len, lines), default=0) + 8)))  # no wider than the panel
        panel.legend(frameon=False, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1), columnspacing=1.2)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})


def plot_clips(
    path: str | os.PathLike,
    image: Tensor,
    audio: Tensor,
    titles: Sequence[str],
    maps: dict[str, Tensor] | None = None,
    sounds: dict[str, Tensor] | None = None,
) -> None:
    """Draw a row a clip: frame, spectrogram, `maps` [B, h, w] over the frame, and more spectrograms `sounds`.

    image [B, 3, H, W] and audio [B, 1, mels, frames] are inputs of the model; `sounds` [B, mels, frames] are log10 of
    power like it.
    """
    maps, sounds = maps or {}, {"sound": audio[:, 0]} | (sounds or {})
    width = audio.shape[-1] / audio.shape[-2]
    widths = [1] * (1 + len(maps)) + [width] * len(sounds)
    figure = Figure(figsize=(1.9 * sum(widths), 2.3 * len(image)), dpi=110, layout="constrained")
    rows = figure.subplots(len(image), len(widths), squeeze=False, width_ratios=widths)
    for clip, (panels, title) in enumerate(zip(rows, titles, strict=True)):
        frame, top = pixels(image[clip]).numpy(), 10 * audio[clip].max().item()
        panels[0].imshow(frame)
        _bare(panels[0], "\n".join(line for text in title.split("\n") for line in textwrap.wrap(text, TITLE_WIDTH)))
        for panel, (name, values) in zip(panels[1:], maps.items(), strict=False):
            panel.imshow(frame)
            panel.imshow(values[clip].float().cpu().numpy(), cmap="inferno", alpha=0.55, interpolation="bilinear",
                         extent=(-0.5, frame.shape[1] - 0.5, frame.shape[0] - 0.5, -0.5))  # fmt: skip
            _bare(panel, name if clip == 0 else "")
        for panel, (name, values) in zip(panels[1 + len(maps) :], sounds.items(), strict=True):
            decibels = 10 * values[clip].float().cpu().numpy()
            panel.imshow(decibels, cmap=SPECTROGRAM, vmin=top - 80, vmax=top, origin="lower", aspect="auto")
            _bare(panel, name if clip == 0 else "")
    _save(figure, path)


def plot_overlay(path: str | os.PathLike, frame: Image.Image, values: Tensor) -> None:
    """Draw a map [rows, columns] over the whole of a frame."""
    figure = Figure(figsize=(4.8 * frame.width / frame.height, 4.8), dpi=110)
    panel = figure.add_axes((0, 0, 1, 1))
    panel.imshow(frame)
    panel.imshow(values.float().cpu().numpy(), cmap=ATTENTION, alpha=0.5, interpolation="bilinear",
                 extent=(-0.5, frame.width - 0.5, frame.height - 0.5, -0.5))  # fmt: skip
    panel.set_axis_off()
    _save(figure, path)


def _save(figure: Figure, path: str | os.PathLike) -> None:
    with writing(path) as part:
        figure.savefig(part, format="png")


def plot_reconstructions(path: str | os.PathLike, *shown: Tensor) -> None:
    """Draw the outputs of `AVMAE.reconstruct`, a row a clip: input, masked and reconstructed frame and spectrogram.

    `shown` are three images [B, 3, H, W], ImageNet-normalised, and three spectrograms [B, 1, mels, frames], log10 of
    power; NaN, where a patch is hidden, is left grey.
    """
    images, sounds = shown[:3], shown[3:]
    count, width = len(images[0]), sounds[0].shape[-1] / sounds[0].shape[-2]
    figure = Figure(figsize=(3 * (1.6 + 1.6 * width), 1.7 * count + 0.3), dpi=110, layout="constrained")
    panels = figure.subplots(count, 6, squeeze=False, width_ratios=[1] * 3 + [width] * 3)
    titles = ("frame", "masked", "reconstructed", "spectrogram", "masked", "reconstructed")
    for clip, row in enumerate(panels):
        decibels = [10 * sound[clip, 0].float().cpu() for sound in sounds]
        top = decibels[0].max().item()
        for number, panel in enumerate(row):
            panel.set_facecolor("0.75")
            if number < 3:
                picture = pixels(images[number][clip])
                panel.imshow(torch.cat((picture.nan_to_num(), (~picture[..., :1].isnan()).float()), dim=-1).numpy())
            else:
                panel.imshow(decibels[number - 3].numpy(), cmap=SPECTROGRAM, vmin=top - 80, vmax=top, origin="lower")
            _bare(panel, titles[number] if clip == 0 else "")
    _save(figure, path)


def pixels(image: Tensor) -> Tensor:
    """[3, H, W], ImageNet-normalised -> [H, W, 3] in [0, 1]."""
    deviation, mean = (torch.tensor(x)[:, None, None] for x in (IMAGENET_STD, IMAGENET_MEAN))
    return (image.float().cpu() * deviation + mean).clamp(0, 1).permute(1, 2, 0)


def _relative(attention: Tensor, grid: list[int]) -> Tensor:
    """[heads, tokens, patches] -> [tokens, rows, columns], mean over heads, 1 where attention is uniform."""
    mean = attention.float().cpu().mean(0)
    return (mean * mean.shape[-1]).unflatten(-1, grid)


def _extent(spectrogram: Tensor, span: tuple[float, float]) -> tuple[float, float, float, float]:
    return (*span, -0.5, len(spectrogram) - 0.5)


def _spectrogram(panel: Axes, decibels: Tensor, span: tuple[float, float], cmap: str) -> AxesImage:
    top = decibels.max().item()
    return panel.imshow(
        decibels.numpy(), cmap=cmap, vmin=top - 80, vmax=top,
        origin="lower", extent=_extent(decibels, span), aspect="auto",
    )  # fmt: skip


def _heat(panel: Axes, attention: Tensor, extent: tuple, origin: str, scale: Tensor | None = None) -> ScalarMappable:
    """Lay a patch grid, smoothly enlarged, over what is already drawn; small panels share the range of `scale`."""
    scale = attention if scale is None else scale
    smooth = torch.nn.functional.interpolate(attention[None, None], scale_factor=16, mode="bicubic")[0, 0]
    low, high = scale.min().item(), scale.max().item()
    alpha = 0.35 + 0.5 * ((smooth - low) / (high - low + 1e-12)).clamp(0, 1)
    shades = ScalarMappable(Normalize(low, high), ATTENTION)  # opaque, for a colourbar that can be read
    panel.imshow(
        smooth.numpy(), cmap=ATTENTION, norm=shades.norm, alpha=alpha.numpy(),
        origin=origin, extent=extent, aspect=panel.get_aspect(),
    )  # fmt: skip
    return shades


def _bare(panel: Axes, title: str = "") -> None:
    panel.set(xticks=[], yticks=[])
    panel.set_title(title, fontsize=10, parse_math=False)


def _time_and_pitch(panel: Axes, shape: tuple[int, int], clip: Clip) -> None:
    """Seconds along x, Hz along the mel-spaced y; a dotted line where the frame was taken."""
    mels, frames = shape
    top = clip.waveform.shape[-1] * 64 / frames / 2  # Nyquist frequency

    def mel(hz: float) -> float:
        return math.log10(1 + hz / 700)

    hertz = [f for f in (250, 500, 1000, 2000, 4000, 8000, 16000) if f <= top]
    panel.set_yticks([mel(f) / mel(top) * (mels + 1) - 1 for f in hertz], [f"{f:,}" for f in hertz])
    panel.set(xlabel="time (s)", ylabel="frequency (Hz)")
    panel.axvline(clip.frame_time, color="white", linewidth=1, linestyle=":")
