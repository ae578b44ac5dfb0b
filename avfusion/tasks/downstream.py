"""What tasks on top of an encoder share: where it starts from, labels that must agree; a run loaded, evaluated, asked.

What is found goes where people look: JSON, CSV, pictures, sounds.
"""

import json
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import safetensors
import soundfile
import torch
from safetensors import safe_open
from torch import Tensor, nn

from avfusion.common import meant, setting
from avfusion.data.samples import Source
from avfusion.data.tags import read_tags
from avfusion.files import save_tensors, write_json, writing
from avfusion.media.clip import Clip
from avfusion.media.transforms import whole_frame
from avfusion.models.checkpoint import PACKAGED, CheckpointError, load_encoder
from avfusion.models.deepavfusion import DeepAVFusion, EncoderConfig
from avfusion.tasks import DOWNSTREAM, task_class
from avfusion.training.config import Checked, TrainConfig
from avfusion.training.optim import layer_decay_groups
from avfusion.training.run_folder import latest_checkpoint, write_csv
from avfusion.training.task import Task, autocast, device_of
from avfusion.viz.plots import plot_overlay
from avfusion.viz.run_page import best_and_worst, show_run

# Presets: `paper` are those of the authors' released commands (what differs: docs/fidelity.md); `tiny` run on synthetic
# clips in minutes.
TRAINED = {"blr": 3e-4, "weight_decay": 0.05, "batch_size": 512, "betas": (0.9, 0.999)}
SMALL = {"workers": 2, "synth_classes": 6, "batch_size": 32}


@dataclass(frozen=True)
class EncoderSettings(Checked):
    weights: str = setting("", "pre-trained weights: a run of `avfusion pretrain`, or a file that `load_encoder` reads",
                           name="encoder")  # fmt: skip
    fusion_num_heads: int = setting(0, "heads of its fusion blocks (default: as the weights tell, or a guess that is "
                                       "named)", least=0)  # fmt: skip
    from_scratch: bool = setting(False, "start from random weights, of the shape of --encoder or else the paper's")
    drop_path: float = setting(0.0, "stochastic depth of the encoder")
    layer_decay: float = setting(0.75, "share of the learning rate that a layer gets of the next one's")

    def __post_init__(self):
        super().__post_init__()
        if not self.weights and not self.from_scratch:
            raise ValueError(
                "encoder: give pre-trained weights, --encoder RUN or FILE, or ask for random ones by --from-scratch"
            )


@dataclass(frozen=True)
class DownstreamConfig(TrainConfig):
    """A task on top of an encoder. Raises ValueError where it has no weights and none are renounced."""

    encoder: EncoderSettings = field(default_factory=EncoderSettings)


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

    settings = DownstreamConfig
    measures: ClassVar[str]
    needs_labels = True
    multi_label = False  # of a run that is loaded: whether its clips may have several labels

    def __init__(
        self, config: DownstreamConfig, encoder_config: EncoderConfig | None = None, classes: Sequence[str] = ()
    ):
        self.pretrained, start = None, config.encoder
        if encoder_config is None:  # a new run
            encoder_config = EncoderConfig()
            if start.weights:
                known = {"fusion_num_heads": start.fusion_num_heads} if start.fusion_num_heads else {}
                self.pretrained = load_encoder(encoder_file(start.weights), **known)
                encoder_config = self.pretrained.config
            encoder_config = replace(encoder_config, drop_path=start.drop_path)
        self.classes = tuple(classes)
        super().__init__(config, encoder_config)

    def check(self) -> None:
        known, self.classes = self.classes, self.classes or ("any", "other")
        super().check()
        self.classes = known

    def build_encoder(self, *, weights: bool) -> DeepAVFusion:
        encoder = DeepAVFusion(self.encoder_config)
        if weights and not self.config.encoder.from_scratch:
            encoder.load_state_dict(self.pretrained.state_dict())
        return encoder

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optim, decay = self.config.optim, self.config.encoder.layer_decay
        groups = layer_decay_groups(model, decay=decay, weight_decay=optim.weight_decay)
        return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas)

    def read(self, where: str, split: str) -> Source:
        source = super().read(where, split)
        if self.needs_labels and not source.classes:
            raise ValueError(f"{where}: the layout {self.config.data.layout} has no labels, which {self.name} needs")
        if self.needs_labels and self.classes and tuple(source.classes) != self.classes:
            raise ValueError(f"{where}: its {len(source.classes)} classes are not the {len(self.classes)} of training")
        self.classes = tuple(source.classes)
        return source

    @abstractmethod
    def predict(self, model: nn.Module, clip: Clip) -> Prediction:
        """What the model, in evaluation mode, says of one clip."""

    def inputs_of(self, clip: Clip, device: torch.device, *, whole: bool = False) -> tuple[Tensor, Tensor]:
        """A batch of one; `whole` squeezes the frame instead of cropping it."""
        transform = whole_frame(self.encoder_config.image_size) if whole else self.frame_transform
        return transform(clip.frame)[None].to(device), self.mel.to(device)(clip.waveform[None].to(device))

    show_run = staticmethod(show_run)


