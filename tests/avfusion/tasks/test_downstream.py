"""The downstream commands: each trains, evaluates and predicts on a few small clips; what is refused, and how."""

import contextlib
import csv
import functools
import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from avfusion import DeepAVFusion, EncoderConfig, save_encoder
from avfusion.cli import main
from avfusion.data import pack, read
from avfusion.data.tags import COLUMNS
from avfusion.media.reader import read_clip
from avfusion.models.heads.contrast import Contrast, info_nce, similarity
from avfusion.synth.make import synthesize
from avfusion.synth.scene import Settings
from avfusion.tasks import DOWNSTREAM, task_class
from avfusion.tasks.downstream import evaluate_run, load_run, predict, save_run
from avfusion.tasks.localization import Localize
from avfusion.tasks.recognition import Finetune, Probe
from avfusion.tasks.retrieval import Retrieve
from avfusion.tasks.separation import Separate

ENCODER = EncoderConfig(
    dim=32, depth=4, num_heads=2, image_size=(64, 64), audio_size=(32, 64), fusion_tokens=2, image_agg_tokens=2,
    audio_agg_tokens=2,
)  # fmt: skip
pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]
LAYOUTS = {"localize": "flickr-soundnet", "separate": "vggsound-music", "segment": "avsbench"}
SUMMARY = {
    "probe": {"top-1", "chance", "top-1 image", "top-1 (3 views)", "top-1 fusion (3 views)"},
    "finetune": {
        "top-1",
        "chance",
        "top-1 image",
        "top-1 audio",
        "top-1 fusion",
        "tagged clips",
        "F1@1 both",
        "hits@1 audio",
        "macro F1@1 image",
        "mu audio",
        "mu image",
        "mu either",
    },
    "retrieve": {"audio_to_image_recall@10", "image_to_audio_median_rank", "nearest_neighbour_fusion"},
    "localize": {
        "cIoU@0.5 contrast",
        "AUC attention",
        "cIoU@0.5 center",
        "AUC other sound",
        "threshold",
        "hits",
        "AUC negative silence",
        "false alarms noise",
        "false area other sound",
    },
    "separate": {"SDR", "SIR", "SAR", "SDR mixture", "SDR oracle", "SDR NMF", "SAR RPCA"},
    "segment": {
        "mIoU (benchmark)",
        "mIoU (release)",
        "mIoU without background (ours)",
        "foreground F (benchmark)",
        "foreground F (ours)",
        "foreground mIoU (benchmark) center",
    },
}


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
    settings = {"encoder": encoder, "data": data, "synth-clips": 0, "epochs": 1, "batch-size": 4, "workers": 0,
                "tracker": "none", "out": out, "eval-epochs": 1, "log-steps": 1}  # fmt: skip
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return main([name, "train", "tiny", *words, *options])


@pytest.fixture(scope="module")
def trained(encoder, clips, tmp_path_factory):
    """trained(name) -> the folder of a run of that task, which tests read; trained once."""

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp("runs") / name
        assert train(name, encoder, clips, folder) == 0
        return folder

    return run


# An epoch of a net of four layers, and its scores: separation and segmentation take several seconds.
@pytest.mark.parametrize("name", DOWNSTREAM)
def test_a_task_trains_evaluates_and_predicts(name, trained, clips, tmp_path, capsys):
    run = trained(name)
    with open(run / "evaluations.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0.0", "1.0"]
    assert (run / "pictures/step-00000000.png").read_bytes().startswith(b"\x89PNG")
    page = (run / "run.html").read_text()
    assert page.count("data:image/svg+xml") > 1
    facts = json.loads((run / "run.json").read_text())
    assert facts["task"] == name

    more = {"probe": ["--views", "3"], "finetune": ["--tags", str(clips("vggsound") / "annotations/vggsounder.csv")]}
    assert main([name, "eval", str(run), *more.get(name, [])]) == 0
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
    assert main([name, "predict", str(run), str(clip), str(tmp_path / "no.mp4"), "--out", str(tmp_path / "said")]) == 3
    told = capsys.readouterr()
    assert "no.mp4" in told.err  # test_failed_clips_of_predict_go_to_stderr
    assert "no.mp4" not in told.out
    assert json.loads((tmp_path / "said" / f"{clip.stem}.json").read_text())["clip"] == str(clip)
    seen = {path.suffix for path in (tmp_path / "said").iterdir()}
    assert seen >= {"localize": {".png"}, "segment": {".png"}, "separate": {".wav"}}.get(name, {".json"})


