"""The tasks. Each is one file: settings, presets, model, losses, evaluation, prediction, pictures.

A new one is a file, and a line here: name -> module, class, what it does. Light to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from avfusion.training.task import Task

TASKS = {
    "pretrain": ("pretrain", "Pretrain", "pre-train an encoder"),
    "probe": ("recognition", "Probe", "recognise classes by linear classifiers on a frozen encoder"),
    "finetune": ("recognition", "Finetune", "recognise classes, all weights trained"),
    "retrieve": ("retrieval", "Retrieve", "find the picture of a sound, and the sound of a picture"),
    "localize": ("localization", "Localize", "find where in the picture the sound comes from"),
    "separate": ("separation", "Separate", "separate mixed sounds by their pictures"),
    "segment": ("segmentation", "Segment", "segment what sounds"),
}
DOWNSTREAM = [name for name in TASKS if name != "pretrain"]


def task_class(name: str) -> "type[Task]":
    module, cls, _ = TASKS[name]
    return getattr(import_module(f"avfusion.tasks.{module}"), cls)
