"""The encoder in the package: it is there, small, and has learnt what its card says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from avfusion import DeepAVFusion, load_encoder
from avfusion.embedding.embed import Embedder
from avfusion.media.transforms import preprocessing
from avfusion.metrics.neighbours import neighbour_scores
from avfusion.models.checkpoint import PACKAGED, CheckpointError, save_encoder
from avfusion.synth.render import render_frames, render_sources
from avfusion.synth.scene import Settings, draw_scene

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_is_small_and_has_a_card():
    path = PACKAGED["synth-small"]
    assert path.stat().st_size <= 8e6
    with safe_open(path, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118  not a dict
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "python -m bench.checkpoint" in card
    assert "What it is not" in card


def test_it_is_loaded_by_name_for_work_in_float32():
    model = load_encoder("synth-small")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert not model.training
    assert model.config.fusion == "dense"
    assert type(Embedder("synth-small").model) is DeepAVFusion


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("synth-small").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_encoder("synth-small")
    with pytest.raises(CheckpointError, match="no such file"):
        load_encoder("synth-large")


def test_half_precision_files_load_as_float32(tmp_path):
    model = load_encoder("synth-small")
    save_encoder(load_encoder("synth-small").half(), tmp_path / "half.safetensors")
    again = load_encoder(tmp_path / "half.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@torch.no_grad()
def test_it_has_learnt_to_hear():
    """Neighbours among 96 new scenes of 12 classes (chance: 7.4 %), ahead of random weights."""
    settings, model = Settings(seed=987, size=128), load_encoder("synth-small")
    transform, mel, window = preprocessing(model.config.image_size, model.config.audio_size)
    image, audio, labels = [], [], []
    for index in range(96):
        scene = draw_scene(settings, index)
        image.append(transform(Image.fromarray(render_frames(scene, settings.size, np.array([2.0]))[0][0])))
        sound = torch.from_numpy(render_sources(scene).sum(0) / 32768).float()
        audio.append(mel(sound[None, 8000 : 8000 + int(window["duration"] * 16000)]))
        labels.append(scene.label)
    torch.manual_seed(0)
    found = {}
    for name, encoder in {"ours": model, "random": DeepAVFusion(model.config).eval()}.items():
        tokens = encoder(torch.stack(image), torch.stack(audio))
        features = dict(zip(("image", "audio", "fusion"), (x.mean(1) for x in tokens), strict=True))
        found[name] = neighbour_scores(features, torch.tensor(labels))
    assert found["ours"]["chance"] < 0.08
    assert found["ours"]["audio"] > max(0.6, found["random"]["audio"] + 0.2), found
