"""A seventh task is one new file and one line: in a copy of the package it trains, evaluates and predicts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import avfusion
from avfusion import DeepAVFusion, EncoderConfig, save_encoder
from avfusion.synth.make import synthesize
from avfusion.synth.scene import Settings

LOUDNESS = '''
"""How loud a clip is, from its fusion tokens."""

from dataclasses import dataclass

import torch
from torch import nn

from avfusion.common import setting
from avfusion.tasks.downstream import SMALL, Downstream, DownstreamConfig, Prediction, samples_of
from avfusion.training.task import Result, device_of, gathered
from avfusion.viz.plots import plot_clips


@dataclass(frozen=True)
class LoudnessConfig(DownstreamConfig):
    margin: float = setting(0.1, "of the error that is not counted", least=0)


class Head(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.read = encoder, nn.Linear(encoder.config.dim, 1)

    def forward(self, image, audio):
        return self.read(self.encoder(image, audio)[2].mean(1))[:, 0]


class Loudness(Downstream):
    name, settings, needs_labels = "loudness", LoudnessConfig, False
    measures = "the mean error"
    presets = {"tiny": SMALL | {"epochs": 1}}

    def build(self, *, weights=False):
        return Head(self.build_encoder(weights=weights))

    def losses(self, model, image, audio):
        return {"error": ((model(image, audio) - audio.mean((1, 2, 3))).abs() - self.config.margin).clamp(min=0).mean()}

    @torch.no_grad()
    def evaluate(self, model, loader, dtype):
        rows, device = [], device_of(model)
        for batch in loader:
            image, audio = self.inputs(batch, device)
            rows.append((batch.index, (model(image, audio) - audio.mean((1, 2, 3))).abs()))
        index, error = gathered(rows)
        return Result({"error": error.mean().item()}, samples_of(loader.source, index, (-error).tolist()))

    def draw(self, model, loader, rows, path):
        image, audio = self.inputs(loader.some(rows), device_of(model))
        plot_clips(path, image, audio, [""] * len(image))

    def predict(self, model, clip):
        return Prediction({"loudness": model(*self.inputs_of(clip, device_of(model))).item()})
'''


# A process of its own, which starts torch.
def test_a_seventh_task_is_a_file_and_a_line(tmp_path):
    package = tmp_path / "avfusion"
    shutil.copytree(Path(avfusion.__file__).parent, package)
    (package / "tasks" / "loudness.py").write_text(LOUDNESS)
    registry = package / "tasks" / "__init__.py"
    line = '    "loudness": ("loudness", "Loudness", "say how loud a clip is"),\n'
    registry.write_text(registry.read_text().replace('    "segment": (', line + '    "segment": ('))

    torch.manual_seed(0)
    encoder, data, run = tmp_path / "encoder.safetensors", tmp_path / "data", tmp_path / "run"
    config = EncoderConfig(dim=32, depth=1, num_heads=2, image_size=(32, 32), audio_size=(32, 64))
    save_encoder(DeepAVFusion(config), encoder)
    synthesize(data, Settings(clips=10, classes=2, size=64, seconds=1.5, fps=4))
    clip = next(data.rglob("*.mp4"))

    options = "--margin 0.2 --workers 0 --synth-clips 0 --batch-size 4 --tracker none --eval-epochs 1"
    commands = [
        f"loudness train tiny --encoder {encoder} --data {data} --out {run} {options}",
        f"loudness eval {run} --threads 1",
        f"loudness predict {run} {clip} --out {tmp_path / 'said'}",
    ]
    code = "import sys; from avfusion.cli import main; assert not any(main(line.split()) for line in sys.argv[1:])"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *commands], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "run.json").read_text())["settings"]["margin"] == 0.2
    assert "error" in json.loads((run / "eval" / "summary.json").read_text())["summary"]
    assert "loudness" in json.loads((tmp_path / "said" / f"{clip.stem}.json").read_text())
