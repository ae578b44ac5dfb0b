"""Settings of the downstream tasks, and their presets. Light to import.

`paper` presets are those of the authors' released configuration files, with the batch of one of their GPUs; `tiny`
runs on synthetic clips in minutes.
"""

from dataclasses import dataclass, fields

from avfusion.config import TrainConfig, setting


@dataclass(frozen=True)
class DownstreamConfig(TrainConfig):
    """A task on top of an encoder. Raises ValueError where it has no weights and none are renounced."""

    encoder: str = setting("", "pre-trained weights: a run of `avfusion pretrain`, or a file that `load_encoder` reads")
    from_scratch: bool = setting(False, "start from random weights, of the shape of --encoder or else the paper's")
    layer_decay: float = setting(0.75, "share of the learning rate that a layer gets of the next one's")

    def __post_init__(self):
        super().__post_init__()
        if not self.encoder and not self.from_scratch:
            raise ValueError(
                "encoder: give pre-trained weights, --encoder RUN or FILE, or ask for random ones by --from-scratch"
            )

    def check_new(self) -> None:
        """Raises ValueError for settings that a run cannot be trained with; one that has been can be loaded."""


@dataclass(frozen=True)
class ProbeConfig(DownstreamConfig):
    """A linear probe: the encoder stays as it is. LARS, without weight decay."""

    def check_new(self) -> None:
        for item in fields(self):
            given = getattr(self, item.name)
            if item.name in ("weight_decay", "betas", "layer_decay", "drop_path") and given != item.default:
                raise ValueError(f"{item.name}={given}: a probe trains no encoder, and its heads by LARS without decay")


@dataclass(frozen=True)
class FinetuneConfig(DownstreamConfig):
    """Recognition with all weights trained."""

    mixup: float = setting(1.0, "alpha of the Beta distribution by which clips are mixed; 0: they are not")
    smoothing: float = setting(0.1, "label smoothing, where clips have one label each")


@dataclass(frozen=True)
class ContrastConfig(DownstreamConfig):
    """Retrieval and localisation: the picture and the sound of a clip are to be alike."""

    contrast_dim: int = setting(256, "width of the space in which pictures and sounds are compared")
    temperature: float = setting(0.1, "of the softmax over clips")

    def check_new(self) -> None:
        if self.accumulation != 1:
            raise ValueError(f"accumulation={self.accumulation}: each clip is told from all others of its step, which "
                             "parts would not be; take a smaller batch, or more processes")  # fmt: skip


@dataclass(frozen=True)
class SeparateConfig(DownstreamConfig):
    """Mix and separate."""


@dataclass(frozen=True)
class SegmentConfig(DownstreamConfig):
    """Audio-visual segmentation."""

    subset: str = setting("v2", "part of AVSBench: v1s (S4), v1m (MS3) or v2 (AVSS)", choices=("v1s", "v1m", "v2"))
    semantic: bool = setting(True, "predict classes; otherwise whether a pixel sounds")


TRAINED = {"blr": 3e-4, "weight_decay": 0.05, "batch_size": 128}
SMALL = {"workers": 2, "synth_classes": 6, "batch_size": 32}
PRESETS = {
    "probe": {
        "paper": {"epochs": 60, "batch_size": 256, "blr": 0.3, "warmup_epochs": 10.0},
        "tiny": SMALL | {"data": "data/tiny", "synth_clips": 1000, "epochs": 8, "blr": 16.0, "warmup_epochs": 1.0,
                         "eval_epochs": 5},
    },
    "finetune": {
        "paper": TRAINED | {"epochs": 100, "warmup_epochs": 20.0, "drop_path": 0.2},
        "tiny": SMALL | {"data": "data/tiny", "synth_clips": 1000, "epochs": 8, "blr": 8e-3, "warmup_epochs": 1.0,
                         "drop_path": 0.1, "mixup": 0.2, "eval_epochs": 4},
    },
    "retrieve": {
        "paper": TRAINED | {"epochs": 30, "warmup_epochs": 3.0},
        "tiny": SMALL | {"data": "data/tiny", "synth_clips": 1000, "epochs": 8, "blr": 8e-3, "warmup_epochs": 1.0,
                         "contrast_dim": 64, "eval_epochs": 8},
    },
    "localize": {
        "paper": TRAINED | {"layout": "flickr-soundnet", "epochs": 30, "warmup_epochs": 3.0},
        "tiny": SMALL | {"data": "data/tiny-localize", "layout": "flickr-soundnet", "synth_clips": 1000,
                         "epochs": 10, "blr": 8e-3, "layer_decay": 1.0, "warmup_epochs": 1.0, "contrast_dim": 64,
                         "eval_epochs": 5},
    },
    "separate": {
        "paper": TRAINED | {"layout": "vggsound-music", "eval_split": "pairs", "epochs": 300, "warmup_epochs": 40.0},
        "tiny": SMALL | {"data": "data/tiny-separate", "layout": "vggsound-music", "eval_split": "pairs",
                         "synth_clips": 600, "epochs": 6, "batch_size": 4, "blr": 64e-3, "warmup_epochs": 1.0,
                         "layer_decay": 0.9, "crop_min": 0.8, "eval_epochs": 3, "eval_clips": 32},
    },
    "segment": {
        "paper": TRAINED | {"layout": "avsbench", "epochs": 100, "warmup_epochs": 20.0},
        "tiny": SMALL | {"data": "data/tiny-segment", "layout": "avsbench", "synth_clips": 300, "epochs": 3,
                         "batch_size": 16, "blr": 16e-3, "warmup_epochs": 0.5, "subset": "v2", "eval_epochs": 3,
                         "eval_clips": 100},
    },
}  # fmt: skip
