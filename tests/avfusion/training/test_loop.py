"""Pre-training: exact resume, what is skipped, what is refused, several processes, probes, export."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from avfusion import DeepAVFusion, data, load_encoder
from avfusion.cli import main
from avfusion.files import Held
from avfusion.synth.make import synthesize
from avfusion.synth.scene import Settings
from avfusion.tasks.pretrain import Pretrain, PretrainConfig
from avfusion.training import loop as train
from avfusion.training import run_folder
from avfusion.training.config import load_config
from avfusion.training.export import export
from avfusion.training.optim import rise, set_rate
from avfusion.training.run_folder import RunError, checkpoints, latest_checkpoint

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]
STEPS = 9  # of the runs below: 12 clips, 4 a step, 3 epochs


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "set"
    synthesize(folder, Settings(clips=15, classes=2, size=64, seconds=1.5, fps=4))
    return folder


@pytest.fixture(scope="module")
def config(clips):
    return PretrainConfig.of(
        data=str(clips), workers=0, dim=32, depth=2, num_heads=2, image_size=(64, 64), audio_size=(32, 64),
        fusion_tokens=2, image_agg_tokens=2, audio_agg_tokens=2, decoder_dim=16, decoder_depth=1, decoder_num_heads=2,
        epochs=3, batch_size=4, warmup_epochs=1, blr=0.1, eval_clips=0, log_steps=1, tracker="none", drop_path=0.2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert train.train(Pretrain(config), out)
    torch.set_num_threads(threads)
    return out


class Crash(Exception):
    pass


def at_step(monkeypatch, number, action):
    """Do something at the beginning of the step that is the `number`-th from now."""
    count, before = iter(range(1, 1000)), set_rate

    def counted(*args):
        if next(count) == number:
            action()
        return before(*args)

    monkeypatch.setattr(train, "set_rate", counted)


def crash():
    raise Crash


def build(config):
    return Pretrain(config).build()


def files(out, step=STEPS):
    folder = out / "checkpoints" / f"step-{step:08d}"
    return load_file(folder / "model.safetensors"), torch.load(folder / "state.pt", weights_only=True)


def assert_same_run(a, b):
    (weights, state), (others, other) = files(a), files(b)
    assert weights.keys() == others.keys()
    assert [key for key in weights if not torch.equal(weights[key], others[key])] == []
    for name, moments in state["optimizer"]["state"].items():
        for key, value in moments.items():
            assert torch.equal(value, other["optimizer"]["state"][name][key]), (name, key)
    assert state["loader"] == other["loader"]
    assert torch.equal(state["generators"][0]["cpu"], other["generators"][0]["cpu"])


def test_a_run_leaves_what_it_was_made_with_and_its_last_checkpoints(config, clips, undisturbed):
    assert [path.name for path in sorted((undisturbed / "checkpoints").iterdir())] == ["step-00000006", "step-00000009"]
    facts = json.loads((undisturbed / "run.json").read_text())
    table = data.read("vggsound", clips, "train")
    assert facts["data"] == {"clips": 12, "sha256": table.sha256, "classes": list(table.classes), "multi_label": False}
    (part,) = facts["parts"]
    assert (part["step"], part["processes"], part["code"]["torch"]) == (0, 1, torch.__version__)
    assert load_config(undisturbed, "pretrain", PretrainConfig) == config
    weights, state = files(undisturbed)
    fresh = build(config).state_dict()
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in fresh.items()}
    assert (state["step"], state["bad"], state["loader"]["epoch"]) == (9, 0, 3)


# Five starts of a run, nine steps, each with its checkpoint.
def test_crashes_at_any_step_and_resuming_give_the_same_bits(config, undisturbed, tmp_path, monkeypatch):
    config, out = config.but(save_steps=1, keep=1), tmp_path / "run"
    for steps in (3, 1, 4):  # the first epoch's end, twice the same step, the middle of an epoch
        at_step(monkeypatch, steps, crash)
        with pytest.raises(Crash):
            train.train(Pretrain(config), out, resume=True)
        torch.rand(7)  # whatever else draws
    monkeypatch.undo()
    assert train.train(Pretrain(config), out, resume=True)
    assert_same_run(undisturbed, out)
    assert train.train(Pretrain(config), out, resume=True)  # finished: nothing to do
    assert_same_run(undisturbed, out)


def command(config, *options):
    words = []
    for name, value in config.flat().items():
        flag = f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return ["pretrain", "tiny", *words, *map(str, options)]


def test_sigterm_saves_and_ends_and_the_run_goes_on(config, undisturbed, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    for step in (2, 1):  # within an epoch, and in its last step
        at_step(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(command(config, "--out", tmp_path / "run", "--resume")) == 143
    assert latest_checkpoint(tmp_path / "run").name == "step-00000003"
    assert signal.getsignal(signal.SIGTERM) is handler
    monkeypatch.undo()
    assert train.train(Pretrain(config), tmp_path / "run", resume=True)
    assert_same_run(undisturbed, tmp_path / "run")


# Four evaluations, with their pictures.
def test_an_evaluation_that_sigterm_left_out_is_made_up_for(config, tmp_path, monkeypatch):
    config, out = config.but(eval_clips=9, eval_split="all", eval_epochs=1), tmp_path / "run"
    at_step(monkeypatch, STEPS, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert not train.train(Pretrain(config), out)
    monkeypatch.undo()
    assert train.train(Pretrain(config), out, resume=True)
    with open(out / "evaluations.csv", newline="") as file:
        assert [float(row["step"]) for row in csv.DictReader(file)] == [0, 3, 6, 9]


def test_a_run_begun_again_evaluates_anew(config, tmp_path):
    """An attempt that ended before its first checkpoint leaves a row, of another model perhaps."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "evaluations.csv").write_text("step,epoch,other\n0.0,0.0,0.5\n")
    assert train.train(Pretrain(config.but(eval_clips=9, eval_split="all", eval_epochs=3)), out)
    with open(out / "evaluations.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "9"]
    assert "other" not in rows[0]


def poison(monkeypatch, name, clips):
    """Make the sound of some clips not finite, on its way to the model."""
    table = data.read("vggsound", clips, "train")
    read = data.Table.read

    def poisoned(self, index, **window):
        clip = read(self, index, **window)
        return replace(clip, waveform=clip.waveform * torch.nan) if self.rows[index].id in name else clip

    monkeypatch.setattr(data.Table, "read", poisoned)
    return table


def test_a_step_that_is_not_finite_is_skipped_and_its_clips_are_listed(config, clips, tmp_path, monkeypatch):
    row = data.read("vggsound", clips, "train").rows[0]
    poison(monkeypatch, {row.id}, clips)
    assert train.train(Pretrain(config), tmp_path / "run")
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert len(skipped) == 3  # an epoch each
    for line in skipped:
        assert line["loss_audio"] == "nan"
        assert str(row.path) in line["clips"]
        assert len(line["clips"]) == 4
    weights, state = files(tmp_path / "run")
    assert all(value.isfinite().all() for value in weights.values())
    assert state["optimizer"]["state"]["encoder.fusion_tokens"]["step"] == STEPS - 3


def test_a_few_in_a_row_end_the_run_with_step_clips_and_checkpoint(config, clips, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    at_step(monkeypatch, 4, crash)
    with pytest.raises(Crash):
        train.train(Pretrain(config), out)
    monkeypatch.undo()
    poison(monkeypatch, {row.id for row in data.read("vggsound", clips, "train").rows}, clips)
    assert main(command(config, "--out", out, "--resume")) == 1
    message = capsys.readouterr().err
    assert "step 5, in epoch 1" in message
    assert "'loss_audio': nan" in message
    assert message.count(".mp4") == 4
    assert f"The last good checkpoint: {out / 'checkpoints' / 'step-00000003'}" in message
    assert all(value.isfinite().all() for value in files(out, 3)[0].values())


def test_a_full_disk_while_saving_leaves_the_checkpoint_before(config, undisturbed, tmp_path, monkeypatch):
    out, real, writes = tmp_path / "run", torch.save, iter(range(10))

    def full(content, path):
        real(content, path)
        if next(writes) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder.torch, "save", full)
    with pytest.raises(
        RunError, match=r"step-00000006: cannot be written .*No space.* last good .*step-00000003\. Make"
    ):
        train.train(Pretrain(config), out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    assert train.train(Pretrain(config), out, resume=True)
    assert_same_run(undisturbed, out)


def test_what_would_change_a_run_is_refused(config, clips, undisturbed, tmp_path):
    with pytest.raises(ValueError, match="holds a run already; add --resume"):
        train.train(Pretrain(config), undisturbed)
    with pytest.raises(ValueError, match=r"blr was 0\.1 and is now 0\.2; dim was 32 and is now 48"):
        train.train(Pretrain(config.but(dim=48, blr=0.2)), undisturbed, resume=True)
    with pytest.raises(ValueError, match=r"the state is of sha256 .* its order is another"):
        train.train(Pretrain(config.but(data=str(_fewer(clips, tmp_path)))), undisturbed, resume=True)


def _fewer(clips, tmp_path):
    """The same set with a clip less."""
    other = tmp_path / "fewer"
    synthesize(other, Settings(clips=14, classes=2, size=64, seconds=1.5, fps=4))
    assert len(data.read("vggsound", other, "train")) == 12
    data.read("vggsound", other, "train").rows[0].path.unlink()
    return other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6, "accumulation": 4}, r"batch_size=6: expected a multiple of 1 processes x accumulation=4"),
        ({"batch_size": 16}, "batch_size=16 on 1 ranks: the set has only 12 clips"),
        ({"data": "/nowhere"}, "/nowhere: no such directory"),
        ({"image_weights": "nothing.pth"}, r"nothing\.pth: neither a file nor"),
        ({"audio_mask_ratio": 1.0}, "audio_mask_ratio = 1.0 leaves 0 of 8 patches visible"),
        ({"image_size": (60, 64)}, r"image_size = \(60, 64\) must be two multiples of patch_size 16"),
        ({"tracker": "paper"}, "tracker='paper': expected one of tensorboard, wandb, trackio, none"),
        ({"data": ""}, "data: give the folder of the data set"),
        ({"epochs": 0}, "epochs=0: expected at least 1"),
        ({"crop_min": 0.0}, "crop_min=0.0: expected a share"),
        ({"num_heads": 0}, "EncoderConfig: num_heads must be at least 1, got 0"),
        ({"patch_size": 0}, "EncoderConfig: patch_size must be at least 1, got 0"),
        ({"decoder_num_heads": 0}, "decoder_num_heads = 0"),
        ({"batch_size": 24, "accumulation": 2}, "batch_size=24: the set has only 12 clips"),
    ],
)
def test_settings_that_cannot_be_run_are_named(config, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.train(Pretrain(config.but(**changes)), tmp_path / "run")
    assert latest_checkpoint(tmp_path / "run") is None


@pytest.mark.parametrize(("mode", "compile"), [("no", False), ("default", True), ("reduce-overhead", True)])
def test_runs_that_were_compiled_by_mode_are_read(config, tmp_path, mode, compile):
    (tmp_path / "run.json").write_text(json.dumps({"task": "pretrain", "settings": config.flat() | {"compile": mode}}))
    assert load_config(tmp_path, "pretrain", PretrainConfig) == config.but(compile=compile)


OLD = Path(__file__).with_name("run-0.1.0")  # made by version 0.1.0, and interrupted after two of six steps


def test_a_run_of_an_older_version_is_resumed(tmp_path, capsys):
    """On the machine that made it, to the bit; elsewhere sums are rounded otherwise."""
    synthesize(tmp_path / "clips", Settings(clips=10, classes=2, size=32, seconds=1.5, fps=4))
    shutil.copytree(OLD, tmp_path / "run")
    config = load_config(tmp_path / "run", "pretrain", PretrainConfig).but(data=str(tmp_path / "clips"))
    assert (config.run.dtype, config.encoder.patch_size, config.optim.blr) == ("fp32", 8, 0.05)
    assert train.train(Pretrain(config), tmp_path / "run", resume=True)
    assert "goes on after step 2 from" in capsys.readouterr().out
    found, state = files(tmp_path / "run", 6)
    expected, begun = load_file(OLD / "expected.safetensors"), files(OLD, 2)[0]
    assert found.keys() == expected.keys()
    assert (state["step"], state["loader"]["epoch"]) == (6, 3)
    losses = [losses_of(config, weights) for weights in (found, expected, begun)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[2] != pytest.approx(losses[1], rel=1e-3)


def losses_of(config, weights):
    """What weights make of a fixed batch."""
    task, g = Pretrain(config), torch.Generator().manual_seed(0)
    model, size = task.build().eval(), config.encoder
    model.load_state_dict(weights)
    batch = torch.randn(4, 3, *size.image_size, generator=g), torch.randn(4, 1, *size.audio_size, generator=g)
    with torch.no_grad():
        return [loss.item() for loss in model(*batch, *task.mask_noise(0, torch.arange(4)))[:2]]


def test_an_empty_data_set_is_named_on_the_command_line(config, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert (
        main(command(config.but(data=str(tmp_path / "empty"), layout="folder", split="all"), "--out", tmp_path / "r"))
        == 1
    )
    assert f"{tmp_path / 'empty'}: none of the 0 clips of folder is there" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
@pytest.mark.parametrize("place", ["header", "middle"])
def test_bug_rot_inside_a_checkpoint_was_resumed_without_a_word(config, undisturbed, tmp_path, capsys, name, place):
    """The one before is taken, and the damaged one kept."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    last = out / "checkpoints" / "step-00000009"
    with open(last / name, "rb+") as file:
        file.seek({"header": 20, "middle": (last / name).stat().st_size // 2}[place])
        file.write(bytes(1000))
    assert main(command(config, "--out", out, "--resume")) == 0
    told = capsys.readouterr()
    assert (f"avfusion pretrain: warning: {last}: damaged ({name} is not what was written), kept as "
            "damaged-step-00000009; step-00000006 is taken\n") in told.err  # fmt: skip
    assert "goes on after step 6 from" in told.out
    assert (out / "checkpoints/damaged-step-00000009" / name).exists()
    assert_same_run(undisturbed, out)
    with pytest.raises(ValueError, match="holds a run already"):
        train.train(Pretrain(config), out)


def test_an_export_takes_the_last_whole_checkpoint_and_renames_nothing(undisturbed, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    (out / "checkpoints/step-00000009/state.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"step-00000009: damaged .state\.pt is not .*; step-00000006 is taken"):
        assert export(out)[1] == 6
    assert (out / "checkpoints/step-00000009").exists()


def test_a_run_of_which_no_checkpoint_is_whole_is_not_begun_anew(config, undisturbed, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    for folder in (out / "checkpoints").iterdir():
        (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"none of its checkpoints is whole .*9: model\.safetensors is missing; step-.*6: "
    ):
        train.train(Pretrain(config), out, resume=True)


def test_damaged_checkpoints_of_old_versions_are_named(config, undisturbed, tmp_path):
    """They have no manifest. The message has a reason, and not torch's advice to load what is unsafe."""
    folder = tmp_path / "run" / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text((undisturbed / "run.json").read_text())
    good = undisturbed / "checkpoints" / "step-00000009"
    torch.save({"x": Crash()}, tmp_path / "pickle")
    for content in (b"", b"half", (tmp_path / "pickle").read_bytes()):
        for name in ("model.safetensors", "state.pt"):
            shutil.copy(good / "model.safetensors", folder)
            shutil.copy(good / "state.pt", folder)
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=r"step-00000003: cannot be resumed \(\w.*\): .*remove it") as told:
                train.train(Pretrain(config), tmp_path / "run", resume=True)
            assert "weights_only" not in str(told.value)


def test_checkpoints_of_the_same_run_are_the_same_bytes(config, undisturbed, tmp_path):
    assert train.train(Pretrain(config), tmp_path / "run")
    for name in ("model.safetensors", "state.pt", "manifest.json"):
        one, other = (out / "checkpoints/step-00000009" / name for out in (undisturbed, tmp_path / "run"))
        assert one.read_bytes() == other.read_bytes(), name


@pytest.mark.parametrize("authors", [False, True])
def test_exports_of_the_same_run_are_the_same_bytes(undisturbed, tmp_path, authors):
    suffix = "pth" if authors else "safetensors"
    files = [export(undisturbed, tmp_path / f"{name}.{suffix}", authors=authors)[0] for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_bug_two_processes_on_one_run_overwrote_each_other(config, tmp_path, capsys):
    out = tmp_path / "run"
    with Held(out):
        assert main(command(config, "--out", out)) == 1
    assert f"avfusion pretrain: error: {out}: in use by this process: wait until it ends" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [".lock"]


# A process of its own, which starts torch and takes some steps.
def test_ctrl_c_twice_ends_it_now(config, undisturbed, tmp_path):
    config, out = config.but(save_steps=1, workers=1), tmp_path / "run"
    line = [sys.executable, "-m", "avfusion", *command(config, "--out", out)]
    with subprocess.Popen(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:  # fmt: skip
        while process.poll() is None and not checkpoints(out):
            time.sleep(0.01)
        for _ in range(2):  # a terminal sends it to all processes of the group
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.001)
        told = process.communicate()[1]
    assert process.returncode == 130
    assert "Traceback" not in told
    assert "stops after this step and saves it; Ctrl-C again ends it at once" in told
    assert not list(out.glob("checkpoints/.*"))
    assert main(command(config, "--out", out, "--resume")) == 0
    assert_same_run(undisturbed, out)


def test_probes_pictures_and_log(config, tmp_path):
    out = tmp_path / "run"
    wanted = config.but(epochs=1, eval_clips=9, eval_split="all", eval_epochs=1, tracker="tensorboard")
    assert train.train(Pretrain(wanted), out)
    with open(out / "evaluations.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["epoch"]) for row in rows] == [("0", "0.0"), ("3", "1.0")]
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("image", "audio", "fusion", "joint", "chance"))
    assert "step-00000003.png" in (out / "run.html").read_text()
    for picture in ("pictures/step-00000000.png", "pictures/step-00000003.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    log = scalars(out)
    assert [event.step for event in log["loss/image"]] == [1, 2, 3]
    assert {"loss/audio", "gradient norm", "lr", "clips/s", "TFLOP/s", "eval/fusion"} <= log.keys()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_are_told_the_same(config, tmp_path, monkeypatch, name):
    (tmp_path / f"{name}.py").write_text(
        "told = []\n"
        "def init(**options): told.append(('init', options))\n"
        "def log(values, step): told.append((step, values))\n"
        "def finish(): told.append(('finish', None))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    assert train.train(Pretrain(config.but(epochs=1, tracker=name)), tmp_path / "run")
    (first, options), *steps, (last, _) = sys.modules.pop(name).told
    assert (first, last) == ("init", "finish")
    assert (options["project"], options["name"]) == ("avfusion", "run")
    assert options["config"]["epochs"] == 1
    assert [step for step, _ in steps] == [1, 2, 3]
    assert {"loss/image", "lr", "gradient norm", "clips/s"} <= steps[0][1].keys()


def test_a_run_that_fails_says_why_in_its_log(config, tmp_path, monkeypatch):
    monkeypatch.setattr(Pretrain, "losses", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train(Pretrain(config), tmp_path / "run")
    last = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert (last["state"], last["why"]) == ("failed", "ZeroDivisionError: division by zero")


def scalars(out):
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def test_probing_changes_nothing(config, undisturbed, tmp_path):
    assert train.train(Pretrain(config.but(eval_clips=3, eval_epochs=2)), tmp_path / "run")
    assert_same_run(undisturbed, tmp_path / "run")


def test_accumulation_and_checkpointing_change_rounding_only(config, tmp_path):
    config, losses = config.but(drop_path=0.0, epochs=1), []
    for name, changes in {"plain": {}, "other": {"accumulation": 2, "gradient_checkpointing": True}}.items():
        assert train.train(Pretrain(config.but(**changes)), tmp_path / name)
        losses.append(final_losses(config, tmp_path / name, 3))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def final_losses(config, out, step=STEPS):
    """Of the last weights. Those that do not matter, key biases, are noise in AdamW."""
    return losses_of(config, files(out, step)[0])


WORK = """
import json, os, sys
from functools import cache, partial
from pathlib import Path
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from avfkernels import layer
from avfusion.tasks.pretrain import Pretrain, PretrainConfig
from avfusion.training import loop as train
from avfusion.training import run_folder

torch.set_num_threads(1)
graphs = CompileCounterWithBackend("aot_eager")
layer._compiled = cache(partial(torch.compile, fullgraph=True, dynamic=False, backend=graphs))
for job in json.loads(Path(sys.argv[1]).read_text()):
    seen, noise = [], Pretrain.mask_noise
    Pretrain.mask_noise = lambda task, epoch, index: seen.append(index.tolist()) or noise(task, epoch, index)
    assert train.train(Pretrain(PretrainConfig.of(**job["config"])), job["out"], resume=True)
    Pretrain.mask_noise = noise
    Path(job["out"], f"seen{os.environ['RANK']}.json").write_text(json.dumps(seen))
print("graphs:", graphs.frame_count)
"""


def in_two_processes(folder, configs):
    """Train by each of some settings, in folders of their names; what is printed."""
    jobs = [{"out": str(folder / name), "config": config.flat()} for name, config in configs.items()]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "work.py").write_text(WORK)
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
            str(folder / "work.py"), str(folder / "jobs.json")]  # fmt: skip
    done = subprocess.run(
        line, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_same_curves(config, one, others):
    expected, losses = scalars(one), final_losses(config, one)
    for out in others:
        got = scalars(out)
        for tag in ("loss/image", "loss/audio", "gradient norm"):
            for ours, theirs in zip(got[tag], expected[tag], strict=True):
                assert ours.value == pytest.approx(theirs.value, rel=1e-5), (out.name, tag, ours.step)
        assert final_losses(config, out) == pytest.approx(losses, rel=1e-5)


# Three runs in two processes, which start torch and FSDP: half a minute.
def test_two_processes_equal_one_and_ddp_fsdp_and_one_two_one_keep_the_order(config, tmp_path, monkeypatch):
    config = config.but(drop_path=0.0, tracker="tensorboard", eval_clips=3, eval_epochs=3)
    seen, noise = [], Pretrain.mask_noise
    monkeypatch.setattr(Pretrain, "mask_noise", lambda t, e, index: seen.append(index.tolist()) or noise(t, e, index))
    assert train.train(Pretrain(config.but(accumulation=2)), tmp_path / "one")
    steps = [sorted(a + b) for a, b in zip(seen[::2], seen[1::2], strict=True)]
    at_step(monkeypatch, 5, crash)
    with pytest.raises(Crash):
        train.train(Pretrain(config.but(save_steps=2, tracker="none")), tmp_path / "mixed")

    in_two_processes(tmp_path, {"ddp": config, "fsdp": config.but(fsdp=True), "mixed": config.but(tracker="none")})
    assert_same_curves(config, tmp_path / "one", [tmp_path / "ddp", tmp_path / "fsdp"])
    for name in ("ddp", "fsdp"):
        assert (tmp_path / name / "evaluations.csv").read_text() != ""
        assert _together(tmp_path / name) == steps
    assert _together(tmp_path / "mixed") == steps[4:]
    assert final_losses(config, tmp_path / "mixed") == pytest.approx(final_losses(config, tmp_path / "one"), rel=1e-5)


@pytest.mark.slow  # dynamo, in two processes
def test_two_processes_with_compiled_layers_equal_one(config, tmp_path):
    config = config.but(drop_path=0.0, tracker="tensorboard")
    assert train.train(Pretrain(config), tmp_path / "one")
    said = in_two_processes(tmp_path, {"compiled": config.but(compile=True)})
    assert said.count("graphs: 3") == 2  # the layers; the decoders' last blocks, of two lengths
    assert_same_curves(config, tmp_path / "one", [tmp_path / "compiled"])


def _together(out):
    """The clips of each step, of both processes."""
    return [
        sorted(a + b) for a, b in zip(*(json.loads((out / f"seen{r}.json").read_text()) for r in (0, 1)), strict=True)
    ]


def test_an_exported_encoder_loads_and_is_the_runs(config, undisturbed, tmp_path):
    for name, options in (("encoder.safetensors", []), ("encoder.pth", ["--format", "authors"])):
        assert main(["export", str(undisturbed), "--out", str(tmp_path / name), *options]) == 0
        model, weights = load_encoder(tmp_path / name), files(undisturbed)[0]
        assert model.config == config.encoder
        assert all(torch.equal(value, weights[f"encoder.{key}"]) for key, value in model.state_dict().items())


def as_released(model, content):
    """What the authors' trainer resumes: their groups, and what their checkpoint manager reads."""
    names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    first = [name for name in names if name.startswith("audio_decoder")]
    first = [n for n in first if "." not in n] + [n for n in names if n.startswith("image_decoder") and "." not in n]
    names = {n: names[n] for n in first} | {n: p for n, p in names.items() if n.startswith("encoder.")} | {
        n: names[n] for kind in ("audio", "image") for n in names if n.startswith(f"{kind}_decoder") and "." in n
    }  # fmt: skip
    groups = [{"params": [p for p in names.values() if (p.ndim > 1) == decays], "weight_decay": 0.05 * decays}
              for decays in (False, True)]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))
    model.load_state_dict(content["state_dict"])
    optimizer.load_state_dict(content["optimizer"])
    steps = torch.tensor([0])
    steps.data[:] = content["n_steps"].data
    return optimizer, steps, content["epoch"]


def test_an_export_for_the_authors_is_resumed_by_their_trainer(config, undisturbed, tmp_path):
    """One step more of theirs, from what is exported, is one step more of ours."""
    path, step = export(undisturbed, tmp_path / "checkpoint_latest.pth", authors=True)
    theirs, task = Pretrain(config).build(), Pretrain(config)
    optimizer, steps, epoch = as_released(theirs, torch.load(path, weights_only=True))
    assert (steps.item(), step, epoch) == (STEPS, STEPS, 3)
    torch.amp.GradScaler("cpu").load_state_dict(torch.load(path, weights_only=True)["scaler"])
    ours = task.build()
    own = task.optimizer(ours)
    loader = task.loader(task.open(), 4, train=True)
    run_folder.load_checkpoint(latest_checkpoint(undisturbed), ours, own, loader, torch.device("cpu"))
    torch.manual_seed(0)
    inputs = (torch.randn(2, 3, 64, 64), torch.randn(2, 1, 32, 64), torch.rand(2, 16), torch.rand(2, 8))
    for model, taking in ((ours.eval(), own), (theirs.eval(), optimizer)):
        sum(task.losses(model, *inputs).values()).backward()
        for group in taking.param_groups:
            group["lr"] = 0.01
        taking.step()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name


def test_export_errors(undisturbed, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint of a pre-training run"):
        export(tmp_path)
    with pytest.raises(ValueError, match=r"expected a name in \.pth"):
        export(undisturbed, tmp_path / "encoder.safetensors", authors=True)
    with pytest.raises(ValueError, match=r"expected a name in \.safetensors"):
        export(undisturbed, tmp_path / "encoder.pth")


def test_pretrained_vits_start_the_run_at_rate_zero(config, tmp_path, monkeypatch):
    vit = {k: torch.full_like(v, 0.01) for k, v in DeepAVFusion(config.encoder).image.state_dict().items()}
    torch.save({"model": vit}, tmp_path / "mae.pth")
    rates = []
    monkeypatch.setattr(train, "set_rate", lambda opt, *a: rates.append(
        (set_rate(opt, *a), *(g["lr"] for g in opt.param_groups if g["pretrained"]))) or rates[-1][0])  # fmt: skip
    wanted = config.but(epochs=1, warmup_epochs=0, image_weights=str(tmp_path / "mae.pth"))
    assert train.train(Pretrain(wanted), tmp_path / "run")
    assert [row[1] for row in rates] == pytest.approx([row[0] * rise(i / 3, 1) for i, row in enumerate(rates)])
    assert rates[0][1] == 0 < rates[0][0]
    weight = files(tmp_path / "run", 3)[0]["encoder.image.blocks.0.attn.qkv.weight"]
    assert (weight - 0.01).abs().max() < 0.01  # started there, and has moved little
    assert not torch.equal(weight, vit["blocks.0.attn.qkv.weight"])