def samples_of(source: Source, index: Tensor, scores: Iterable[float], **columns: Iterable) -> list[dict[str, Any]]:
    """The rows of `Result.samples`: of clips `index` [N], their scores, and more columns by name."""
    rows = [{"row": i, "clip": source.name(i), "score": score} for i, score in zip(index.tolist(), scores, strict=True)]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return rows


def encoder_file(path: str) -> str:
    """What holds an encoder's weights, for `load_encoder`: `path` itself, or the last checkpoint of a run.

    Raises CheckpointError where a folder is neither a run nor a saved model.
    """
    if not Path(path).is_dir() or Path(path, "model.safetensors").exists():
        return path
    last = latest_checkpoint(Path(path))
    if last is None:
        raise CheckpointError(f"{path}: no checkpoint of a run in this folder")
    return str(last / "model.safetensors")


def load_run(run: Path, expected: str | None = None) -> tuple[Downstream, nn.Module]:
    """The task of a downstream run and its model, in evaluation mode, with the weights of the last checkpoint.

    `run` is its folder, a file that `save_run` wrote, or the name of one in the package, such as synth-small-localize.
    Raises ValueError where there is none, or it is not of the task that is `expected`.
    """
    run = run if run.exists() else PACKAGED.get(str(run), run)
    last = run if run.is_file() else latest_checkpoint(run)
    if last is None:
        raise ValueError(f"{run}: no checkpoint of a run in this folder{meant(run, PACKAGED)}")
    try:
        with safe_open(last if run.is_file() else last / "model.safetensors", "pt") as file:
            told = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    except safetensors.SafetensorError as error:
        raise ValueError(f"{last}: not a safetensors file: {error}") from error
    text = told.get("run", "{}") if run.is_file() else (run / "run.json").read_text(encoding="utf-8")
    facts = json.loads(text)
    name = facts.get("task")
    if name not in DOWNSTREAM or expected not in (None, name):
        found = f"a run of {name}" if name else "no run of a task"
        raise ValueError(f"{run}: {found}, expected one of {expected or ', '.join(DOWNSTREAM)}")
    cls, encoder_config = task_class(name), EncoderConfig(**json.loads(told["config"]))
    task = cls(cls.settings.of(**facts["settings"]), encoder_config, facts["data"].get("classes", ()))
    task.multi_label = facts["data"].get("multi_label", _layout(task.config) in ("audioset", "music"))
    model = task.build()
    model.load_state_dict(weights)
    return task, model.eval()


