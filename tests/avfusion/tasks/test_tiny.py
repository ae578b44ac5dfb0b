"""The embedded default from end to end, `pytest -m slow`: pre-training and every task on it beat their baselines.

The margins are those that docs/ state. Everything is seeded; figures still differ a little from machine to machine.
"""

import csv
import json

import pytest

from avfusion.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a pre-trained encoder, as `avfusion pretrain tiny` leaves it."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["pretrain", "tiny"]) == 0
    return folder


def evaluate(name, root, monkeypatch):
    monkeypatch.chdir(root)
    assert main([name, "train", "tiny", "--encoder", "runs/tiny"]) == 0
    assert main([name, "eval", f"runs/{name}-tiny"]) == 0
    return json.loads((root / f"runs/{name}-tiny/eval/summary.json").read_text())["summary"]


def test_pretraining_teaches_the_fusion_tokens(root):
    with open(root / "runs/tiny/evaluations.csv", newline="") as file:
        first, *_, last = ({key: float(value) for key, value in row.items()} for row in csv.DictReader(file))
    assert last["fusion"] > last["chance"] + 0.3
    assert last["fusion"] > first["fusion"] + 0.05
    assert (root / "runs/tiny/pictures/step-00000000.png").exists()


def test_probe(root, monkeypatch):
    found = evaluate("probe", root, monkeypatch)
    assert found["top-1"] > found["chance"] + 0.3


def test_finetune(root, monkeypatch):
    found = evaluate("finetune", root, monkeypatch)
    assert found["top-1"] > found["chance"] + 0.4


def test_retrieve(root, monkeypatch):
    found = evaluate("retrieve", root, monkeypatch)
    assert found["nearest_neighbour_fusion"] > found["nearest_neighbour_chance"] + 0.3
    assert found["audio_to_image_recall@10"] > found["chance_recall@10"] + 0.02
    assert found["audio_to_image_median_rank"] < found["chance_median_rank"] - 15


def test_localize(root, monkeypatch):
    found = evaluate("localize", root, monkeypatch)
    for baseline in ("center", "other sound"):
        assert found["cIoU@0.5 contrast"] > found[f"cIoU@0.5 {baseline}"] + 0.2
        assert found["AUC contrast"] > found[f"AUC {baseline}"] + 0.08


def test_separate(root, monkeypatch):
    found = evaluate("separate", root, monkeypatch)
    assert found["SDR"] > found["SDR mixture"] + 3


def test_segment(root, monkeypatch):
    found = evaluate("segment", root, monkeypatch)
    for definition, margin in (("benchmark", 0.1), ("release", 0.2)):
        name = f"foreground mIoU ({definition})"
        assert found[name] > found[f"{name} center"] + margin
