"""The command line as a whole: exit codes, one line of error, suggestions, Ctrl-C, what every command takes."""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch
from made_clips import write_clip

import avfkernels
from avfusion import DeepAVFusion, EncoderConfig, Features, cli, data, save_encoder
from avfusion.cli import COMMANDS, main, options
from avfusion.data import pack, read
from avfusion.embedding import decode
from avfusion.media.reader import read_windows
from avfusion.synth.make import synthesize
from avfusion.synth.scene import Settings
from avfusion.tasks import DOWNSTREAM, task_class
from avfusion.training import loop

pytestmark = pytest.mark.long
TINY = (
    "--dim 32 --depth 1 --num-heads 2 --image-size 32 32 --audio-size 32 64 --fusion-tokens 2 --image-agg-tokens 2 "
    "--audio-agg-tokens 2 --decoder-dim 16 --decoder-depth 1 --decoder-num-heads 2 --synth-clips 0 --workers 0 "
    "--batch-size 4 --epochs 1 --warmup-epochs 0 --tracker none"
)
DOWN = "--synth-clips 0 --workers 0 --batch-size 4 --epochs 1 --tracker none"
ENCODER = EncoderConfig(dim=32, depth=1, num_heads=2, image_size=(32, 32), audio_size=(32, 64), fusion_tokens=2,
                        image_agg_tokens=2, audio_agg_tokens=2)  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "set"
    synthesize(folder, Settings(clips=10, classes=2, size=64, seconds=1.5, fps=4))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(DeepAVFusion(ENCODER), path)
    return path


def pretrain(folder, out, *options):
    return main(["pretrain", "tiny", *TINY.split(), "--data", str(folder), "--out", str(out), *map(str, options)])


def usage_error(capsys, *line):
    """What a command line says that exits with 2."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, line)))
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"avfusion {version('avfusion')}\n"


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("embd x.mp4", "embed"),
        ("pretrain tinny", "tiny"),
        ("pretrain tiny --batch-sizes 4", "--batch-size"),
        ("pretrain tiny --data x --layout vgsound", "vggsound"),
        ("shard vgsound a b", "vggsound"),
        ("browse flickr a", "flickr-soundnet"),
        ("synth x --layout audiset", "audioset"),
        ("finetune train papr", "paper"),
        ("pretrain tiny --data x --fusion factorised", None),
    ],
)
def test_what_may_be_meant_is_suggested(line, meant, capsys):
    told = usage_error(capsys, *line.split())
    assert meant is None or f"did you mean {meant}?" in told


def test_the_metavar_x_says_nothing(capsys):
    for name in ("pretrain", *DOWNSTREAM):
        with pytest.raises(SystemExit):
            main([name, *(["train"] if name in DOWNSTREAM else []), "--help"])
        text = capsys.readouterr().out
        assert " X" not in text, name
        assert "--batch-size N" in text
        assert "--blr FLOAT" in text


@pytest.mark.parametrize("line", ["embed", "report", "pretrain", "finetune train", "finetune eval", "finetune predict"])
def test_every_command_with_a_model_takes_device_dtype_and_threads(line, capsys):
    with pytest.raises(SystemExit):
        main([*line.split(), "--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--device", "--dtype", "--threads"))
    trains = line in ("pretrain", "finetune train")  # without auto: a run is the same on every machine
    assert ("{fp32,bf16}" if trains else "{auto,fp32,bf16,fp16}" if line == "embed" else "{auto,fp32,bf16}") in text


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_bf16_on_a_cpu_that_multiplies_it_and_says_so(fast, monkeypatch, capsys):
    monkeypatch.setattr(avfkernels, "multiplies_bf16", lambda: fast)
    parser = argparse.ArgumentParser()
    options.add_machine(parser, dtype="auto")
    name, dtype = ("bf16", torch.bfloat16) if fast else ("fp32", torch.float32)
    assert options.dtype_of(parser.parse_args([]), torch.device("cpu")) == dtype
    assert f"computes in {name} (--dtype auto)" in capsys.readouterr().out
    assert options.dtype_of(parser.parse_args(["--dtype", "fp32"]), torch.device("cpu")) == torch.float32
    assert not capsys.readouterr().out


def test_evaluations_predictions_and_reports_take_them(clips, encoder, tmp_path):
    run, clip = tmp_path / "run", str(next(clips.rglob("*.mp4")))
    settings = [
        "--encoder",
        encoder,
        "--data",
        clips,
        *DOWN.split(),
        "--eval-clips",
        0,
        "--out",
        run,
        "--dtype",
        "bf16",
    ]
    assert main(["probe", "train", "tiny", *map(str, settings)]) == 0
    machine, threads = ["--device", "cpu", "--dtype", "bf16", "--threads", "1"], torch.get_num_threads()
    try:
        assert main(["probe", "eval", str(run), *machine]) == 0
        assert main(["probe", "predict", str(run), clip, "--out", str(tmp_path / "said"), *machine]) == 0
        assert main(["report", clip, "--probe", str(run), "--out", str(tmp_path / "pages"), *machine]) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


# Failures are 1 and one line; a command line that cannot be meant is 2.


def failure(capsys):
    """The one line of a failure."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert "Traceback" not in lines[0]
    return lines[0]


