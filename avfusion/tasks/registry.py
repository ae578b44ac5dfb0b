"""The downstream tasks by name. Light to import."""

from importlib import import_module
from typing import TYPE_CHECKING

from avfusion.tasks.configs import (
    ContrastConfig,
    DownstreamConfig,
    FinetuneConfig,
    ProbeConfig,
    SegmentConfig,
    SeparateConfig,
)

if TYPE_CHECKING:
    from avfusion.tasks.downstream import Downstream

# Name -> settings, module of avfusion.tasks, class.
TASKS: dict[str, tuple[type[DownstreamConfig], str, str]] = {
    "probe": (ProbeConfig, "recognition", "Probe"),
    "finetune": (FinetuneConfig, "recognition", "Finetune"),
    "retrieve": (ContrastConfig, "contrast", "Retrieve"),
    "localize": (ContrastConfig, "contrast", "Localize"),
    "separate": (SeparateConfig, "separation", "Separate"),
    "segment": (SegmentConfig, "segmentation", "Segment"),
}


def task_class(name: str) -> "type[Downstream]":
    _, module, cls = TASKS[name]
    return getattr(import_module(f"avfusion.tasks.{module}"), cls)
