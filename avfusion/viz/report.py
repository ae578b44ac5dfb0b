"""What trained models make of a clip, on one HTML page that needs no other file.

Cards show, as far as models are given: the clip and its likely classes; where its sound comes from; which pixels sound;
the sound of the picture and the rest; and the clips of a collection that are most like it, by an encoder's features.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch.nn.functional as F
from matplotlib import colormaps
from torch import Tensor

from avfusion.embedding.search import Collection, Hit, ask_clip
from avfusion.media.clip import Clip, ClipError
from avfusion.media.reader import read_clip, read_whole
from avfusion.viz.page import FRAMES, RATE, SIDE, Card, Thing, stacked, thumbnail, write_page

HEAT = "inferno"
SHOWN = {"localize": "where the sound comes from", "segment": "what sounds", "separate": "the sound of the picture"}
ALONE = (
    "The clip alone: no model was asked. Name runs, as in `avfusion report CLIP --finetune RUN --localize RUN`, and "
    "the page shows what they make of it."
)
LONGEST = 600.0  # seconds of a clip that a page plays


class Said(Protocol):
    """What a model says of a clip: an `avfusion.tasks.downstream.Prediction`."""

    facts: dict[str, Any]
    maps: dict[str, Tensor]
    sounds: dict[str, Tensor]


@dataclass
class Reporter:
    """The models that a report asks.

    `asked`: by the name of its task, the window of clips that a model sees, and what it says of a clip.
    """

    asked: dict[str, tuple[dict, Callable[[Clip], Said]]] = field(default_factory=dict)
    collection: Collection | None = None
    neighbours: int = 3  # windows of the collection that are shown

    def write(self, clip: Path, page: Path) -> int:
        """Write a clip's page; returns how many cards it has. Raises ClipError where the clip cannot be read."""
        lead = "" if self.asked or self.collection else ALONE
        return write_page(page, self.cards(clip), title=clip.name, lead=lead, empty="")

    def cards(self, path: Path) -> Iterator[Card]:
        yield self._overview(path)
        for name, title in SHOWN.items():
            if name in self.asked:
                window, ask = self.asked[name]
                clip = read_clip(path, **window)
                said = ask(clip)
                facts = [f"{key}: {text(value)}" for key, value in said.facts.items()]
                caption = " · ".join([f"{clip.start:.1f} s to {clip.start + window['duration']:.1f} s", *facts])
                frame, sounds = thumbnail(clip.frame), [Thing(n, None, None, _sound(x)) for n, x in said.sounds.items()]
                for values in said.maps.values():
                    frame = _heated(frame, values)
                yield Card(title, caption, frame[None], np.array([clip.frame_time]), _sound(clip.waveform[0]),
                           tuple(sounds))  # fmt: skip
        if self.collection is not None:
            query, _ = ask_clip(self.collection.embedder, path)
            yield from map(hit_card, self.collection.nearest(query, self.neighbours, other_than=path))

    def _overview(self, path: Path) -> Card:
        frames, waveform = read_whole(
            path,
            frame_rate=8,
            max_frames=FRAMES,
            sample_rate=RATE,
            max_duration=LONGEST,
            crop=True,
            transform=thumbnail,
        )
        said = []
        for name in ("finetune", "probe"):
            if name in self.asked:
                window, ask = self.asked[name]
                said.append(f"{name}: {text(ask(read_clip(path, **window)).facts['classes'])}")
        pictures, times = stacked([image for _, image in frames]), np.array([time for time, _ in frames])
        return Card(path.name, " · ".join(said) or "the clip", pictures, times, waveform[0].numpy())


def hit_card(hit: Hit) -> Card:
    """A window that is like what was asked for: its frame, its sound, where it is."""
    title, caption = f"like it: {Path(hit.file).name}", f"similarity {hit.similarity:.3f} · from {hit.start:.1f} s"
    try:
        clip = read_clip(hit.file, start=hit.start, duration=hit.end - hit.start)
    except ClipError as error:
        blank = np.full((1, SIDE, SIDE, 3), 200, np.uint8)
        return Card(title, f"{caption} · {error}", blank, np.zeros(1), np.zeros(1, np.float32))
    return Card(title, caption, thumbnail(clip.frame)[None], np.array([clip.frame_time]), _sound(clip.waveform[0]))


def text(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {100 * share:.0f} %" for name, share in value.items())  # names have commas
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _heated(frame: np.ndarray, values: Tensor) -> np.ndarray:
    """A map [rows, columns], stretched to its own range, over a frame [H, W, 3]."""
    values = F.interpolate(values[None, None].float(), frame.shape[:2], mode="bilinear")[0, 0]
    low, high = values.min(), values.max()
    colours = colormaps[HEAT](((values - low) / (high - low).clamp(min=1e-12)).numpy())[..., :3] * 255
    return (0.5 * frame + 0.5 * colours).astype(np.uint8)


def _sound(samples: Tensor) -> np.ndarray:
    return samples.cpu().float().numpy()