def test_too_many_failed_clips_end_pretrain_without_a_traceback(clips, tmp_path, capsys):
    (tmp_path / "set").mkdir()
    for i in range(8):
        (tmp_path / "set" / f"{i}.mp4").write_bytes(b"no video")
    assert pretrain(tmp_path / "set", tmp_path / "run", "--layout", "folder", "--eval-clips", 0) == 1
    assert "clips have failed, more than max_failed=5%" in failure(capsys)


def test_a_missing_shard_ends_pretrain_without_a_traceback(clips, tmp_path, capsys):
    pack(read("vggsound", clips), tmp_path / "shards", clips_per_shard=4)
    (tmp_path / "shards" / "00001.json").unlink()
    assert pretrain(tmp_path / "shards", tmp_path / "run", "--layout", "shards") == 1
    assert "00001.json" in failure(capsys)


def test_a_dead_worker_ends_pretrain_without_a_traceback(clips, tmp_path, capsys, monkeypatch):
    parent, whole = os.getpid(), data.Table.read

    def deadly(self, index, **window):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, index, **window)

    monkeypatch.setattr(data.Table, "read", deadly)
    assert pretrain(clips, tmp_path / "run", "--workers", 1, "--eval-clips", 0) == 1
    told = failure(capsys)
    assert "a worker has died while it was reading" in told
    assert ".mp4" in told


def test_an_exception_in_a_downstream_command_is_no_usage_error(clips, encoder, tmp_path, capsys, monkeypatch):
    assert main(["finetune", "eval", str(tmp_path)]) == 1
    assert "no checkpoint of a run in this folder" in failure(capsys)
    monkeypatch.setattr(task_class("finetune"), "build", lambda *_, **__: 1 / 0)
    line = ["finetune", "train", "tiny", "--encoder", encoder, "--data", clips, "--out", tmp_path / "run"]
    assert main(list(map(str, line))) == 1
    assert "ZeroDivisionError: division by zero (AVF_DEBUG=1 shows where)" in failure(capsys)
    monkeypatch.setenv("AVF_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(list(map(str, line)))


def test_a_run_of_another_task_is_named_and_not_an_unexpected_keyword(clips, encoder, tmp_path, capsys):
    assert pretrain(clips, tmp_path / "run", "--eval-clips", 0) == 0
    line = ["probe", "train", "tiny", "--encoder", encoder, "--data", clips, "--out", tmp_path / "run", "--resume"]
    assert main(list(map(str, line))) == 1
    assert f"{tmp_path / 'run'}: a run of pretrain, and not of probe; choose another --out" in failure(capsys)


def test_advice_to_load_pickles_does_not_reach_a_user(clips, tmp_path, capsys):
    assert pretrain(clips, tmp_path / "run", "--eval-clips", 0) == 0
    (state,) = (tmp_path / "run").rglob("state.pt")
    torch.save({"step": os.system}, state)
    state.with_name("manifest.json").unlink()  # by which it would not even be read
    assert pretrain(clips, tmp_path / "run", "--eval-clips", 0, "--resume") == 1
    told = failure(capsys)
    assert "state.pt is no file of plain tensors" in told
    assert "weights_only" not in told


def test_a_bad_dim_is_refused_before_any_clip_is_made(tmp_path, capsys):
    for wrong in (["--decoder-dim", 17], ["--image-mask-ratio", 1.0]):
        assert pretrain(tmp_path / "set", tmp_path / "run", "--synth-clips", 4, *wrong) == 1
        assert "AVMAE" in failure(capsys)
    assert "dim = 33" in usage_error(capsys, "pretrain", "tiny", "--data", tmp_path / "set", "--dim", 33)
    assert not (tmp_path / "set").exists()


def test_a_folder_of_videos_just_works(tmp_path, capsys):
    for i in range(4):
        write_clip(tmp_path / f"{i}.mp4", seconds=1.5)
    for number, layout in enumerate(([], ["--layout", "folder"])):
        assert pretrain(tmp_path, tmp_path / "runs" / str(number), *layout) == 0
        told = capsys.readouterr().out
        assert "no labels, so that nearest neighbours are not compared" in told
        assert ("taken as a folder of videos" in told) == (not layout)
    assert main(["browse", "folder", str(tmp_path), "--split", "all", "--out", str(tmp_path / "page.html")]) == 0


def test_no_labels_is_not_printed_where_boxes_are_what_is_evaluated(encoder, tmp_path, capsys):
    synthesize(tmp_path / "set", Settings(layout="flickr-soundnet", clips=10, classes=2, size=64, seconds=1.5))
    folders = ["--data", tmp_path / "set", "--out", tmp_path / "run"]
    line = ["localize", "train", "tiny", "--encoder", encoder, *folders, *DOWN.split()]
    assert main(list(map(str, line))) == 0
    assert "no labels" not in capsys.readouterr().out


# What is written.


def test_npy_as_the_output_is_npy(encoder, tmp_path):
    clip, out = write_clip(tmp_path / "clip.mp4", seconds=2), tmp_path / "features.npy"
    assert main(["embed", clip, "--checkpoint", str(encoder), "--windows", "2", "--out", str(out)]) == 0
    assert np.load(out).shape == (2, 3, 32)
    with open(tmp_path / "features.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], float(row["start"])) for row in rows] == [(clip, 0.0), (clip, pytest.approx(1.0, abs=0.05))]


def test_files_are_readable_as_the_users_mask_says(encoder, tmp_path):
    mask = os.umask(0o022)
    try:
        clip, out = write_clip(tmp_path / "clip.mp4", seconds=1.5), tmp_path / "features.safetensors"
        assert main(["embed", clip, "--checkpoint", str(encoder), "--out", str(out)]) == 0
        save_encoder(DeepAVFusion(ENCODER), tmp_path / "encoder.safetensors")
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("*.safetensors")} == {0o644}


# Ctrl-C.


def test_ctrl_c_in_pretrain_saves_a_checkpoint_and_the_run_goes_on(clips, tmp_path, capsys, monkeypatch):
    before, steps = loop.set_rate, iter(range(99))
    monkeypatch.setattr(
        loop, "set_rate", lambda *a: (next(steps) == 1 and os.kill(os.getpid(), signal.SIGINT)) or before(*a)
    )
    assert pretrain(clips, tmp_path / "run", "--epochs", 2, "--eval-clips", 0) == 130
    assert "stopped by SIGINT after step 2, saved; the same command with --resume" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
    assert pretrain(clips, tmp_path / "run", "--epochs", 2, "--eval-clips", 0, "--resume") == 0
    assert "goes on after step 2 from" in capsys.readouterr().out


def test_a_second_ctrl_c_means_now(clips, tmp_path, capsys, monkeypatch):
    def twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "set_rate", twice)
    assert pretrain(clips, tmp_path / "run", "--eval-clips", 0) == 130
    assert "Nothing is lost up to the last checkpoint" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_embed_that_is_stopped_writes_what_is_done_and_goes_on(encoder, tmp_path, capsys, monkeypatch, number):
    paths, reads = [write_clip(tmp_path / f"{i}.mp4", seconds=1.5) for i in range(5)], iter(range(99))

    def stopped(*arguments, **options):
        if next(reads) == 3:
            os.kill(os.getpid(), number)
        return read_windows(*arguments, **options)

    monkeypatch.setattr(decode, "read_windows", stopped)
    out, options = tmp_path / "f", ["--checkpoint", str(encoder), "--batch-size", "2", "--workers", "0"]
    line = ["embed", *paths, "--out", str(out), *options]
    if number == signal.SIGINT:
        assert main(line) == 130
        assert "What is done is written; the same command goes on." in capsys.readouterr().err
    else:
        with pytest.raises(SystemExit) as ended:
            main(line)
        assert ended.value.code == 143
    assert Features.load(out).clips == paths[:2]
    assert json.loads((out / "_manifest.json").read_text())["stopped"]
    monkeypatch.undo()
    assert main(line) == 0
    assert "goes on after 2 rows of 2 files" in capsys.readouterr().out
    assert Features.load(out).clips == paths
    assert not json.loads((out / "_manifest.json").read_text())["stopped"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("pretrain", *DOWNSTREAM)])
