"""From clips to features: the functions, the file, and the `avfusion embed` command."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made_clips import noise, write_clip
from PIL import Image

from avfusion.cli import main
from avfusion.embedding.embed import embed_clips
from avfusion.embedding.features import Features
from avfusion.embedding.store import DTYPES, StoreError
from avfusion.media.clip import ClipError
from avfusion.media.reader import read_clip
from avfusion.media.transforms import LogMel, image_transform
from avfusion.models.checkpoint import load_encoder, save_encoder
from avfusion.models.deepavfusion import DeepAVFusion, EncoderConfig
from avfusion.viz.plots import plot_clip

# 1 s of 32 mel bands (4 x 2 patches of 16) beside 32 x 48 pixels (2 x 3 patches).
SMALL = {"dim": 32, "depth": 2, "num_heads": 2, "image_size": (32, 48), "audio_size": (32, 64), "fusion_tokens": 4}


def small_model(**options):
    torch.manual_seed(0)
    return DeepAVFusion(EncoderConfig(**SMALL | {"fusion": "dense"} | options))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four good clips of different containers; a file without sound; a missing one."""
    folder = tmp_path_factory.mktemp("clips")
    good = [write_clip(folder / name, seconds=2, sound=noise) for name in ("a.mp4", "b.mkv", "c.mov")]
    good.append(write_clip(folder / "d.webm", seconds=2, sound=noise, video="libvpx", audio="libopus"))
    silent = write_clip(folder / "silent.mp4", seconds=1, audio=None)
    return {"good": good, "silent": silent, "missing": str(folder / "missing.mp4")}


def test_features_are_the_models_outputs_for_the_middle_of_the_clip(clips):
    model = small_model().eval()
    features = model.embed(clips["good"][0])
    clip = read_clip(clips["good"][0], duration=1.0)
    image, audio = image_transform((32, 48))(clip.frame), LogMel(n_mels=32)(clip.waveform)
    with torch.no_grad():
        expected = model(image[None], audio[None])
    for name, x in zip(("x_image", "x_audio", "x_fusion"), expected, strict=True):
        torch.testing.assert_close(features[name], x[0])
    assert features["pooled"].shape == (3, 32)
    torch.testing.assert_close(features["pooled"], torch.stack([x[0].mean(0) for x in expected]))


