"""The downstream commands: each trains, evaluates and predicts on a few small clips; what is refused, and how."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from avfusion import DeepAVFusion, EncoderConfig, save_encoder
from avfusion.cli import main
from avfusion.heads.contrast import Contrast, info_nce, similarity
from avfusion.synth.command import synthesize
from avfusion.synth.scene import Settings
from avfusion.tasks.configs import PRESETS
from avfusion.tasks.contrast import Localize
from avfusion.tasks.downstream import load_run
from avfusion.tasks.recognition import Finetune, Probe
from avfusion.tasks.registry import TASKS

ENCODER = EncoderConfig(
    dim=32, depth=4, num_heads=2, image_size=(64, 64), audio_size=(32, 64), fusion_tokens=2, image_agg_tokens=2,
    audio_agg_tokens=2,
)  # fmt: skip
LAYOUTS = {"localize": "flickr-soundnet", "separate": "vggsound-music", "segment": "avsbench"}
SUMMARY = {
    "probe": {"top-1", "chance"},
    "finetune": {"top-1", "chance"},
    "retrieve": {"audio_to_image_recall@10", "image_to_audio_median_rank", "nearest_neighbour_fusion"},
    "localize": {"cIoU@0.5 contrast", "AUC attention", "cIoU@0.5 center", "AUC other sound"},
    "separate": {"SDR", "SIR", "SAR", "SDR mixture", "SDR oracle", "SDR NMF", "SAR RPCA"},
    "segment": {"mIoU (benchmark)", "mIoU (release)", "foreground F (benchmark)", "foreground mIoU (benchmark) center"},
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(DeepAVFusion(ENCODER), path)
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    made = {}

    def make(layout):
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp("clips") / layout
            synthesize(made[layout], Settings(layout=layout, clips=18, classes=2, size=64, seconds=1.5, fps=4))
        return made[layout]

    return make


def train(name, encoder, clips, out, *options):
    data = clips(LAYOUTS.get(name, "vggsound"))
    settings = {"encoder": encoder, "data": data, "synth-clips": 0, "epochs": 2, "batch-size": 4, "workers": 0,
                "tracker": "none", "out": out, "eval-epochs": 1, "log-steps": 1}  # fmt: skip
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return main([name, "train", "tiny", *words, *options])


@pytest.mark.parametrize("name", TASKS)
def test_a_task_trains_evaluates_and_predicts(name, encoder, clips, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(name, encoder, clips, run) == 0
    with open(run / "evaluations.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0.0", "1.0", "2.0"]
    for picture in ("evaluations.png", "pictures/step-00000000.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    facts = json.loads((run / "run.json").read_text())
    assert facts["task"] == name

    assert main([name, "eval", str(run)]) == 0
    summary = json.loads((run / "eval" / "summary.json").read_text())
    assert summary["summary"].keys() >= SUMMARY[name]
    with open(run / "eval" / "samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == summary["clips"] > 1
    assert {"row", "clip", "score"} <= rows[0].keys()
    for picture in ("best.png", "worst.png"):
        assert (run / "eval" / picture).read_bytes().startswith(b"\x89PNG")

    clip = next(path for path in clips("vggsound").rglob("*.mp4"))
    capsys.readouterr()
    assert main([name, "predict", str(run), str(clip), str(tmp_path / "no.mp4"), "--out", str(tmp_path / "said")]) == 1
    assert "no.mp4" in capsys.readouterr().out
    assert json.loads((tmp_path / "said" / f"{clip.stem}.json").read_text())["clip"] == str(clip)
    seen = {path.suffix for path in (tmp_path / "said").iterdir()}
    assert seen >= {"localize": {".png"}, "segment": {".png"}, "separate": {".wav"}}.get(name, {".json"})


def test_a_run_that_is_loaded_again_is_the_one_that_was_trained(encoder, clips, tmp_path):
    assert train("finetune", encoder, clips, tmp_path / "run") == 0
    task, model = load_run(tmp_path / "run")
    assert isinstance(task, Finetune)
    assert task.encoder_config == replace(ENCODER, drop_path=task.config.drop_path)
    assert not model.training
    changed = [not torch.equal(a, b) for a, b in zip(model.encoder.image.state_dict().values(),
               DeepAVFusion(ENCODER).image.state_dict().values(), strict=True)]  # fmt: skip
    assert any(changed)
    with pytest.raises(ValueError, match="a run of finetune, expected one of probe"):
        load_run(tmp_path / "run", "probe")
    with pytest.raises(ValueError, match="no checkpoint of a run"):
        load_run(tmp_path)


def test_a_probe_changes_no_weight_of_the_encoder(encoder, clips, tmp_path):
    assert train("probe", encoder, clips, tmp_path / "run") == 0
    task, model = load_run(tmp_path / "run")
    task = Probe(task.config)
    for key, value in task.build_encoder(weights=True).state_dict().items():
        assert torch.equal(value, model.encoder.state_dict()[key]), key


def test_random_weights_must_be_asked_for(encoder, clips, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["probe", "train", "tiny", "--data", str(clips("vggsound")), "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert "--from-scratch" in capsys.readouterr().err
    assert train("probe", encoder, clips, tmp_path / "run", "--from-scratch", "--eval-clips", "0") == 0
    task, model = load_run(tmp_path / "run")
    saved = Probe(task.config).pretrained
    assert not torch.equal(model.encoder.fusion_tokens, saved.fusion_tokens)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [("missing.safetensors", "missing.safetensors"), (".", "no checkpoint of a run in this folder")],
)
def test_wrong_encoders_are_named(wrong, message, clips, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        train("probe", wrong, clips, tmp_path / "run")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_other_classes_than_those_of_training_are_refused(encoder, clips, tmp_path, capsys):
    assert train("probe", encoder, clips, tmp_path / "run") == 0
    synthesize(tmp_path / "other", Settings(clips=8, classes=3, size=64, seconds=1.5, fps=4))
    with pytest.raises(SystemExit):
        main(["probe", "eval", str(tmp_path / "run"), "--eval-data", str(tmp_path / "other")])
    assert "its 3 classes are not the 2 of training" in capsys.readouterr().err


def test_mixup_and_smoothing(clips):
    config = TASKS["finetune"][0](data="x", from_scratch=True, mixup=0.5, smoothing=0.1)
    task = Finetune(config, ENCODER, ("a", "b", "c", "d"))
    image, audio, target = torch.randn(4, 3, 2, 2), torch.randn(4, 1, 2, 2), torch.eye(4)
    mixed = task.mix(image, audio, target, torch.arange(4), 0, True)
    again = task.mix(image, audio, target, torch.arange(4), 0, True)
    assert all(torch.equal(a, b) for a, b in zip(mixed, again, strict=True))
    assert mixed[2].sum(1) == pytest.approx(torch.ones(4))
    share = (mixed[0] - image.flip(0))[0, 0, 0, 0] / (image - image.flip(0))[0, 0, 0, 0]
    torch.testing.assert_close(mixed[0], share * image + (1 - share) * image.flip(0))
    torch.testing.assert_close(mixed[1], share * audio + (1 - share) * audio.flip(0))
    smooth = 0.9 * target + 0.1 / 4
    torch.testing.assert_close(mixed[2], share * smooth + (1 - share) * smooth.flip(0))


def test_contrast_compares_the_best_patch_and_never_mixes_clips():
    torch.manual_seed(0)
    model = Contrast(DeepAVFusion(ENCODER), 8).eval()
    image, audio = torch.randn(3, 3, 64, 64), torch.randn(3, 1, 32, 64)
    patches, sound = model(image, audio)
    table = similarity(patches, sound)
    for i in range(3):
        for j in range(3):
            alone = model(image[i : i + 1], audio[j : j + 1])
            cosines = alone[0][0] @ alone[1][0]
            assert table[i, j].item() == pytest.approx((cosines.max() + cosines.mean()).item() / 2, abs=1e-5)
    perfect = torch.eye(3) * 2 - 1
    assert info_nce(perfect, 0.05).item() < 1e-6 < info_nce(-perfect, 0.05).item()
    assert info_nce(torch.zeros(3, 3), 1.0).item() == pytest.approx(torch.tensor(3.0).log().item())


def test_the_other_sound_of_localisation_is_that_of_another_clip():
    torch.manual_seed(0)
    task = Localize(TASKS["localize"][0](data="x", from_scratch=True, contrast_dim=8), ENCODER)
    model, image, audio = task.build().eval(), torch.randn(3, 3, 64, 64), torch.randn(3, 1, 32, 64)
    with torch.no_grad():
        maps, moved = task.maps(model, image, audio), task.maps(model, image, audio[[2, 0, 1]])
    torch.testing.assert_close(maps["other sound"], moved["contrast"])
    assert (maps["other sound"] - maps["contrast"]).abs().amax((1, 2)).min() > 1e-3


def test_presets_name_settings_that_exist():
    for name, presets in PRESETS.items():
        for preset, settings in presets.items():
            TASKS[name][0](**{"data": "somewhere", "from_scratch": True} | settings)
            assert Path(preset).name in ("paper", "tiny")
