"""The checkpoints in the package, made anew: `python -m bench.checkpoint FOLDER`.

Pre-trains by `avfusion pretrain synth-small` in FOLDER (interrupted, it goes on), writes the encoder as float16 to
avfusion/models/weights/synth-small.safetensors, measures it on clips that training has not seen, and writes its card
beside it. Then localisation and separation on top of it, likewise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import avfusion.models
from avfusion.embedding.embed import pooled_features
from avfusion.metrics.neighbours import neighbour_scores
from avfusion.models.checkpoint import load_encoder, save_encoder
from avfusion.models.deepavfusion import DeepAVFusion
from avfusion.tasks.downstream import encoder_file, save_run
from avfusion.tasks.pretrain import Pretrain, PretrainConfig
from bench import measure

NAME = "synth-small"
WEIGHTS = Path(avfusion.models.__file__).parent / "weights"
CARD = """\
---
library_name: avfusion
license: apache-2.0
pipeline_tag: feature-extraction
tags: [audio-visual, video, audio]
---

# {name}

A small DeepAVFusion encoder (dense interactions, {layers} layers, {dim} wide, {parameters:.1f} M parameters in float16,
{megabytes:.1f} MB), pre-trained as a masked auto-encoder on {clips:,} clips of this package's synthetic world. It is
there so that every command shows something real at once, and so that tests and lessons need no download.

**What it is not.** It has seen coloured objects before drawn backgrounds and heard synthesised timbres, no photograph
and no recording. Features of real clips tell colours, textures and spectra, not kinds of things. For work, load the
authors' checkpoint, or pre-train on your own clips.

```python
from avfusion import load_encoder

model = load_encoder("{name}")
features = model.embed("clip.mp4")  # x_image [{n_image}, {dim}], x_audio [{n_audio}, {dim}], ...
```

## How it is made

`python -m bench.checkpoint FOLDER`: {epochs} epochs over the training split, preset `{name}` of `avfusion pretrain`.
No setting was chosen by the figures below.

## Figures

Which of 12 classes sounds, on {tested} clips of the test split: by the label of the nearest other clip, and by a linear
classifier (ridge, alpha 100) fitted on the training split. It is one run, so that nothing is claimed about fusion: for
that, see docs/science.md, which has several seeds and intervals.

| features | nearest neighbour | random weights | linear classifier | random weights |
|---|---|---|---|---|
{rows}
| chance | {chance} | | {chance} | |

Measured on {device}, torch {torch}. Float16 weights change the features by {rounding:.0e} of their size at most.
"""

TASK_CARD = """\
---
library_name: avfusion
license: apache-2.0
tags: [audio-visual, video, audio]
---

# {name}

{what}, fine-tuned from `synth-small` on {clips:,} clips of this package's synthetic world: a demonstration, which has
seen drawn objects and heard synthesised timbres alone.

```
avfusion {task} predict {name} clip.mp4
```

Made by `python -m bench.checkpoint FOLDER`: `avfusion {task} train synth-small --encoder RUN`, then
`avfusion {task} eval` on {tested} clips of the test split. No setting was chosen by the figures below.

| score | |
|---|---|
{rows}

Measured on {device}, torch {torch}.
"""
TASKS = {"localize": "Sound source localisation", "separate": "Visually guided source separation"}


def features_of(task: Pretrain, encoder: DeepAVFusion) -> dict[str, tuple[dict[str, Tensor], Tensor]]:
    """Pooled features and labels of the training and of the test split."""
    found = {}
    for split in ("train", "test"):
        loader = task.loader(task.read(task.config.data.path, split), 64, train=False)
        found[split] = pooled_features(encoder, loader, task.mel)
    return found


def scores_of(found: dict[str, tuple[dict[str, Tensor], Tensor]]) -> dict[str, dict[str, float]]:
    (train, labels), (test, truth) = found["train"], found["test"]
    linear = {}
    for name, x in train.items():
        scale = StandardScaler().fit(x.numpy())
        reader = RidgeClassifier(100).fit(scale.transform(x.numpy()), labels.numpy())
        linear[name] = reader.score(scale.transform(test[name].numpy()), truth.numpy())
    return {"neighbour": neighbour_scores(test, truth), "linear": linear}


def make_task(folder: Path, name: str) -> None:
    """Train and evaluate a task on the encoder in the folder; write weights and card."""
    run, packed = folder / "runs" / f"{name}-synth-small", WEIGHTS / f"{NAME}-{name}.safetensors"
    command = [sys.executable, "-m", "avfusion", name]
    subprocess.run([*command, "train", NAME, "--encoder", f"runs/{NAME}", "--resume"], cwd=folder, check=True)
    save_run(run, packed)
    subprocess.run([*command, "eval", str(run)], cwd=folder, check=True)
    facts = json.loads((run / "run.json").read_text())
    found = json.loads((run / "eval" / "summary.json").read_text())
    packed.with_suffix(".md").write_text(TASK_CARD.format(
        name=packed.stem, what=TASKS[name], task=name, clips=facts["data"]["clips"], tested=found["clips"],
        rows="\n".join(f"| {score} | {value:.3f} |" for score, value in found["summary"].items()),
        device=measure.device_name(measure.DEVICE), torch=torch.__version__,
    ), encoding="utf-8")  # fmt: skip
    print(packed.with_suffix(".md").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoint", description=__doc__.split("\n\n")[0],
                                     epilog=__doc__.split("\n\n")[1])  # fmt: skip
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="data and run go there")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "avfusion", "pretrain", NAME, "--resume"], cwd=folder, check=True)
    run = folder / "runs" / NAME
    encoder = load_encoder(encoder_file(str(run)))
    path = WEIGHTS / f"{NAME}.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_encoder(load_encoder(encoder_file(str(run))).half(), path)

    facts = json.loads((run / "run.json").read_text())
    settings = PretrainConfig.of(**facts["settings"] | {"data": str(folder / facts["settings"]["data"])})
    task = Pretrain(settings)
    packed, config = load_encoder(path), encoder.config
    torch.manual_seed(0)
    features = {name: features_of(task, model) for name, model in
                (("ours", packed), ("whole", encoder), ("random", DeepAVFusion(config).eval()))}  # fmt: skip
    ours, random = scores_of(features["ours"]), scores_of(features["random"])
    pairs = [(features["ours"]["test"][0][n], features["whole"]["test"][0][n]) for n in ("image", "audio", "fusion")]
    percent = {
        name: [f"{scores[way][name]:.1%}" for way in ("neighbour", "linear") for scores in (ours, random)]
        for name in ours["linear"]
    }
    path.with_suffix(".md").write_text(CARD.format(
        name=NAME, layers=config.depth, dim=config.dim, megabytes=path.stat().st_size / 1e6,
        parameters=sum(x.numel() for x in encoder.parameters()) / 1e6, clips=facts["data"]["clips"],
        n_image=config.image_grid[0] * config.image_grid[1], n_audio=config.audio_grid[0] * config.audio_grid[1],
        n_fusion=config.num_fusion_tokens, epochs=settings.optim.epochs, tested=len(features["ours"]["test"][1]),
        rows="\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in percent.items()),
        chance=f"{ours['neighbour']['chance']:.1%}", device=measure.device_name(measure.DEVICE),
        torch=torch.__version__, rounding=max(((a - b).norm() / b.norm()).item() for a, b in pairs),
    ), encoding="utf-8")  # fmt: skip
    print(path.with_suffix(".md").read_text())
    for name in TASKS:
        make_task(folder.resolve(), name)


if __name__ == "__main__":
    main()