def save_run(run: Path, path: Path) -> None:
    """Write a downstream run as one file for `load_run`: the weights of the last checkpoint, in float16."""
    task, model = load_run(run)
    own = dict(model.named_parameters())  # statistics of batch norms stay whole
    state = {key: x.half() if key in own else x for key, x in model.state_dict().items()}
    facts = {"task": task.name, "settings": task.config.flat(),
             "data": {"classes": task.classes, "multi_label": task.multi_label}}  # fmt: skip
    with writing(path) as part:
        save_tensors(part, state, {"config": json.dumps(asdict(task.encoder_config)), "run": json.dumps(facts)})


def _layout(config: DownstreamConfig) -> str:
    """Of the data of a run from before 0.2, whose run.json does not tell whether clips may have several labels."""
    index = Path(config.data.path, "index.json")
    packed = config.data.layout == "shards" and index.is_file()
    return json.loads(index.read_text(encoding="utf-8"))["layout"] if packed else config.data.layout


def evaluate_run(
    run: Path, expected: str, out: Path, *, device: torch.device, dtype: torch.dtype = torch.float32, views: int = 0,
    tags: str = "", **changes,
) -> dict[str, float]:  # fmt: skip
    """Evaluate a run's last checkpoint, on the data of its settings but for `changes` of these.

    Where the task is recognition: `views` windows of each clip are averaged too; `tags`, of `read_tags`, tell what is
    heard and what is seen.

    Writes to `out`: summary.json, samples.csv (a row a clip) and best.png and worst.png by score. Returns the summary.
    """
    task, model = load_run(run, expected)
    task.config, task.thorough, task.views = task.config.but(**changes), True, views
    task.tags = read_tags(tags) if tags else None
    where = task.config.data.eval_data or task.config.data.path
    if "://" not in where and not Path(where).exists():
        raise ValueError(f"{where}: the data that {run} names is not here; name it, or other clips, by --eval-data")
    model.to(device).encoder.compiled = task.config.run.compile
    source = task.open_evaluation()
    batch = min(task.config.optim.batch_size, max(len(source.rows), 1))
    loader = task.loader(source, batch, train=False)
    with torch.no_grad():
        result = task.evaluate(model, loader, dtype)
    facts = {"run": run.name, "task": task.name, "clips": len(result.samples), "sha256": source.sha256}
    write_json(out / "summary.json", facts | {"summary": result.summary}, indent=1)
    if result.samples:
        write_csv(out / "samples.csv", result.samples)
        for name, samples in best_and_worst(result.samples).items():
            task.draw(model, loader, [sample["row"] for sample in samples], out / f"{name}.png")
    return result.summary


@torch.no_grad()
def predict(task: Downstream, model: nn.Module, clip: Clip, dtype: torch.dtype = torch.float32) -> Prediction:
    """`task.predict`, in autocast to `dtype`; what it gives is float32 on the CPU."""
    with autocast(device_of(model), dtype):
        said = task.predict(model, clip)
    maps, sounds = ({name: x.float().cpu() for name, x in found.items()} for found in (said.maps, said.sounds))
    return Prediction(said.facts, maps, sounds)


def write_prediction(prediction: Prediction, clip: Clip, folder: Path) -> list[Path]:
    """Write <clip's name>.json, a picture a map and a sound file a sound; returns the files.

    A clip of the same name in another folder gets a number.
    """
    stem, number = Path(clip.path).stem, 1
    while (file := folder / f"{stem}.json").exists() and json.loads(file.read_text())["clip"] != str(clip.path):
        number += 1
        stem = f"{Path(clip.path).stem}-{number}"
    files = [folder / f"{stem}.json"]
    facts = {"clip": str(clip.path), "start": clip.start, "frame_time": clip.frame_time} | prediction.facts
    write_json(files[0], facts, indent=1)
    for name, values in prediction.maps.items():
        files.append(folder / f"{stem}-{name.replace(' ', '-')}.png")
        plot_overlay(files[-1], clip.frame, values)
    for name, samples in prediction.sounds.items():
        files.append(folder / f"{stem}-{name.replace(' ', '-')}.wav")
        soundfile.write(files[-1], samples.clamp(-1, 1).cpu().numpy(), 16000)
    return files
