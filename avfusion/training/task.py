"""What a task is to the training loop: data, a model, losses, an evaluation."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from avfusion import data, distributed
from avfusion.data.loader import Batch, ClipLoader
from avfusion.data.samples import Selection, Source, Tensors, Windows, window
from avfusion.data.table import find_videos, folder_name
from avfusion.media.transforms import image_transform, preprocessing
from avfusion.models.deepavfusion import EncoderConfig
from avfusion.synth.make import synthesize
from avfusion.synth.scene import Settings
from avfusion.training.config import TrainConfig


@dataclass
class Result:
    """What an evaluation finds."""

    summary: dict[str, float]  # by name; a curve over the run is drawn of them
    # A row a clip, in the order of the data set: "row" in the source, "clip", "score" (the best is highest), and more.
    samples: list[dict[str, Any]] = field(default_factory=list)


class Task(ABC):
    """Made of its settings. A subclass says what `train` and evaluations need to know."""

    name: ClassVar[str]
    settings: ClassVar[type[TrainConfig]]
    presets: ClassVar[dict[str, dict[str, Any]]]  # flat names of settings -> values
    thorough = False  # an evaluation after training, which may take its time

    def __init__(self, config: TrainConfig, encoder_config: EncoderConfig):
        self.config, self.encoder_config = config, encoder_config
        self.frame_transform, self.mel, self.window = preprocessing(
            encoder_config.image_size, encoder_config.audio_size
        )

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

    @abstractmethod
    def show_run(self, out: Path, picture: Path, loader: ClipLoader, samples: list[dict[str, Any]]) -> None:
        """Draw how the run in `out` stands, for people: after an evaluation that has drawn `picture`."""

    def check(self) -> None:
        """Raises ValueError where the model cannot be built, before any clip is made or read."""
        with torch.device("meta"):
            self.build()

    def open(self, *, make: bool = False) -> Source:
        """The clips to train on; `make` makes synthetic ones where the settings ask for them."""
        config = self.config.data
        if config.synth_clips and make:
            size = -(-max(self.encoder_config.image_size) * 3 // 4) * 2  # room for crops, and even
            settings = Settings(layout=config.layout, clips=config.synth_clips, classes=config.synth_classes, size=size,
                                fps=4)  # fmt: skip
            distributed.say(f"{config.path}: {config.synth_clips} synthetic clips")
            synthesize(config.path, settings, workers=os.cpu_count() or 1, progress=True)
        return self.read(config.path, config.split)

    def open_evaluation(self) -> Selection:
        """The clips to evaluate on, evenly spaced over those that can be."""
        config = self.config.data
        source = self.read(config.eval_data or config.path, config.eval_split)
        chosen = self.evaluated(source)
        return Selection(source, [chosen[i] for i in spread(len(chosen), config.eval_clips)])

    def evaluated(self, source: Source) -> Sequence[int]:
        """The rows of a source that an evaluation can use."""
        return range(len(source.rows))

    def read(self, where: str, split: str) -> Source:
        """A data set as it lies. An error about its split says how to choose another."""
        try:
            return self._read(where, split)
        except ValueError as error:
            if not str(error).startswith("split="):
                raise
            raise ValueError(f"{where}: {error} (name another, or all, by --split or --eval-split, or other clips to "
                             "evaluate on by --eval-data)") from error  # fmt: skip

    def _read(self, where: str, split: str) -> Source:
        config = self.config.data
        layout, cache = config.layout, config.shard_cache
        if layout == "shards":
            if "://" in where and not cache:
                raise ValueError(f"{where}: shards at an address need --shard-cache, a folder that keeps what is "
                                 "fetched")  # fmt: skip
            shards = data.Shards(where, split, cache=cache or None)
            if config.label_order == "folders" and list(shards.classes) != sorted(shards.classes, key=folder_name):
                raise ValueError(f"{where}: classes are in another order than --label-order folders: pack the shards "
                                 "with it")  # fmt: skip
            return shards
        if layout == "vggsound" and not Path(where, "annotations").exists() and find_videos(Path(where)):
            distributed.say(f"{where}: no annotations/vggsound.csv: taken as a folder of videos, --layout folder")
            layout = "folder"
        return data.read(layout, where, "all" if layout == "folder" else split, label_order=config.label_order)

    def samples(self, source: Source, *, train: bool) -> Dataset:
        """What the model sees of the clips of a source: a composition of `avfusion.data.samples`."""
        return Windows(source, **window(train, **self.window))

    def transform(self, *, train: bool) -> Callable:
        """Of frames."""
        if not train:
            return self.frame_transform
        return image_transform(self.encoder_config.image_size, train=True, crop_min=self.config.data.crop_min)

    def loader(self, source: Source, batch_size: int, *, train: bool, **options) -> ClipLoader:
        config, samples = self.config, self.samples(source, train=train)
        items = Tensors(samples, self.transform(train=train), gain_db=config.data.gain_db if train else 0.0)
        seed = config.optim.seed if train else 0
        return ClipLoader(items, batch_size, train=train, seed=seed, balanced=train and config.data.balanced,
                          num_workers=config.data.workers, timeout=config.data.loader_timeout, **options)  # fmt: skip

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


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def gathered(rows: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    """Join what all processes found: tuples (index [B], x [B, ...], ...) -> one of all clips, in order of the index."""
    rows = distributed.gather([tuple(x.cpu() for x in row) for row in rows])
    if not rows:
        raise ValueError("no clip could be evaluated")
    columns = [torch.cat(column) for column in zip(*rows, strict=True)]
    order = columns[0].argsort()
    return [column[order] for column in columns]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def spread(count: int, wanted: int = 4) -> list[int]:
    """`wanted` rows of `count`, evenly spaced; all, if there are fewer."""
    wanted = min(wanted, count)
    return [i * count // wanted for i in range(wanted)]
