"""The encoder and the tasks in the package: they are there, small, and have learnt what their cards say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from avfusion import DeepAVFusion, load_encoder
from avfusion.cli import main
from avfusion.embedding.embed import Embedder
from avfusion.media.transforms import preprocessing
from avfusion.metrics.neighbours import neighbour_scores
from avfusion.models.checkpoint import PACKAGED, CheckpointError, save_encoder
from avfusion.synth.make import synthesize
from avfusion.synth.render import render_frames, render_sources
from avfusion.synth.scene import Settings, draw_scene

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["synth-small", "synth-small-localize", "synth-small-separate"])
def test_they_are_small_and_have_cards(name):
    path = PACKAGED[name]
    assert path.stat().st_size <= 8e6
    with safe_open(path, "pt") as file:
        kinds = {file.get_tensor(key).dtype for key in file.keys() if key.endswith("weight")}  # noqa: SIM118
    assert kinds == {torch.float16}
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "python -m bench.checkpoint" in card
    assert "synthetic" in card


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


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """scenes(layout): clips that training has not seen."""

    def made(layout, count, seconds):
        root = tmp_path_factory.mktemp("scenes") / layout
        synthesize(root, Settings(layout, clips=count, seed=987, size=128, seconds=seconds, fps=4))
        return root

    return made


def scores(name, root, tmp_path, clips):
    line = [name, "eval", f"synth-small-{name}", "--eval-data", str(root), "--eval-split", "all"]
    assert main([*line, "--clips", str(clips), "--out", str(tmp_path / "eval")]) == 0
    return json.loads((tmp_path / "eval" / "summary.json").read_text())["summary"]


def test_it_finds_where_a_sound_comes_from(scenes, tmp_path):
    found = scores("localize", scenes("flickr-soundnet", 48, 4.0), tmp_path, 48)
    assert found["cIoU@0.5 contrast"] > found["cIoU@0.5 center"] + 0.15, found
    assert found["cIoU@0.5 contrast"] > found["cIoU@0.5 other sound"] + 0.15, found


def test_an_evaluation_of_a_run_in_the_package_does_not_stand_in_its_way(scenes, tmp_path, monkeypatch):
    """A folder of its name, made for what is found, would be taken for the run."""
    root = scenes("flickr-soundnet", 4, 2.0)
    monkeypatch.chdir(tmp_path)
    line = ["localize", "eval", "synth-small-localize", "--eval-data", str(root), "--eval-split", "all"]
    for _ in range(2):
        assert main(line) == 0
    assert (tmp_path / "synth-small-localize-eval" / "summary.json").exists()


# Separation and its baselines.
def test_it_separates_what_is_seen(scenes, tmp_path):
    root = scenes("vggsound-music", 24, 4.0)
    found = scores("separate", root, tmp_path, 8)
    assert found["SDR"] > found["SDR mixture"] + 3, found