def test_a_clip_that_fails_keeps_no_other_clips_tags(trained, clips, tmp_path, monkeypatch):
    """Its row is left out of the labels as of the scores; and tags that cannot be meant are told first."""
    root, tags = shutil.copytree(clips("vggsound"), tmp_path / "set"), "annotations/vggsounder.csv"
    first = read("vggsound", root, split="test").rows[0]
    first.path.write_bytes(b"no video")
    monkeypatch.setattr("avfusion.data.loader.check_failures", lambda *_: None)  # one of three is too many
    run, where = trained("finetune"), {"device": torch.device("cpu"), "eval_data": str(root)}
    found = evaluate_run(run, "finetune", tmp_path / "out", tags=str(root / tags), **where)
    assert found["tagged clips"] == len(read("vggsound", root, split="test").rows) - 1
    (root / tags).write_text("\n".join([COLUMNS, f"{first.id},no class,AV,False,False,False"]))
    with pytest.raises(ValueError, match="the tag 'no class' is none of the 2 classes"):
        evaluate_run(run, "finetune", tmp_path / "out", tags=str(root / tags), **where)
    (root / tags).write_text(f"{COLUMNS}\n")
    with pytest.raises(ValueError, match="--tags: none of its 0 clips"):
        evaluate_run(run, "finetune", tmp_path / "out", tags=str(root / tags), **where)


def test_a_run_that_is_loaded_again_is_the_one_that_was_trained(trained, tmp_path):
    task, model = load_run(trained("finetune"))
    assert isinstance(task, Finetune)
    assert task.encoder_config == replace(ENCODER, drop_path=task.config.encoder.drop_path)
    assert not model.training
    changed = [not torch.equal(a, b) for a, b in zip(model.encoder.image.state_dict().values(),
               DeepAVFusion(ENCODER).image.state_dict().values(), strict=True)]  # fmt: skip
    assert any(changed)
    assert main(["export", str(trained("finetune")), "--format", "authors", "--out", str(tmp_path / "f.pth")]) == 0
    content = torch.load(tmp_path / "f.pth", weights_only=True)  # for others to start from, not to be resumed
    assert "optimizer" not in content
    assert any(name.startswith("fusion_head.") for name in content["state_dict"])
    with pytest.raises(ValueError, match="a run of finetune, expected one of probe"):
        load_run(trained("finetune"), "probe")
    with pytest.raises(ValueError, match="no checkpoint of a run"):
        load_run(tmp_path)


def test_a_probe_changes_no_weight_of_the_encoder(trained):
    task, model = load_run(trained("probe"))
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
    assert train("probe", wrong, clips, tmp_path / "run") == 1
    assert message in capsys.readouterr().err


def test_other_classes_than_those_of_training_are_refused_but_where_a_task_has_none(trained, tmp_path, capsys):
    """As localisation, trained on VGGSound, is evaluated on VGG-SS."""
    synthesize(tmp_path / "other", Settings(clips=8, classes=3, size=64, seconds=1.5, fps=4))
    assert main(["probe", "eval", str(trained("probe")), "--eval-data", str(tmp_path / "other")]) == 1
    assert "its 3 classes are not the 2 of training" in capsys.readouterr().err
    out = ["--out", str(tmp_path / "eval")]
    assert main(["retrieve", "eval", str(trained("retrieve")), "--eval-data", str(tmp_path / "other"), *out]) == 0


# A set and a run of their own.
def test_clips_with_several_labels_are_evaluated_too(encoder, tmp_path):
    data, run = tmp_path / "clips", tmp_path / "run"
    synthesize(data, Settings(layout="audioset", clips=24, classes=3, size=64, seconds=1.5, fps=4))
    table = read("audioset", data, "eval")
    assert {len(row.labels) for row in table.rows} > {1}
    options = ["--layout", "audioset", "--split", "balanced_train", "--eval-split", "eval"]
    assert train("finetune", encoder, lambda _: data, run, *options) == 0
    assert main(["finetune", "eval", str(run)]) == 0
    summary = json.loads((run / "eval" / "summary.json").read_text())
    assert summary["clips"] == len(table)
    assert {"mAP", "AUC", "mAP image", "AUC fusion"} <= summary["summary"].keys()
    with open(run / "eval" / "samples.csv", newline="") as file:
        assert any(";" in row["labels"] for row in csv.DictReader(file))

    # test_predict_of_a_multi_label_set_is_a_sigmoid
    clip = read_clip(table.rows[0].path, **load_run(run)[0].window)
    facts = json.loads((run / "run.json").read_text())
    assert facts["data"].pop("multi_label") is True
    for text in (facts | {"data": facts["data"] | {"multi_label": True}}, facts):  # as now, and as runs were before
        (run / "run.json").write_text(json.dumps(text))
        task, model = load_run(run)
        logits = model(*task.inputs_of(clip, torch.device("cpu")), average=True)[0]
        said = predict(task, model, clip).facts["classes"]
        assert said == pytest.approx(
            {name: logits[i].sigmoid().item() for i, name in enumerate(table.classes)}, abs=1e-6
        )


