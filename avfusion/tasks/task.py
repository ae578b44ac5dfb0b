"""What a task is to the training loop: data, a model, losses, an evaluation."""

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

from avfusion import data
from avfusion.clips import IMAGENET_MEAN, IMAGENET_STD, Clip, image_transform
from avfusion.config import TrainConfig
from avfusion.data.loader import Batch, ClipLoader, Source
from avfusion.data.table import Row
from avfusion.features import preprocessing
from avfusion.model import EncoderConfig


@dataclass
class Result:
    """What an evaluation finds."""

    summary: dict[str, float]  # by name; a curve over the run is drawn of them
    # A row a clip, in the order of the data set: "row" in the source, "clip", "score" (the best is highest), and more.
    samples: list[dict[str, Any]] = field(default_factory=list)


class Task(ABC):
    """Made of its settings. A subclass says what `train` and `evaluate` need to know."""

    name: str
    encoder_config: EncoderConfig
    thorough = False  # an evaluation after training, which may take its time

    def __init__(self, config: TrainConfig, encoder_config: EncoderConfig):
        self.config, self.encoder_config = config, encoder_config
        self.transform, self.mel, self.window = preprocessing(encoder_config)

    @abstractmethod
    def build(self, *, weights: bool = False) -> nn.Module:
        """The model, freshly initialised, with its encoder as `.encoder`; `weights`: it starts from pre-trained ones.

        model(image, audio) returns one tensor or several.
        """

    @abstractmethod
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """With groups for `set_rate`."""

    def prepare(self, batch: Batch, epoch: int, device: torch.device) -> tuple:
        """What `losses` takes, on the device, from a batch of the loader; with all that the host draws or decides.

        Of the same shapes for every batch of a run; what is no tensor is the same.
        """
        return self.inputs(batch, device)

    @abstractmethod
    def losses(self, model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
        """Scalars by name; their sum is minimised. `model` may be wrapped.

        On a GPU this is recorded as a CUDA graph: nothing in it may have the host wait for what a tensor holds.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, loader: ClipLoader, dtype: torch.dtype) -> Result:
        """Every process evaluates its own batches, and gets the result of all. The model is in evaluation mode."""

    @abstractmethod
    def draw(self, model: nn.Module, loader: ClipLoader, rows: list[int], path: Path) -> None:
        """Draw some clips of an evaluation, by their rows in the source, to a PNG file."""

    def open(self, *, make: bool = False) -> Source:
        """The clips to train on; `make` makes synthetic ones where the settings ask for them."""
        config = self.config
        if config.synth_clips and make:
            from avfusion.synth.command import synthesize
            from avfusion.synth.scene import Settings

            size = -(-max(self.encoder_config.image_size) * 3 // 4) * 2  # room for crops, and even
            settings = Settings(layout=config.layout, clips=config.synth_clips, classes=config.synth_classes, size=size,
                                fps=4)  # fmt: skip
            print(f"{config.data}: {config.synth_clips} synthetic clips")
            synthesize(config.data, settings, workers=os.cpu_count() or 1, progress=sys.stderr.isatty())
        return self.read(config.data, config.split)

    def open_evaluation(self) -> "Selection":
        """The clips to evaluate on, evenly spaced over those that can be."""
        source = self.read(self.config.eval_data or self.config.data, self.config.eval_split)
        chosen = self.evaluated(source)
        return Selection(source, [chosen[i] for i in spread(len(chosen), self.config.eval_clips)])

    def evaluated(self, source: Source) -> Sequence[int]:
        """The rows of a source that an evaluation can use."""
        return range(len(source.rows))

    def read(self, where: str, split: str) -> Source:
        wanted = None if split == "all" else split
        if self.config.layout != "shards":
            return data.read(self.config.layout, where, wanted)
        if "://" in where and not self.config.shard_cache:
            raise ValueError(f"{where}: shards at an address need --shard-cache, a folder that keeps what is fetched")
        try:
            return data.Shards(where, wanted, cache=self.config.shard_cache or None)
        except ValueError as error:
            if not str(error).startswith("split="):
                raise
            raise ValueError(f"{where}: {error}. Name another, or all, by --split or --eval-split, or other clips to "
                             "evaluate on by --eval-data") from error  # fmt: skip

    def loader(self, source: Source, batch_size: int, *, train: bool, **options) -> ClipLoader:
        transform = self.transform
        if train:
            transform = self.train_transform()
            options = {"seed": self.config.seed, "gain_db": self.config.gain_db} | options
        return ClipLoader(source, batch_size, train=train, transform=transform, num_workers=self.config.workers,
                          **self.window, **options)  # fmt: skip

    def train_transform(self):
        return image_transform(self.encoder_config.image_size, train=True, crop_min=self.config.crop_min)

    def flop(self) -> int:
        """FLOP of a training step for one clip, forward and backward, as matrix products; recomputation not counted."""
        clips, size = 2, self.encoder_config  # batch norms need two
        with torch.device("meta"):
            model = self.build()
            image, audio = torch.empty(clips, 3, *size.image_size), torch.empty(clips, 1, *size.audio_size)
            with FlopCounterMode(display=False) as counter:
                out = self.outputs(model, image, audio)
                torch.stack([x.sum() for x in ([out] if isinstance(out, Tensor) else out)]).sum().backward()
        return counter.get_total_flops() // clips

    def outputs(self, model: nn.Module, image: Tensor, audio: Tensor) -> Tensor | tuple[Tensor, ...]:
        return model(image, audio)

    def inputs(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Image and spectrogram on a device."""
        waveform = batch.waveform.to(device, non_blocking=True)
        return batch.image.to(device, non_blocking=True), self.mel.to(device)(waveform)


class Selection:
    """Some clips of a source, by their rows. In a multi-label set too, a clip with one label has it as its `label`."""

    def __init__(self, source: Source, index: Sequence[int]):
        self.source, self.classes, self.sha256 = source, source.classes, source.sha256
        self.index = list(index)
        self.rows = [replace(source.rows[i], label=one_label(source.rows[i])) for i in self.index]

    @property
    def has_labels(self) -> bool:
        """Whether nearest neighbours can be compared: several clips have one label each."""
        return sum(row.label is not None for row in self.rows) > 1

    def name(self, index: int) -> str:
        return self.source.name(self.index[index])

    def read(self, index: int, **window) -> Clip:
        return self.source.read(self.index[index], **window)


def one_label(row: Row) -> int | None:
    """The label of a clip that has exactly one."""
    return row.labels[0] if row.label is None and len(row.labels) == 1 else row.label


def whole_frame(size: tuple[int, int]) -> v2.Transform:
    """`image_transform` without cropping: the whole frame, squeezed to `size`; for what is placed in the picture."""
    normalize = v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    return v2.Compose([v2.Resize(size, antialias=True), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize,
                       v2.ToPureTensor()])  # fmt: skip


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def gathered(rows: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    """Join what all processes found: tuples (index [B], x [B, ...], ...) -> one of all clips, in order of the index."""
    rows = gather_object([tuple(x.cpu() for x in row) for row in rows])
    if not rows:
        raise ValueError("no clip could be evaluated")
    columns = [torch.cat(column) for column in zip(*rows, strict=True)]
    order = columns[0].argsort()
    return [column[order] for column in columns]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def clips_of(loader: ClipLoader, rows: Iterable[int]) -> Batch:
    """Some clips of a loader for evaluation, by their rows; those that cannot be read are left out.

    Raises ValueError where none can be read.
    """
    batch, errors, _ = loader.clips.collate([loader.clips[0, row] for row in rows])
    if batch is None:
        raise ValueError(f"none of the clips to draw can be read, for instance: {errors[0] if errors else 'no clips'}")
    return batch


def spread(count: int, wanted: int = 4) -> list[int]:
    """`wanted` rows of `count`, evenly spaced; all, if there are fewer."""
    wanted = min(wanted, count)
    return [i * count // wanted for i in range(wanted)]