def test_rows_follow_the_clips_and_failures_are_listed(clips):
    model = small_model()
    a, b, c, d = clips["good"]
    features = embed_clips(model, [clips["missing"], a, b, clips["silent"], c, d], batch_size=2)
    assert features.clips == [a, b, c, d]
    assert features.starts == pytest.approx([0.5] * 4, abs=0.03)
    assert [(e.path, e.stream) for e in features.failed] == [(clips["missing"], "file"), (clips["silent"], "audio")]
    assert features.x_image.shape == (4, 6, 32)
    assert features.x_audio.shape == (4, 8, 32)
    assert features.x_fusion.shape == (4, 4, 32)
    for row, path in enumerate(features.clips):
        torch.testing.assert_close(features.pooled[row], model.embed(path)["pooled"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", ["factorized", "token", "none"])
def test_every_kind_of_fusion_has_features(clips, fusion):
    features = small_model(fusion=fusion).embed(clips["good"][0])
    assert all(x.isfinite().all() and x.dtype == torch.float32 for x in features.values())


def test_worker_processes_give_the_same_features(clips):
    model = small_model()
    here, there = (embed_clips(model, clips["good"], batch_size=2, num_workers=n) for n in (0, 2))
    torch.testing.assert_close(here.tensors(), there.tensors(), rtol=1e-4, atol=1e-5)  # batches are others
    assert here.clips == there.clips == clips["good"]


def test_model_keeps_its_mode_and_features_can_train_a_probe(clips):
    model = small_model(drop_path=0.5).train()
    model.image.eval()
    features = embed_clips(model, clips["good"][:2])
    assert model.training
    assert not model.image.training
    assert model.audio.training
    torch.testing.assert_close(model.embed(clips["good"][0])["pooled"], features.pooled[0], rtol=1e-4, atol=1e-5)
    probe = torch.nn.Linear(32, 2)
    probe(features.pooled).sum().backward()  # needs tensors made outside inference mode
    assert probe.weight.grad.abs().sum() > 0


def test_half_precision_model(clips):
    pooled = small_model().bfloat16().embed(clips["good"][0])["pooled"]
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, small_model().embed(clips["good"][0])["pooled"], rtol=0, atol=0.1)


def test_embed_method_of_the_model(clips):
    model = small_model()
    features = embed_clips(model, clips["good"][:1])
    assert model.embed(clips["good"][0]).keys() == features.tensors().keys()
    for name, tensor in features.tensors().items():
        torch.testing.assert_close(model.embed(clips["good"][0])[name], tensor[0])


def test_embed_raises_for_a_clip_that_cannot_be_read(clips):
    with pytest.raises(ClipError, match="no audio stream"):
        small_model().embed(clips["silent"])


def test_saved_features_come_back(clips, tmp_path):
    features = embed_clips(small_model(), [*clips["good"], clips["missing"]])
    features.checkpoint = "weights.pth"
    path = tmp_path / "new" / "features.safetensors"
    features.save(path)
    loaded = Features.load(path)
    torch.testing.assert_close(loaded.tensors(), features.tensors(), rtol=0, atol=0)
    assert (loaded.clips, loaded.starts, loaded.checkpoint) == (features.clips, features.starts, "weights.pth")
    assert (loaded.ends, loaded.frame_times) == (features.ends, features.frame_times)
    assert [str(error) for error in loaded.failed] == [str(error) for error in features.failed]
    assert EncoderConfig(**loaded.config) == small_model().config
    assert os.listdir(path.parent) == ["features.safetensors"]


def test_failing_to_save_leaves_the_old_file(clips, tmp_path, monkeypatch):
    features = embed_clips(small_model(), clips["good"][:1])
    path = tmp_path / "features.safetensors"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(StoreError, match=r"features\.safetensors: cannot be written \(disk full\): make room"):
        features.save(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["features.safetensors"]


def test_nothing_to_save_is_an_error(clips, tmp_path):
    features = embed_clips(small_model(), [clips["missing"]])
    assert len(features.pooled) == 0
    with pytest.raises(ValueError, match="no clip could be read"):
        features.save(tmp_path / "features.safetensors")
    assert not os.listdir(tmp_path)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Of a model whose windows are as short as the clips."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_encoder(small_model(), path)
    return ["--checkpoint", str(path)]


def test_without_a_checkpoint_it_is_the_one_in_the_package(clips, tmp_path, capsys):
    out = tmp_path / "f.safetensors"
    assert main(["embed", clips["good"][0], "--out", str(out), "--dtype", "fp32"]) == 0
    assert "synth-small has seen synthetic clips alone" in capsys.readouterr().err
    expected = embed_clips(load_encoder("synth-small"), clips["good"][:1])
    torch.testing.assert_close(Features.load(out).pooled, expected.pooled, rtol=1e-4, atol=1e-5)
    assert Features.load(out).checkpoint == "synth-small"


def test_command_writes_features_and_reports_failures(clips, small, tmp_path, capsys):
    out = tmp_path / "new" / "f.safetensors"
    line = ["embed", *clips["good"], clips["silent"], clips["missing"], "--out", str(out), "--device", "cpu", *small]
    status = main([*line, "--tokens"])
    stdout, stderr = capsys.readouterr()
    assert status == 3
    assert Features.load(out).clips == clips["good"]
    assert "x_fusion [4, 4, 32]" in stdout
    assert "NOTE" not in stderr
    assert "2 of 6 clips failed:" in stderr
    assert f"{clips['silent']}: audio stream: no audio stream" in stderr
    assert f"{clips['missing']}: no such file" in stderr


def test_command_searches_directories_and_takes_each_clip_once(clips, small, tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    first = str(shutil.copy(clips["good"][0], tmp_path / "deep" / "er" / "A.MP4"))
    second = str(shutil.copy(clips["good"][1], tmp_path / "deep"))
    (tmp_path / "deep" / "notes.txt").write_text("not a clip")
    out = tmp_path / "f.safetensors"
    assert main(["embed", str(tmp_path / "deep"), second, "--out", str(out), "--workers", "1", *small]) == 0
    assert sorted(Features.load(out).clips) == sorted([first, second])


@pytest.mark.parametrize(("fusion", "suffix"), [("dense", "safetensors"), ("none", "npy")])
def test_command_draws_each_clip_without_overwriting(clips, tmp_path, fusion, suffix):
    (tmp_path / "other").mkdir()
    paths = [clips["good"][0], str(shutil.copy(clips["good"][1], tmp_path / "other" / "a.mkv")), clips["good"][2]]
    out = tmp_path / f"f.{suffix}"
    save_encoder(small_model(fusion=fusion), tmp_path / "w.safetensors")
    assert main(["embed", *paths, "--out", str(out), "--plot", "--checkpoint", str(tmp_path / "w.safetensors")]) == 0
    pictures = sorted(os.listdir(tmp_path / "f_plots"))
    assert pictures == ["a-2.png", "a.png", "c.png"]
    for name in pictures:
        picture = Image.open(tmp_path / "f_plots" / name)
        assert picture.width > 900
        assert len(picture.convert("L").resize((64, 32)).getcolors(2048)) > 20  # not a blank sheet


def test_command_writes_nothing_when_every_clip_fails(clips, small, tmp_path, capsys):
    assert main(["embed", clips["silent"], *small, "--out", str(tmp_path / "f.safetensors"), "--plot"]) == 1
    assert "no clip could be read" in capsys.readouterr().err
    assert not [name for name in os.listdir(tmp_path) if name != "f_plots"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["embed"], "CLIP"),
        (["embed", "{clip}", "--batch-size", "0"], "--batch-size: 0 is less than 1"),
        (["embed", "{clip}", "--device", "abacus"], "--device abacus"),
        (["embed", "{clip}", "--out", "{clip}"], "expected a folder, or the name of a file in"),
        (["embed", "{clip}", "--out", "f.h5"], "expected a folder, or the name of a file in"),
        (["embed", "{clip}", "--every", "0"], "0 is not above 0"),
        (["embed", "{clip}", "--at", "1,-2"], "expected seconds such as 3.5,10"),
        (["embed", "{clip}", "--every", "1", "--windows", "3"], "not allowed with argument"),
        (["embed", "{clip}", "--keep-frames"], "give --frames K"),
        (["embed", "{clip}", "--address", "auto"], "give --engine ray"),
        (["embed", "{clip}", "--engine", "ray", "--workers", "2"], "are of this machine"),
        (["embed", "{clip}", "--engine", "ray", "--device", "cuda:1"], "expected auto, cuda or cpu"),
        (["embed", "{clip}", "--engine", "rai"], "invalid choice: 'rai'"),
        (["embed", "{clip}", "--store-dtype", "bf16"], "parquet knows no bfloat16"),
        (["embed", "{clip}", "--out", "f.npy", "--tokens"], "holds one array"),
        (["embed", "{clip}", "--out", "f.npy", "--format", "parquet"], "tells its own"),
        (["embed", "{clip}", "--out", "ftp://host/f"], "expected a local path, or an address"),
        (["embed", "{clip}", "--out", "memory://f.npy"], "write a folder of shards"),
        (["embed", "@{missing}"], "missing.mp4"),
        (["embed", "{clip}", "--out", "{clip}/f.safetensors"], "cannot make the output directory"),
        (["embed", "--plot", "{clip}", "{clip}"], "put the clips before --plot"),
        (["embed", "{empty}"], "no video files"),
    ],
)
def test_usage_error_exits_with_2_and_says_why(clips, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)  # where the default of --out is made
    (tmp_path / "empty").mkdir()
    names = {"clip": clips["good"][0], "missing": clips["missing"], "empty": str(tmp_path / "empty")}
    with pytest.raises(SystemExit) as caught:
        main([argument.format(**names) for argument in arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["{missing}", "{clip}"])
def test_a_checkpoint_that_cannot_be_read_is_a_failure(clips, tmp_path, capsys, wrong):
    wrong = wrong.format(clip=clips["good"][0], missing=clips["missing"])
    out = str(tmp_path / "f.safetensors")
    assert main(["embed", clips["good"][0], "--checkpoint", wrong, "--out", out]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"avfusion embed: error: {wrong}: ")


def run(*arguments, cwd):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


# A process of its own, which starts torch.
def test_program_embeds_with_a_checkpoint(clips, tmp_path):
    model = small_model()
    save_encoder(model, tmp_path / "weights.safetensors")
    result = run(
        "-m", "avfusion", "embed", *clips["good"], "--checkpoint", "weights.safetensors", "--tokens", "--out",
        "f.safetensors", "--dtype", "fp32", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "NOTE" not in result.stderr
    features = Features.load(tmp_path / "f.safetensors")
    assert features.checkpoint == "weights.safetensors"
    torch.testing.assert_close(features.pooled, embed_clips(model, clips["good"]).pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("suffix", "dtype"), [("safetensors", "bf16"), ("safetensors", "fp16"), ("parquet", "fp16"),
                                               ("npy", "fp16")])  # fmt: skip
def test_one_file_is_put_together_from_what_the_folder_would_hold(clips, small, tmp_path, suffix, dtype):
    out = tmp_path / f"f.{suffix}"
    line = ["embed", *clips["good"], "--windows", "2", "--store-dtype", dtype, "--shard-rows", "1", *small]
    assert main([*line, "--out", str(out)]) == 0
    assert main([*line, "--out", str(tmp_path / "whole.safetensors"), "--store-dtype", "fp32"]) == 0
    whole = Features.load(tmp_path / "whole.safetensors")
    pooled = torch.from_numpy(np.load(out)).float() if suffix == "npy" else Features.load(out).pooled
    expected = whole.pooled.to(DTYPES[dtype])
    assert torch.equal(pooled, expected.float())
    assert not list(tmp_path.glob(".*"))
    assert len(whole.clips) == 8


def test_heads_that_a_checkpoint_does_not_tell_are_given_or_named(clips, tmp_path, capsys):
    model = small_model(dim=64, num_heads=1, fusion_num_heads=2, image_size=(32, 32), audio_size=(128, 64))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "c.pth")
    line = ["embed", clips["good"][0], "--checkpoint", str(tmp_path / "c.pth"), "--tokens", "--dtype", "fp32", "--out"]
    assert main([*line, str(tmp_path / "named.safetensors")]) == 0
    assert "embed: warning:" in (said := capsys.readouterr().err)
    assert "neither keys nor shapes tell num_heads=1, fusion_num_heads=1: assumed" in said
    assert main([*line, str(tmp_path / "given.safetensors"), "--fusion-num-heads", "2"]) == 0
    expected = embed_clips(model, clips["good"][:1])
    found = {name: Features.load(tmp_path / f"{name}.safetensors").x_fusion for name in ("named", "given")}
    torch.testing.assert_close(found["given"], expected.x_fusion, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found["named"], expected.x_fusion, rtol=1e-4, atol=1e-5)
    assert main(["embed", clips["good"][0], "--fusion-num-heads", "2", "--out", str(tmp_path / "x.safetensors")]) == 1
    assert "the file itself tells fusion_num_heads=4, not 2" in capsys.readouterr().err


def test_help_teaches_and_loads_nothing_heavy(tmp_path):
    code = (
        "import sys; from avfusion.cli import main\ntry: main(['embed', '-h'])\nfinally: print('torch' in sys.modules)"
    )
    result = run("-c", code, cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.endswith("False\n")
    for word in ("x_fusion", "pooled", "--plot", "examples:", "Features.load", "exit status"):
        assert word in result.stdout


def test_dollar_signs_in_names_are_no_mathematics(clips, tmp_path):
    name = tmp_path / "x$_$.mp4"
    name.write_bytes(Path(clips["good"][0]).read_bytes())
    clip = read_clip(name)
    plot_clip(tmp_path / "x.png", clip, torch.zeros(3, 32, 32), torch.zeros(32, 64), note="a $^$ b")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