def test_shards_are_trained_and_evaluated_by_split(encoder, clips, tmp_path, capsys):
    table = read("vggsound", clips("vggsound"))
    pack(table, tmp_path / "shards", clips_per_shard=4)
    run, layout = tmp_path / "run", ["--layout", "shards"]
    assert train("finetune", encoder, lambda _: tmp_path / "shards", run, *layout) == 0
    facts = json.loads((run / "run.json").read_text())
    assert facts["data"]["clips"] == sum(row.split == "train" for row in table.rows)
    assert main(["finetune", "eval", str(run)]) == 0
    summary = json.loads((run / "eval" / "summary.json").read_text())
    assert summary["clips"] == sum(row.split == "test" for row in table.rows)
    for words, message in (
        (["--split", "val"], "split='val': expected one of test, train, all; did you mean all? (name another, or all"),
        (["--data", "https://localhost/x"], "need --shard-cache"),
    ):
        assert train("finetune", encoder, lambda _: tmp_path / "shards", tmp_path / "other", *layout, *words) == 1
        assert message in capsys.readouterr().err


def test_a_step_that_is_not_finite_leaves_batch_norms_as_they_were(encoder, clips, tmp_path, monkeypatch):
    losses, steps = Probe.losses, iter(range(100))

    def poisoned(self, model, image, *inputs):
        return losses(self, model, image * (torch.nan if next(steps) == 1 else 1), *inputs)

    monkeypatch.setattr(Probe, "losses", poisoned)
    assert train("probe", encoder, clips, tmp_path / "run", "--eval-clips", "0") == 0
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == 1
    _, model = load_run(tmp_path / "run")
    assert all(x.isfinite().all() for x in model.state_dict().values())


# Scores of separation, with their baselines, twice.
def test_partners_in_an_evaluation_are_the_same_each_time(encoder, clips, tmp_path):
    options = ["--eval-split", "test", "--blr", "0"]
    assert train("separate", encoder, clips, tmp_path / "run", *options) == 0
    with open(tmp_path / "run" / "evaluations.csv", newline="") as file:
        mixtures = {row["SDR mixture"] for row in csv.DictReader(file)}
    assert len(mixtures) == 1


def test_clips_without_a_score_are_neither_best_nor_worst(trained, tmp_path, monkeypatch):
    run = trained("retrieve")
    evaluate, drawn, without = Retrieve.evaluate, [], []

    def silent(*args):
        result = evaluate(*args)
        for i, sample in enumerate(result.samples):
            sample["score"] = float(i) if i else float("nan")
        without.append(result.samples[0]["row"])
        return result

    monkeypatch.setattr(Retrieve, "evaluate", silent)
    monkeypatch.setattr(Retrieve, "draw", lambda self, model, loader, rows, path: drawn.append(rows))
    assert main(["retrieve", "eval", str(run), "--out", str(tmp_path / "eval")]) == 0
    best, worst = drawn
    assert not set(best) & set(worst)
    assert without[0] not in best + worst
    assert best == sorted(best, reverse=True)
    assert worst == sorted(worst)


@pytest.mark.parametrize("name", ["finetune", "separate"])
def test_a_run_as_one_file_says_what_the_folder_says(name, trained, clips, tmp_path):
    path = tmp_path / "one.safetensors"
    save_run(trained(name), path)
    (task, model), (again, loaded) = load_run(trained(name)), load_run(path, name)
    assert (again.config, again.classes, again.encoder_config) == (task.config, task.classes, task.encoder_config)
    theirs = dict(loaded.named_parameters())
    assert all(torch.equal(theirs[key], x.half().float()) for key, x in model.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), model.buffers(), strict=True))
    clip = read_clip(next(clips("vggsound").rglob("*.mp4")), **task.window)
    said, expected = predict(again, loaded, clip), predict(task, model, clip)
    for name, sound in expected.sounds.items():
        torch.testing.assert_close(said.sounds[name], sound, atol=2e-3, rtol=0)
    assert said.facts.keys() == expected.facts.keys()