def test_every_command_says_what_ctrl_c_leaves(name, capsys, monkeypatch):
    parser = cli.Parser(prog=f"avfusion {name}")
    cli.import_module(f"avfusion.cli.{name}").add_arguments(parser, name)
    assert parser.get_default("stopped").endswith(".")


# A process of its own, which starts torch.
def test_without_a_terminal_a_run_tells_where_it_is_and_how_far(clips, tmp_path):
    code = (
        "import sys; from avfusion import common; from avfusion.cli import main\n"
        "whole = common.Progress.__init__\n"
        "common.Progress.__init__ = lambda self, *a, **o: whole(self, *a, every=0.0, **o)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    line = [
        "pretrain",
        "tiny",
        *TINY.split(),
        "--data",
        str(clips),
        "--out",
        str(tmp_path / "run"),
        "--eval-clips",
        "0",
    ]
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'run'}: pretrain, 2 steps of 4 clips on 1 x cpu, from the beginning" in done.stdout
    steps = [text for text in done.stderr.splitlines() if text.startswith("step ")]
    assert len(steps) == 2
    for word in ("step 1/2, loss image ", "audio ", "clips/s ", " left"):
        assert word in steps[0]


def test_progress_tells_a_line_every_30_s(capsys, monkeypatch):
    from avfusion import common

    now = [0.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    with common.Progress(100, "clip") as progress:
        for done in range(1, 11):
            now[0] += 10
            progress.update(done, loss=0.5)
    assert capsys.readouterr().err.splitlines() == [
        "clip 3/100, loss 0.5, 0:16:10 left", "clip 6/100, loss 0.5, 0:15:40 left", "clip 9/100, loss 0.5, 0:15:10 left"
    ]  # fmt: skip
