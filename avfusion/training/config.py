"""Settings of a training run: what every run has. A task adds its own.

In code they are nested (data / optim / run, and the task's encoder); on the command line, in presets and in run.json
they are flat, each under the name of its field.
"""

import json
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from avfusion.common import setting, unknown
from avfusion.data import LAYOUTS


def leaves(cls: type) -> Iterator[tuple[str, str | None, Field]]:
    """The settings of a class: flat name, group (None: its own), field."""
    for item in fields(cls):
        if is_dataclass(item.type):
            yield from ((name, item.name, leaf) for name, _, leaf in leaves(item.type))
        else:
            yield item.metadata.get("name", item.name), None, item


class Checked:
    """Raises ValueError, naming the setting, for what is none of its choices or less than the least value."""

    def __post_init__(self):
        for name, group, item in leaves(type(self)):
            if group is not None:
                continue
            value, least = getattr(self, item.name), item.metadata.get("least")
            if isinstance(item.default, tuple):
                object.__setattr__(self, item.name, tuple(value))  # lists come back from JSON
            if "choices" in item.metadata and value not in item.metadata["choices"]:
                raise ValueError(unknown(name, value, item.metadata["choices"]))
            if least is not None and value < least:
                raise ValueError(f"{name}={value}: expected at least {least}")


@dataclass(frozen=True)
class DataSettings(Checked):
    path: str = setting("", "folder of the data set (layout shards: folder or https address of the shards)",
                        name="data")  # fmt: skip
    layout: str = setting("vggsound", "how it lies there: shards, or a layout of `avfusion shard --help`")
    label_order: str = setting("names", "classes are numbered by their names, or as the release does, by its folders",
                               choices=("names", "folders"))  # fmt: skip
    shard_cache: str = setting("", "folder that keeps shards which are fetched from an address")
    split: str = setting("train", "split to train on; all: everything")
    balanced: bool = setting(False, "train on clips of each class alike: draw a class, then one of its clips")
    synth_clips: int = setting(0, "make so many synthetic clips in --data first, unless they are there", least=0)
    synth_classes: int = setting(12, "of how many classes these are")
    eval_data: str = setting("", "folder of labelled clips to evaluate on (default: --data)")
    eval_split: str = setting("test", "split of these clips; all: everything")
    eval_clips: int = setting(2000, "so many of them at most; 0 leaves evaluation during training out", least=0)
    crop_min: float = setting(0.5, "smallest share of a frame that a random crop keeps")
    gain_db: float = setting(6.0, "largest random change of the volume, in dB")
    workers: int = setting(8, "processes that decode ahead, for each training process", least=0)
    loader_timeout: int = setting(120, "seconds without a batch from these that end the run", least=1)

    def __post_init__(self):
        super().__post_init__()
        if not self.path:
            raise ValueError("data: give the folder of the data set, for instance --data /data/vggsound")
        if self.layout not in ("shards", *LAYOUTS):
            raise ValueError(unknown("layout", self.layout, ["shards", *LAYOUTS]))
        if not 0 < self.crop_min <= 1:
            raise ValueError(f"crop_min={self.crop_min}: expected a share of the frame, in (0, 1]")


@dataclass(frozen=True)
class OptimSettings(Checked):
    epochs: int = setting(200, "passes over the data", least=1)
    batch_size: int = setting(512, "clips of an optimiser step, over all processes and accumulation", least=1)
    accumulation: int = setting(1, "parts that a process computes its share of a step in", least=1)
    blr: float = setting(1.5e-4, "learning rate for 256 clips; the rate is blr x batch / 256", least=0)
    warmup_epochs: float = setting(40.0, "linear rise of the rate, before it falls by a cosine to 0", least=0)
    weight_decay: float = setting(0.05, "of AdamW; biases and norms have none")
    betas: tuple[float, float] = setting((0.9, 0.95), "of AdamW")
    seed: int = setting(0, "of everything random: weights, order, crops, masks", least=0)


