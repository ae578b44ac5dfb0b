"""What is most like a clip, a sound, a picture."""

import re

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from made_clips import write_clip
from PIL import Image

from avfusion import DeepAVFusion, Embedder, EncoderConfig, Features, save_encoder
from avfusion.cli import main
from avfusion.embedding.search import Collection, ask_clip, ask_image, ask_sound
from avfusion.media.clip import ClipError
from avfusion.media.reader import read_clip

CONFIG = EncoderConfig(dim=32, depth=1, num_heads=2, image_size=(32, 48), audio_size=(32, 64), fusion="dense")


def tone(hertz):
    return lambda rate, seconds: (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(
        "f4"
    )


def shade(level):
    return lambda _: np.full((48, 64, 3), level, "u1")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three clips of which each looks and sounds like itself alone, and their features."""
    root = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    save_encoder(DeepAVFusion(CONFIG), root / "encoder.safetensors")
    (root / "clips").mkdir()
    for name, level, hertz in (("dark", 20, 200), ("gray", 120, 800), ("white", 240, 3000)):
        write_clip(root / "clips" / f"{name}.mp4" if (root / "clips").is_dir() else _folder(root) / f"{name}.mp4",
                   seconds=4, rate=16000, sound=tone(hertz), picture=shade(level))  # fmt: skip
    line = (
        f"embed {root}/clips --checkpoint {root}/encoder.safetensors --every 0.5 --shard-rows 4 --out {root}/features"
    )
    assert main(line.split()) == 0
    return root


def _folder(root):
    (root / "clips").mkdir()
    return root / "clips"


@pytest.fixture(scope="module")
def collection(made):
    from avfusion import load_encoder

    return Collection(made / "features", Embedder(load_encoder(made / "encoder.safetensors")))


@pytest.mark.parametrize("by", ["joint", "image", "audio", "fusion"])
def test_it_is_exact(made, collection, by):
    query, _ = ask_clip(collection.embedder, made / "clips" / "gray.mp4", 1.25)
    features = Features.load(made / "features")
    names = ("image", "audio", "fusion")
    cosine = torch.stack([F.cosine_similarity(torch.from_numpy(query[name]), features.pooled[:, n])
                          for n, name in enumerate(names)])  # fmt: skip
    cosine = cosine.mean(0) if by == "joint" else cosine[names.index(by)]
    first, *rest = collection.nearest(query, 3, by)
    row = list(zip(features.clips, features.starts, strict=True)).index((first.file, first.start))
    assert cosine[row] == pytest.approx(cosine.max().item(), abs=1e-6)
    assert first.similarity == pytest.approx(cosine.max().item(), abs=1e-5)
    assert first.file.endswith("gray.mp4")
    assert all(hit.similarity <= first.similarity for hit in rest)


def test_of_windows_that_overlap_the_best_is_shown(made, collection):
    query, _ = ask_clip(collection.embedder, made / "clips" / "dark.mp4")
    hits = collection.nearest(query, 100)
    assert {hit.file for hit in hits} == {str(made / "clips" / f"{name}.mp4") for name in ("dark", "gray", "white")}
    for a in hits:
        for b in hits:
            assert a is b or a.file != b.file or a.end <= b.start or b.end <= a.start


def test_the_windows_of_the_file_itself_are_left_out(made, collection):
    """Of which there may be more than are asked for."""
    clip = made / "clips" / "gray.mp4"
    query, _ = ask_clip(collection.embedder, clip)
    assert collection.nearest(query, 2)[0].file == str(clip)
    others = collection.nearest(query, 2, other_than=clip)
    assert len(others) == 2
    assert str(clip) not in {hit.file for hit in others}


def test_windows_of_files_that_tell_no_end_are_the_models(made, collection, tmp_path):
    features = Features.load(made / "features")
    features.ends = [float("nan")] * len(features.ends)
    features.save(tmp_path / "old.safetensors")
    query, _ = ask_clip(collection.embedder, made / "clips" / "gray.mp4")
    hits = Collection(tmp_path / "old.safetensors", collection.embedder).nearest(query, 50)
    assert all(hit.end - hit.start == pytest.approx(1.0) for hit in hits)
    assert len(hits) <= 12  # those that overlap are left out


def test_a_sound_and_a_picture_find_their_clips(made, collection, tmp_path):
    for name, level, hertz in (("dark", 20, 200), ("white", 240, 3000)):
        soundfile.write(tmp_path / "a.wav", tone(hertz)(16000, 2), 16000)
        Image.fromarray(shade(level)(0)).save(tmp_path / "a.png")
        (sound,) = collection.nearest(ask_sound(collection.embedder, tmp_path / "a.wav")[0], 1, "audio")
        (image,) = collection.nearest(ask_image(collection.embedder, tmp_path / "a.png")[0], 1, "image")
        assert sound.file.endswith(f"{name}.mp4")
        assert image.file.endswith(f"{name}.mp4")
        _, batch = ask_sound(collection.embedder, tmp_path / "a.wav")
        np.testing.assert_allclose(batch["waveform"][0], tone(hertz)(16000, 1.5)[8000:], atol=1e-3)


def test_files_that_cannot_be_read(collection, tmp_path):
    (tmp_path / "bad").write_bytes(b"bad")
    for ask in (ask_clip, ask_sound, ask_image):
        with pytest.raises(ClipError, match="bad: "):
            ask(collection.embedder, tmp_path / "bad")


@pytest.mark.parametrize("option", ["--clip", "--sound", "--image"])
def test_command(made, tmp_path, capsys, option):
    clip = made / "clips" / "white.mp4"
    query = {"--clip": clip, "--sound": tmp_path / "a.wav", "--image": tmp_path / "a.png"}[option]
    soundfile.write(tmp_path / "a.wav", tone(3000)(16000, 2), 16000)
    read_clip(clip).frame.save(tmp_path / "a.png")
    page = tmp_path / "page.html"
    assert main(["search", str(made / "features"), option, str(query), "--top", "2", "--out", str(page)]) == 0
    told = capsys.readouterr().out
    first, second, last = told.splitlines()
    assert re.fullmatch(rf"  1  [01]\.\d{{3}}  +\d\.\d\d s - +\d\.\d\d s  {clip}", first)
    assert second.startswith("  2  ")
    assert f"2 windows most like {query}" in last
    text = page.read_text()
    assert text.count("like it: ") == 2
    assert query.name in text


def test_what_cannot_be_meant_is_refused(made, tmp_path, capsys):
    def search(*options):
        return main(["search", str(made / "features"), *map(str, options), "--out", str(tmp_path / "page.html")])

    clip = made / "clips" / "dark.mp4"
    for options, told in (([], "one of the arguments"), (["--image", clip, "--at", 1], "--at is one time, of --clip"),
                          (["--clip", clip, "--at", "1,2"], "--at is one time, of --clip")):  # fmt: skip
        with pytest.raises(SystemExit):
            search(*options)
        assert told in capsys.readouterr().err
    save_encoder(DeepAVFusion(CONFIG), tmp_path / "other.safetensors")
    assert search("--clip", clip, "--checkpoint", tmp_path / "other.safetensors") == 1
    assert "features: features of another encoder" in capsys.readouterr().err
    assert search("--clip", clip, "--at", 99) == 1
    assert "start=99.0 s is outside the clip" in capsys.readouterr().err
    assert main(["search", str(tmp_path / "none"), "--clip", str(clip)]) == 1
    assert "none: no such file or folder" in capsys.readouterr().err


def test_a_clip_that_is_gone_leaves_its_place_on_the_page(made, tmp_path, capsys):
    gone = tmp_path / "gone.mp4"
    gone.write_bytes((made / "clips" / "gray.mp4").read_bytes())
    weights = str(made / "encoder.safetensors")
    assert main(["embed", str(gone), "--checkpoint", weights, "--out", str(tmp_path / "f.parquet")]) == 0
    gone.unlink()
    page = tmp_path / "page.html"
    line = ["search", str(tmp_path / "f.parquet"), "--clip", str(made / "clips" / "gray.mp4"), "--out", str(page)]
    assert main(line) == 0
    assert "no such file" in page.read_text()
