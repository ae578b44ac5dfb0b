"""Settings of a training run as dataclasses: what every run has, and what pre-training adds. Light to import."""

import argparse
import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # imported where it is needed: `--help` loads nothing heavy
    from avfusion.model import EncoderConfig


def setting(default, text: str, **argument):
    """A field with the text that `--help` prints for it, and arguments of `add_argument`."""
    return field(default=default, metadata={"help": text, **argument})


@dataclass(frozen=True)
class TrainConfig:
    """What every training run is made of. Raises ValueError, naming the field, for what cannot be run."""

    # data
    data: str = setting("", "folder of the data set (layout shards: folder or https address of the shards)")
    layout: str = setting("vggsound", "how it lies there: shards, or a layout of `avfusion shard --help`")
    shard_cache: str = setting("", "folder that keeps shards which are fetched from an address")
    split: str = setting("train", "split to train on; all: everything")
    synth_clips: int = setting(0, "make so many synthetic clips in --data first, unless they are there")
    synth_classes: int = setting(12, "of how many classes these are")
    eval_data: str = setting("", "folder of labelled clips to evaluate on (default: --data)")
    eval_split: str = setting("test", "split of these clips; all: everything")
    eval_clips: int = setting(2000, "so many of them at most; 0 leaves evaluation during training out")
    crop_min: float = setting(0.5, "smallest share of a frame that a random crop keeps")
    gain_db: float = setting(6.0, "largest random change of the volume, in dB")
    workers: int = setting(8, "processes that decode ahead, for each training process")

    # optimisation
    epochs: int = setting(200, "passes over the data")
    batch_size: int = setting(512, "clips of an optimiser step, over all processes and accumulation")
    accumulation: int = setting(1, "parts that a process computes its share of a step in")
    blr: float = setting(1.5e-4, "learning rate for 256 clips; the rate is blr x batch / 256")
    warmup_epochs: float = setting(40.0, "linear rise of the rate, before it falls by a cosine to 0")
    weight_decay: float = setting(0.05, "of AdamW; biases and norms have none")
    betas: tuple[float, float] = setting((0.9, 0.95), "of AdamW")
    drop_path: float = setting(0.0, "stochastic depth of the encoder")
    seed: int = setting(0, "of everything random: weights, order, crops, masks")

    # machine
    mixed_precision: str = setting("no", "bf16: compute in bfloat16 where it is safe", choices=("no", "bf16"))
    compile: bool | None = setting(None, "torch.compile and CUDA graphs (default: on a GPU, for 200 clips or more)")
    gradient_checkpointing: bool = setting(False, "compute the blocks' activations again instead of keeping them")
    fsdp: bool = setting(False, "shard weights and optimizer state over the processes")
    peak_tflops: float = setting(0.0, "dense peak of a device at this precision, for MFU (default: by its name)")

    # records
    save_steps: int = setting(0, "checkpoint every so many steps (default: at the end of each epoch)")
    keep: int = setting(2, "checkpoints that stay")
    eval_epochs: int = setting(10, "epochs from one evaluation to the next")
    log_steps: int = setting(20, "steps from one line of the log to the next")
    tracker: str = setting("tensorboard", "where the log goes", choices=("tensorboard", "wandb", "none"))
    max_bad_steps: int = setting(3, "so many steps in a row with a loss or gradient that is not finite end the run")

    def __post_init__(self):
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(item.default, tuple):
                object.__setattr__(self, item.name, tuple(value))  # lists come back from JSON
            if item.name == "compile" and isinstance(value, str):  # the modes of older runs
                object.__setattr__(self, item.name, value != "no")
            choices = item.metadata.get("choices")
            if choices and value not in choices:
                raise ValueError(f"{item.name}={value!r}: expected one of {', '.join(choices)}")
        if not self.data:
            raise ValueError("data: give the folder of the data set, for instance --data /data/vggsound")
        for name in ("epochs", "batch_size", "accumulation", "keep", "eval_epochs", "log_steps", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("workers", "eval_clips", "save_steps", "synth_clips", "seed", "blr", "warmup_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 0")
        if not 0 < self.crop_min <= 1:
            raise ValueError(f"crop_min={self.crop_min}: expected a share of the frame, in (0, 1]")


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """A pre-training run: the encoder, the decoders, the masks."""

    dim: int = setting(768, "width of the encoder's tokens")
    depth: int = setting(12, "its layers")
    num_heads: int = setting(12, "its heads")
    patch_size: int = setting(16, "pixels, and mel bands x frames")
    image_size: tuple[int, int] = setting((224, 224), "height and width in pixels")
    audio_size: tuple[int, int] = setting((128, 192), "mel bands and frames, 64 frames a second")
    fusion: str = setting("factorized", "kind of fusion", choices=("factorized", "dense", "token", "none"))
    fusion_layers: str = setting("all", "all, none, late (the last), mid (the last four) or layers such as 0-3-11")
    fusion_tokens: int = setting(16, "tokens that attend to interactions")
    image_agg_tokens: int = setting(8, "factorized: tokens that aggregate the image")
    audio_agg_tokens: int = setting(8, "factorized: tokens that aggregate the audio")
    interaction: str = setting("sum", "dense: how two tokens of a pair combine", choices=("sum", "product"))
    decoder_dim: int = setting(512, "width of the decoders")
    decoder_depth: int = setting(8, "their layers")
    decoder_num_heads: int = setting(16, "their heads")
    image_mask_ratio: float = setting(0.75, "share of image patches that is hidden")
    audio_mask_ratio: float = setting(0.8, "share of spectrogram patches that is hidden")
    norm_loss: bool = setting(True, "normalise each target patch")
    image_weights: str = setting("", "pre-trained image ViT to start from: a file, or a name such as "
                                     "vit_base_patch16_224.mae that timm fetches")  # fmt: skip
    audio_weights: str = setting("", "pre-trained audio ViT to start from, likewise")

    def encoder(self) -> "EncoderConfig":
        from avfusion.model import EncoderConfig

        own = asdict(self)
        return EncoderConfig(**{item.name: own[item.name] for item in fields(EncoderConfig) if item.name in own})


# Settings that may change when a run is resumed: they decide how it is computed and recorded, not what comes out.
FREE = {"data", "eval_data", "shard_cache", "eval_clips", "eval_split", "workers", "accumulation", "compile",
        "gradient_checkpointing", "fsdp", "peak_tflops", "save_steps", "keep", "eval_epochs", "log_steps", "tracker",
        "max_bad_steps"}  # fmt: skip

Config = TypeVar("Config", bound=TrainConfig)


def add_settings(parser: argparse.ArgumentParser, cls: type[TrainConfig]) -> None:
    """Add an option for each field of `cls`; options that are not given are absent from the namespace."""
    group = parser.add_argument_group("settings, and their defaults where the preset has no other")
    for item in fields(cls):
        flag, default = f"--{item.name.replace('_', '-')}", item.default
        text, choices = item.metadata["help"], item.metadata.get("choices")
        if default not in ("", False, None, MISSING) and not (default == 0 and "(default" in text):
            text += f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
        common = {"help": text, "default": argparse.SUPPRESS}
        if isinstance(default, bool | None):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif isinstance(default, tuple):
            group.add_argument(flag, type=type(default[0]), nargs=len(default), metavar="N", **common)
        else:
            group.add_argument(flag, type=type(default), choices=choices, metavar=None if choices else "X", **common)


def given_settings(args: argparse.Namespace, cls: type[TrainConfig]) -> dict:
    """The settings that stand on the command line."""
    return {item.name: getattr(args, item.name) for item in fields(cls) if hasattr(args, item.name)}


def load_config(path: Path, cls: type[Config] = PretrainConfig) -> Config:
    """The settings in a run's run.json. Raises ValueError where it holds none of this kind of run."""
    try:
        return cls(**json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the settings that {cls.__name__} has ({error})") from error


def check_resumable(config: TrainConfig, path: Path) -> None:
    """Raises ValueError where a run's run.json holds settings that `config` would change under way."""
    saved = load_config(path, type(config))
    changed = [
        f"{item.name} was {getattr(saved, item.name)!r} and is now {getattr(config, item.name)!r}"
        for item in fields(config)
        if item.name not in FREE and getattr(saved, item.name) != getattr(config, item.name)
    ]
    if changed:
        raise ValueError(f"{path.parent}: a run cannot change while it is resumed: {'; '.join(changed)}. "
                         "Use the same settings, or another --out")  # fmt: skip