@dataclass(frozen=True)
class RunSettings(Checked):
    dtype: str = setting("fp32", "bf16: compute in bfloat16 where it is safe", choices=("fp32", "bf16"))
    compile: bool | None = setting(None, "torch.compile and CUDA graphs (default: on a GPU, for 200 clips or more)")
    gradient_checkpointing: bool = setting(False, "compute the blocks' activations again instead of keeping them")
    fsdp: bool = setting(False, "shard weights and optimizer state over the processes")
    peak_tflops: float = setting(0.0, "dense peak of a device at this precision, for MFU (default: by its name)")
    save_steps: int = setting(0, "checkpoint every so many steps (default: at the end of each epoch)", least=0)
    keep: int = setting(2, "checkpoints that stay", least=1)
    eval_epochs: int = setting(10, "epochs from one evaluation to the next", least=1)
    log_steps: int = setting(20, "steps from one line of the log to the next", least=1)
    tracker: str = setting("tensorboard", "where the log goes", choices=("tensorboard", "wandb", "trackio", "none"))
    max_bad_steps: int = setting(3, "so many steps in a row with a loss or gradient that is not finite end the run",
                                 least=1)  # fmt: skip


# Settings that may change when a run is resumed: they decide how it is computed and recorded, not what comes out.
FREE = {"data", "eval_data", "shard_cache", "eval_clips", "eval_split", "workers", "loader_timeout", "accumulation",
        "compile", "gradient_checkpointing", "fsdp", "peak_tflops", "save_steps", "keep", "eval_epochs", "log_steps",
        "tracker", "max_bad_steps"}  # fmt: skip

Config = TypeVar("Config", bound="TrainConfig")


@dataclass(frozen=True)
class TrainConfig(Checked):
    """What every training run is made of. Raises ValueError, naming the setting, for what cannot be run."""

    titles: ClassVar[dict[str | None, str]] = {"data": "data", "optim": "optimisation", "run": "machine and records",
                                               "encoder": "encoder", None: "task"}  # fmt: skip

    data: DataSettings = field(default_factory=DataSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def check_new(self) -> None:
        """Raises ValueError for settings that a run cannot be trained with; one that has been can be loaded."""

    @classmethod
    def of(cls: type[Config], **settings) -> Config:
        """From settings by their flat names. Raises ValueError for a name that there is none of."""
        if "mixed_precision" in settings:  # of runs before 0.2, and so are names of modes for `compile`
            settings["dtype"] = {"no": "fp32"}.get(mode := settings.pop("mixed_precision"), mode)
        if isinstance(settings.get("compile"), str):
            settings["compile"] = settings["compile"] != "no"
        groups, own = {item.name: {} for item in fields(cls) if is_dataclass(item.type)}, {}
        places = {name: (group, item) for name, group, item in leaves(cls)}
        for name, value in settings.items():
            if name not in places:
                raise ValueError(f"{cls.__name__}: {unknown('setting', name, places)}")
            group, item = places[name]
            (own if group is None else groups[group])[item.name] = value
        types = {item.name: item.type for item in fields(cls)}
        return cls(**{name: types[name](**values) for name, values in groups.items()}, **own)

    def flat(self) -> dict[str, Any]:
        """The settings by their flat names."""
        return {
            name: getattr(self if group is None else getattr(self, group), item.name)
            for name, group, item in leaves(type(self))
        }

    def but(self: Config, **changes) -> Config:
        """The same but for some settings, by their flat names."""
        return type(self).of(**self.flat() | changes)


def load_config(run: Path, task: str, cls: type[Config]) -> Config:
    """The settings of a run. Raises ValueError where its run.json is none, or of another task."""
    path = run / "run.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        found, settings = facts["task"], facts["settings"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the settings of a run ({type(error).__name__}: {error})") from error
    if found != task:
        raise ValueError(f"{run}: a run of {found}, and not of {task}; choose another --out")
    return cls.of(**settings)


def check_resumable(config: TrainConfig, run: Path, task: str) -> None:
    """Raises ValueError where a run has settings that `config` would change under way."""
    saved, ours = load_config(run, task, type(config)).flat(), config.flat()
    changed = [
        f"{name} was {saved[name]!r} and is now {value!r}"
        for name, value in ours.items()
        if name not in FREE and saved[name] != value
    ]
    if changed:
        raise ValueError(f"{run}: a run cannot change while it is resumed: {'; '.join(changed)}. "
                         "Use the same settings, or another --out")  # fmt: skip
