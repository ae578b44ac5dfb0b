"""`avfusion report`: what trained models make of a clip, on one HTML page that needs no other file.

Cards show, as far as runs are given: the clip and its likely classes; where its sound comes from; which pixels sound;
the sound of the picture and the rest; and the clips of a collection that are most like it, by an encoder's features.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from matplotlib import colormaps
from torch import Tensor, nn

from avfusion.browse import FRAMES, RATE, SIDE, Card, Thing, stacked, thumbnail, write_page
from avfusion.checkpoint import load_encoder
from avfusion.clips import ClipError, read_clip, read_whole
from avfusion.features import Features, embed_clips, fingerprint
from avfusion.model import DeepAVFusion
from avfusion.probe import nearest
from avfusion.tasks.downstream import Downstream, encoder_file, load_run

HEAT = "inferno"
SHOWN = {"localize": "where the sound comes from", "segment": "what sounds", "separate": "the sound of the picture"}


@dataclass
class Reporter:
    """The models that a report asks: runs by task, and an encoder with the collection that it compares with."""

    runs: dict[str, tuple[Downstream, nn.Module]] = field(default_factory=dict)
    encoder: DeepAVFusion | None = None
    collection: Features | None = None
    neighbours: int = 3

    @classmethod
    def load(
        cls, runs: dict[str, Path], encoder: str | None = None, collection: Path | None = None, neighbours: int = 3
    ) -> "Reporter":
        """`runs` are folders by task; `collection` is what `avfusion embed` wrote with the same `encoder`.

        Raises ValueError where a run is of another task, or the collection of another encoder.
        """
        loaded = {name: load_run(path, name) for name, path in runs.items()}
        if (encoder is None) != (collection is None):
            raise ValueError("neighbours need both: an encoder, and a collection that `avfusion embed` wrote with it")
        if encoder is None:
            return cls(loaded)
        model, features = load_encoder(encoder_file(encoder)), Features.load(collection)
        if features.x_fusion.shape[-1] != model.config.dim or features.weights not in (None, fingerprint(model)):
            raise ValueError(f"{collection}: features of another encoder than {encoder}: embed the collection with it")
        return cls(loaded, model, features, neighbours)

    def write(self, clip: Path, page: Path) -> int:
        """Write a clip's page; returns how many cards it has. Raises ClipError where the clip cannot be read."""
        page.parent.mkdir(parents=True, exist_ok=True)
        return write_page(page, self.cards(clip), title=clip.name)

    def cards(self, path: Path) -> Iterator[Card]:
        yield self._overview(path)
        for name, title in SHOWN.items():
            if name in self.runs:
                task, model = self.runs[name]
                clip = read_clip(path, **task.window)
                prediction = task.predict(model, clip)
                facts = [f"{key}: {_text(value)}" for key, value in prediction.facts.items()]
                caption = " · ".join([f"{clip.start:.1f} s to {clip.start + task.window['duration']:.1f} s", *facts])
                frame, sounds = thumbnail(clip.frame), [Thing(n, None, None, _sound(x)) for n, x in
                                                         prediction.sounds.items()]  # fmt: skip
                for values in prediction.maps.values():
                    frame = _heated(frame, values)
                yield Card(title, caption, frame[None], np.array([clip.frame_time]), _sound(clip.waveform[0]),
                           tuple(sounds))  # fmt: skip
        if self.encoder is not None:
            yield from self._neighbours(path)

    def _overview(self, path: Path) -> Card:
        frames, waveform = read_whole(path, frame_rate=8, sample_rate=RATE, transform=thumbnail)
        frames, said = frames[:: math.ceil(len(frames) / FRAMES)], []
        for name in ("finetune", "probe"):
            if name in self.runs:
                task, model = self.runs[name]
                classes = task.predict(model, read_clip(path, **task.window)).facts["classes"]
                said.append(f"{name}: {_text(classes)}")
        pictures, times = stacked([image for _, image in frames]), np.array([time for time, _ in frames])
        return Card(path.name, " · ".join(said) or "the clip", pictures, times, waveform[0].numpy())

    def _neighbours(self, path: Path) -> Iterator[Card]:
        own = embed_clips(self.encoder, [path])
        if own.failed:
            raise own.failed[0]
        count = min(self.neighbours + 1, len(self.collection.clips))  # the clip may be one of them
        similarity, rows = nearest(_joint(own), _joint(self.collection), count)
        shown = 0
        for alike, row in zip(similarity[0].tolist(), rows[0].tolist(), strict=True):
            other = Path(self.collection.clips[row])
            if shown == self.neighbours or (other.exists() and other.samefile(path)):
                continue
            shown += 1
            title, caption = f"like it: {other.name}", f"similarity {alike:.3f}"
            try:
                clip = read_clip(other, start=self.collection.starts[row], duration=3.0)
            except ClipError as error:
                blank = np.full((1, SIDE, SIDE, 3), 200, np.uint8)
                yield Card(title, f"{caption} · {error}", blank, np.zeros(1), np.zeros(1, np.float32))
                continue
            yield Card(title, caption, thumbnail(clip.frame)[None], np.array([clip.frame_time]),
                       _sound(clip.waveform[0]))  # fmt: skip


def _joint(features: Features) -> Tensor:
    """Means over image, audio and fusion tokens, each of length 1, side by side."""
    return F.normalize(features.pooled, dim=-1).flatten(1)


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {100 * share:.0f} %" for name, share in value.items())
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _heated(frame: np.ndarray, values: Tensor) -> np.ndarray:
    """A map [rows, columns], stretched to its own range, over a frame [H, W, 3]."""
    values = F.interpolate(values[None, None].float(), frame.shape[:2], mode="bilinear")[0, 0]
    low, high = values.min(), values.max()
    colours = colormaps[HEAT](((values - low) / (high - low).clamp(min=1e-12)).numpy())[..., :3] * 255
    return (0.5 * frame + 0.5 * colours).astype(np.uint8)


def _sound(samples: Tensor) -> np.ndarray:
    return samples.cpu().float().numpy()


def page_name(clip: Path, taken: set[str]) -> str:
    """<clip's name>.html, with a number where another clip has that."""
    name, number = clip.stem, 1
    while name in taken:
        number += 1
        name = f"{clip.stem}-{number}"
    taken.add(name)
    return f"{name}.html"
