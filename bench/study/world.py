"""The study's data: moments of synthetic scenes, drawn and rendered once a seed, kept as uint8 tensors.

A moment is a picture of 48 x 48 pixels and the second of sound around it, as 32 mel bands x 64 frames. Three kinds:

    class        a close-up of two objects, one of which sounds; the label says which class sounds
    conjunction  one object; label = (look + timbre) mod classes, of which neither tells anything; the sum of what both
                 tell that fits best is constant, though one that is chosen for its accuracy can be right in 11 of 16
    synchrony    two look-alikes; one plays, the other moves in its pauses; the label says on which side the sound is

Of a moment of synchrony the picture tells which of the two is lit, and the sound whether it is loud: left or right is
the exclusive or of the two. Three moments of four are loud, so that the picture alone is right in 75 % and no sum is in
more; with as many quiet ones as loud ones neither is in more than 50 %, and no encoder of this size begins to learn.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from avfusion.files import writing
from avfusion.media.transforms import LogMel, normalize
from avfusion.synth.render import render_frames, render_sources
from avfusion.synth.scene import Scene, Settings, draw_scene
from avfusion.synth.timbres import RATE

SIZE, MELS, FRAMES, PATCH = 48, 32, 64, 8
PATCHES = (SIZE // PATCH) ** 2, MELS * FRAMES // PATCH**2  # 36 of a picture, 32 of a sound
SECONDS = 3.0  # of a scene
LOUD = 4  # synchrony: every so many-th moment is quiet
CLASSES = {"class": 12, "conjunction": 4, "synchrony": 2}
LOOKS = {"class": 12, "conjunction": 4, "synchrony": 2}  # and timbres
# Moments of each kind; train, which has labels, is a part of pretrain. From 768 labels no reader tells synchrony better
# than by the picture; from four times as many some do.
HELD = {"val": 256, "test": 512}
WORLDS = {
    "mixed": {
        "class": {"pretrain": 1024, "train": 512} | HELD,
        "conjunction": {"pretrain": 768, "train": 768} | HELD,
        "synchrony": {"pretrain": 768, "train": 768} | HELD,
    },
    "synchrony": {"synchrony": {"pretrain": 3072, "train": 3072} | HELD},
}
LOUDEST, QUIETEST = 2.5, -7.0  # of log10 mel power


class Moments(NamedTuple):
    """Some moments of one kind. `sounding` and `silent` are the shares of each patch that the objects cover."""

    image: Tensor  # uint8 [N, 3, 48, 48]
    audio: Tensor  # uint8 [N, 1, 32, 64]
    label: Tensor  # uint8 [N]
    look: Tensor  # of what sounds
    timbre: Tensor
    other: Tensor  # look of what is silent
    sounding: Tensor  # uint8 [N, 36], of 255
    silent: Tensor

    def take(self, index: Tensor | slice) -> Moments:
        return Moments(*(x[index] for x in self))

    def to(self, device: torch.device) -> Moments:
        return Moments(*(x.to(device) for x in self))


def inputs(moments: Moments) -> tuple[Tensor, Tensor]:
    """What an encoder takes: normalised pictures and log10 mel power, float32."""
    return normalize(moments.image), moments.audio.float() / 255 * (LOUDEST - QUIETEST) + QUIETEST


def spectrogram(waveform: np.ndarray) -> Tensor:
    """int16 [samples] -> uint8 [1, 32, 64]."""
    mel = LogMel(n_mels=MELS)(torch.from_numpy(waveform).float() / 32768)
    return quantized(mel[None, :, :FRAMES])


def quantized(mel: Tensor) -> Tensor:
    return ((mel - QUIETEST) / (LOUDEST - QUIETEST) * 255).round().clamp(0, 255).to(torch.uint8)


def scene(kind: str, seed: int, index: int) -> Scene:
    task = "classes" if kind == "class" else kind
    settings = Settings(task=task, classes=LOOKS[kind], seed=seed, seconds=SECONDS)
    return draw_scene(settings, index, close=kind == "class")


def moment_of(drawn: Scene, seed: int, index: int) -> float:
    """The time nearest to the middle when what sounds is fully on, or off; the moment's number decides which."""
    times = np.arange(0.5, SECONDS - 0.5, 0.02)
    (heard,) = (actor for actor in drawn.actors if actor.sounding)
    level = heard.drive(times)
    quiet = np.random.default_rng([seed, index, 7]).integers(LOUD) == 0
    good = level < 0.15 if quiet else level > 0.85
    return float(min(times[good], key=lambda time: abs(time - SECONDS / 2)))


def moment(kind: str, seed: int, index: int) -> list[Tensor]:
    """One moment, its tensors in the order of `Moments`."""
    drawn = scene(kind, seed, index)
    time = moment_of(drawn, seed, index) if kind == "synchrony" else SECONDS / 2
    frames, masks = render_frames(drawn, SIZE, np.array([time]))
    sound = render_sources(drawn).sum(0, dtype=np.int16)[round((time - 0.5) * RATE) :][:RATE]
    cover = {}
    for heard in (True, False):
        of = [n for n, actor in enumerate(drawn.actors, 1) if actor.onscreen and actor.sounding == heard]
        mask = torch.from_numpy(np.isin(masks[0], of)).float()[None, None]
        cover[heard] = (F.avg_pool2d(mask, PATCH).flatten() * 255).to(torch.uint8)
    silent = [actor.look for actor in drawn.actors if actor.onscreen and not actor.sounding]
    numbers = [drawn.label, drawn.look, drawn.timbre, silent[0] if silent else 255]
    return [torch.from_numpy(frames[0].transpose(2, 0, 1).copy()), spectrogram(sound),
            *(torch.tensor(n, dtype=torch.uint8) for n in numbers), cover[True], cover[False]]  # fmt: skip


def render(seed: int, sizes: dict[str, dict[str, int]], path: Path) -> None:
    tensors = {}
    for kind, size in sizes.items():
        rows = [moment(kind, seed, i) for i in range(size["pretrain"] + size["val"] + size["test"])]
        columns = (torch.stack(column) for column in zip(*rows, strict=True))
        tensors |= {f"{kind}.{name}": x for name, x in zip(Moments._fields, columns, strict=True)}
    with writing(path) as part:
        save_file(tensors, part)


def world_of(name: str, seed: int, folder: Path, *, share: float = 1.0) -> dict[tuple[str, str], Moments]:
    """All moments of a seed's world by (kind, split), from a file in `folder`, which is made where there is none.

    `share` of the usual sizes, for a rehearsal.
    """
    sizes = {kind: {split: int(n * share) for split, n in splits.items()} for kind, splits in WORLDS[name].items()}
    path = folder / f"{name}-{seed}{'' if share == 1 else f'-{share:g}'}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # the cells of a seed begin together
        if not path.exists():
            render(seed, sizes, path)
    tensors, found = load_file(path), {}
    for kind, size in sizes.items():
        every = Moments(*(tensors[f"{kind}.{name}"] for name in Moments._fields))
        ends = size["pretrain"], size["pretrain"] + size["val"]
        parts = {"pretrain": slice(ends[0]), "train": slice(size["train"]), "val": slice(*ends),
                 "test": slice(ends[1], None)}  # fmt: skip
        found |= {(kind, split): every.take(part) for split, part in parts.items()}
    return found
