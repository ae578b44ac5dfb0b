"""What the downstream tasks share: an encoder to start from, labels that must agree, a run that can be loaded again."""

import json
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from avfusion.checkpoint import CheckpointError, load_encoder
from avfusion.clips import Clip
from avfusion.data.loader import Source
from avfusion.model import DeepAVFusion, EncoderConfig
from avfusion.optim import layer_decay_groups
from avfusion.runs import latest_checkpoint
from avfusion.tasks.configs import DownstreamConfig
from avfusion.tasks.registry import TASKS, task_class
from avfusion.tasks.task import Task


def encoder_file(path: str) -> Path:
    """The file with an encoder's weights that `path` names: itself, or the last checkpoint of a run.

    Raises CheckpointError where a folder is no run.
    """
    if not Path(path).is_dir():
        return Path(path)
    last = latest_checkpoint(Path(path))
    if last is None:
        raise CheckpointError(f"{path}: no checkpoint of a run in this folder")
    return last / "model.safetensors"


@dataclass
class Prediction:
    """What a model says of one clip."""

    facts: dict[str, Any] = field(default_factory=dict)  # as JSON holds them
    maps: dict[str, Tensor] = field(default_factory=dict)  # over the whole frame, [rows, columns]
    sounds: dict[str, Tensor] = field(default_factory=dict)  # [samples] at 16 kHz, in [-1, 1]


class Downstream(Task):
    """A task on top of a `DeepAVFusion` encoder.

    `classes` are those of the training data: known from `open` on, or from the run that a model is loaded from.
    """

    needs_labels = True

    def __init__(self, config: DownstreamConfig, encoder_config: EncoderConfig | None = None, classes=()):
        self.pretrained = None
        if encoder_config is None:  # a new run
            config.check_new()
            encoder_config = EncoderConfig()
            if config.encoder:
                self.pretrained = load_encoder(encoder_file(config.encoder))
                encoder_config = self.pretrained.config
            encoder_config = replace(encoder_config, drop_path=config.drop_path)
        self.classes = tuple(classes)
        super().__init__(config, encoder_config)

    def build_encoder(self, *, weights: bool) -> DeepAVFusion:
        encoder = DeepAVFusion(self.encoder_config)
        if weights and not self.config.from_scratch:
            encoder.load_state_dict(self.pretrained.state_dict())
        return encoder

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        config = self.config
        groups = layer_decay_groups(model, decay=config.layer_decay, weight_decay=config.weight_decay)
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas)

    def read(self, where: str, split: str) -> Source:
        source = super().read(where, split)
        if self.needs_labels and not source.classes:
            raise ValueError(f"{where}: the layout {self.config.layout} has no labels, which {self.name} needs")
        if self.needs_labels and self.classes and tuple(source.classes) != self.classes:
            raise ValueError(f"{where}: its {len(source.classes)} classes are not the {len(self.classes)} of training")
        self.classes = tuple(source.classes)
        return source

    @abstractmethod
    def predict(self, model: nn.Module, clip: Clip) -> Prediction:
        """What the model, in evaluation mode, says of one clip."""

    def inputs_of(self, clip: Clip, device: torch.device) -> tuple[Tensor, Tensor]:
        """A batch of one."""
        return self.transform(clip.frame)[None].to(device), self.mel.to(device)(clip.waveform[None].to(device))


def load_run(run: Path, expected: str | None = None) -> tuple[Downstream, nn.Module]:
    """The task of a downstream run and its model, in evaluation mode, with the weights of the last checkpoint.

    Raises ValueError where there is none, or it is not of the task that is `expected`.
    """
    last = latest_checkpoint(run)
    if last is None:
        raise ValueError(f"{run}: no checkpoint of a run in this folder")
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    name = facts.get("task")
    if name not in TASKS or expected not in (None, name):
        raise ValueError(f"{run}: a run of {name}, expected one of {expected or ', '.join(TASKS)}")
    settings, *_ = TASKS[name]
    with safe_open(last / "model.safetensors", "pt") as file:
        encoder_config = EncoderConfig(**json.loads(file.metadata()["config"]))
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    task = task_class(name)(settings(**facts["settings"]), encoder_config, facts["data"].get("classes", ()))
    model = task.build()
    model.load_state_dict(weights)
    return task, model.eval()
