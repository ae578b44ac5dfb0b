"""Encoders as programs for onnxruntime and torch.export, pre-processing inside."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from made_clips import noise, write_clip

from avfusion import DeepAVFusion, EncoderConfig, LogMel, load_encoder, save_encoder
from avfusion.cli import main
from avfusion.media.reader import read_clip
from avfusion.media.transforms import image_pixels, normalize
from avfusion.models import programs
from avfusion.models.programs import OUTPUTS, Spectrogram, export_program

CONFIG = EncoderConfig(dim=48, depth=1, num_heads=3, image_size=(32, 48), audio_size=(32, 64))
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("programs")
    torch.manual_seed(0)
    save_encoder(DeepAVFusion(CONFIG), root / "encoder.safetensors")
    write_clip(root / "clip.mp4", seconds=2, sound=noise)
    return root


def inputs(made, count):
    clip = read_clip(made / "clip.mp4", duration=1.0)
    pixels, waveform = image_pixels(CONFIG.image_size)(clip.frame), clip.waveform[0]
    return (torch.stack([pixels.roll(n, -1) for n in range(count)]),
            torch.stack([waveform.roll(n * 100) for n in range(count)]))  # fmt: skip


def expected(made, pixels, waveform):
    """By the parts that the model is otherwise fed with."""
    with torch.no_grad():
        x = load_encoder(made / "encoder.safetensors")(normalize(pixels), LogMel(n_mels=32)(waveform[:, None]))
    return [*x, torch.stack([tokens.mean(1) for tokens in x], 1)]


def test_spectrogram_is_log_mel(made):
    _, waveform = inputs(made, 2)
    for x in (waveform, torch.zeros(1, 16000), 0.5 * torch.sin(torch.arange(32000.0) * 0.1)[None]):
        mel = LogMel(n_mels=64).double()
        found, own = Spectrogram(LogMel(n_mels=64))(x), mel(x[:, None])
        assert found.shape == own.shape
        assert (found - own).norm() <= 2e-5 * own.norm()


def test_onnx_as_the_documentation_has_it(tmp_path, capsys, monkeypatch):
    """At the documentation's sizes, with its own lines of pre-processing."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = DeepAVFusion(EncoderConfig(dim=48, depth=1, num_heads=3, fusion="dense")).eval()
    save_encoder(model, "encoder.safetensors")
    write_clip("my.mp4", seconds=4, sound=noise, rate=16000)
    assert main(["export", "encoder.safetensors", "--format", "onnx", "--clip", "my.mp4"]) == 0
    assert "off the encoder by (norms) x_image" in capsys.readouterr().out
    lines = (Path(__file__).parents[3] / "docs" / "export.md").read_text().split("```python\n")[2].split("```")[0]
    said = {}
    exec(lines, said)
    with av.open("my.mp4") as file:
        frame = next(file.decode(video=0)).to_image()
    assert np.array_equal(said["pixels"], image_pixels()(frame))
    sound = read_clip("my.mp4", start=0).waveform[0].numpy()  # whose time is not zero
    alike = [np.corrcoef(said["waveform"][600:-600], np.roll(sound, by)[600:-600])[0, 1] for by in range(-600, 600)]
    assert max(alike) > 0.999
    with torch.no_grad():
        x = model(normalize(torch.tensor(said["pixels"])[None]), LogMel()(torch.tensor(said["waveform"])[None, None]))
    for name, tokens in zip(OUTPUTS, (*x, torch.stack([t.mean(1) for t in x], 1)), strict=True):
        assert np.linalg.norm(said[name] - tokens.numpy()) <= 1e-4 * np.linalg.norm(tokens.numpy()), name


def test_torch_export_gives_the_models_features(made, tmp_path, capsys):
    out = tmp_path / "program.pt2"
    assert main(["export", str(made / "encoder.safetensors"), "--format", "torch-export", "--out", str(out)]) == 0
    assert "off the encoder by (norms) x_image" in capsys.readouterr().out
    for count in (1, 4):
        batch = inputs(made, count)
        for own, x in zip(torch.export.load(out).module()(*batch), expected(made, *batch), strict=True):
            assert (own - x).norm() <= 1e-4 * x.norm()


# A process of its own, without this package.
def test_an_exported_program_runs_where_the_package_is_not(made, tmp_path):
    assert main(["export", str(made / "encoder.safetensors"), "--format", "torch-export"]) == 0
    batch = inputs(made, 3)
    torch.save([*batch, *expected(made, *batch)], tmp_path / "batch.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['avfusion'] = sys.modules['avfkernels'] = None\n"
        f"pixels, waveform, *expected = torch.load(r'{tmp_path / 'batch.pt'}')\n"
        f"found = torch.export.load(r'{made / 'encoder.pt2'}').module()(pixels, waveform)\n"
        "assert all((own - x).norm() <= 1e-4 * x.norm() for own, x in zip(found, expected))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_program_that_differs_is_not_written(made, tmp_path, monkeypatch):
    clip = tuple(x[0] for x in inputs(made, 1))
    monkeypatch.setattr(programs, "OUTPUTS", ("x_image",))
    monkeypatch.setattr(programs.Program, "forward", lambda self, pixels, waveform: (
        1.001 * self.encoder(programs.normalize(pixels), self.mel(waveform))[0],))  # fmt: skip
    monkeypatch.setattr(programs, "zip", lambda *columns, strict: zip(*columns, strict=False), raising=False)
    with pytest.raises(RuntimeError, match=r"a\.pt2: not written: on the clip it differs"):
        export_program(DeepAVFusion(CONFIG).eval(), tmp_path / "a.pt2", "torch-export", clip)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("options", "told"), [
    (["--format", "onnx", "--out", "a.pt2"], "expected a name in .onnx"),
    (["--clip", "a.mp4"], "--format safetensors is none"),
])  # fmt: skip
def test_usage_errors(made, capsys, options, told):
    with pytest.raises(SystemExit):
        main(["export", str(made / "encoder.safetensors"), *options])
    assert told in capsys.readouterr().err


def test_packages_that_are_missing_are_named_first(made, capsys, monkeypatch):
    monkeypatch.setattr(programs, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["export", str(made / "encoder.safetensors"), "--format", "onnx"])
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err