def test_what_is_no_run_is_told(trained, encoder, tmp_path):
    (tmp_path / "text").write_text("no weights")
    save_run(trained("finetune"), tmp_path / "one.safetensors")
    for path, task, message in (
        (tmp_path / "text", None, "text: not a safetensors file"),
        (encoder, None, "no run of a task, expected one of probe"),
        (tmp_path / "one.safetensors", "localize", "a run of finetune, expected one of localize"),
        (tmp_path / "none", None, "none: no checkpoint of a run in this folder"),
    ):
        with pytest.raises(ValueError, match=message):
            load_run(Path(path), task)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("probe", ["--layer-decay", "0.5"], "layer_decay=0.5: a probe trains no encoder"),
        ("probe", ["--weight-decay", "0.1"], "weight_decay=0.1: a probe trains no encoder"),
        ("retrieve", ["--accumulation", "2"], "accumulation=2: each clip is told from all others of its step"),
        ("finetune", ["--batch-size", "32", "--accumulation", "4"], "batch_size=32: the set has only"),
    ],
)
def test_settings_that_would_do_nothing_or_something_else_are_refused(
    name, options, message, encoder, clips, tmp_path, capsys
):
    with contextlib.suppress(SystemExit):
        assert train(name, encoder, clips, tmp_path / "run", *options) == 1  # the clips tell
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "changes"), [("retrieve", {"accumulation": 2}), ("probe", {"weight_decay": 0.0})])
def test_runs_made_with_settings_that_are_refused_now_can_still_be_read(name, changes, trained, tmp_path):
    shutil.copytree(trained(name), tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    facts = json.loads(path.read_text())
    facts["settings"] |= changes
    path.write_text(json.dumps(facts))
    assert main([name, "eval", str(tmp_path / "run")]) == 0


CONTRAST = """
import sys, torch
from torch.nn.parallel import DistributedDataParallel
from avfusion import EncoderConfig, distributed
from avfusion.data.loader import Batch
from avfusion.tasks.retrieval import Retrieve

def work():
    encoder = EncoderConfig(dim=32, depth=1, num_heads=2, image_size=(32, 32), audio_size=(32, 64))
    task = Retrieve(Retrieve.settings.of(data="x", from_scratch=True, contrast_dim=8), encoder)
    torch.manual_seed(0)
    model = task.build()
    image, waveform = torch.randn(6, 3, 32, 32), torch.randn(6, 1, 16000)
    rank, ranks = distributed.rank(), distributed.world_size()
    own = [x[rank * 6 // ranks : (rank + 1) * 6 // ranks] for x in (image, waveform)]
    batch = Batch(*own, None, None, None, None)
    trained = DistributedDataParallel(model) if ranks > 1 else model
    loss = task.losses(trained, *task.prepare(batch, 0, torch.device("cpu")))["contrast"]
    loss.backward()
    if rank == 0:
        torch.save([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)], sys.argv[1])
    distributed.barrier()

distributed.start("cpu")
work()
distributed.stop()
"""


# Starting torch three times over is what takes long.
def test_several_processes_contrast_all_clips_of_a_step(tmp_path, monkeypatch):
    (tmp_path / "work.py").write_text(CONTRAST)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    both = [*torchrun, str(tmp_path / "work.py"), str(tmp_path / "two.pt")]
    done = subprocess.run(both, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", ["work.py", str(tmp_path / "one.pt")])
    runpy.run_path(str(tmp_path / "work.py"))
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    torch.testing.assert_close(two.pop(0), one.pop(0))
    one, two = (torch.cat([grad.flatten() for grad in grads]) for grads in (one, two))
    assert (two - one).norm() <= 8 * torch.finfo(torch.float32).eps * one.norm()  # the order of sums


def test_a_mixture_costs_two_passes():
    task = Separate(Separate.settings.of(data="x", from_scratch=True), ENCODER)
    assert task.flop() == 2 * super(Separate, task).flop()


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
    task = Localize(Localize.settings.of(data="x", from_scratch=True, contrast_dim=8), ENCODER)
    model, image, audio = task.build().eval(), torch.randn(3, 3, 64, 64), torch.randn(3, 1, 32, 64)
    with torch.no_grad():
        maps, moved = task.maps(model, image, audio), task.maps(model, image, audio[[2, 0, 1]])
    torch.testing.assert_close(maps["other sound"], moved["contrast"])
    assert (maps["other sound"] - maps["contrast"]).abs().amax((1, 2)).min() > 1e-3


def test_presets_name_settings_that_exist():
    for name in DOWNSTREAM:
        task = task_class(name)
        assert task.name == name
        assert {"paper", "tiny"} <= set(task.presets)
        for settings in task.presets.values():
            task.settings.of(**{"data": "somewhere", "from_scratch": True} | settings)
