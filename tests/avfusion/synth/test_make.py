"""Synthetic data sets: the ground truth against the decoded files; the same bytes again, also after a kill.

Nothing of the renderer is used to check it: clips are decoded with PyAV and `read_clip`.
"""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from synthetic import SMALL, brightness, frames_of, levels, masks_of, sources_of, truths_of

from avfusion.cli import main
from avfusion.media.reader import read_clip, read_whole
from avfusion.synth import layouts, make
from avfusion.synth.layouts import scene
from avfusion.synth.make import mixture, synthesize
from avfusion.synth.render import render_frames, render_sources
from avfusion.synth.scene import Settings

# What colour the looks have that no background has: hue of 255, and how far from it a pixel may be.
HUES = {"striped ball": (0, 8), "chequered diamond": (200, 8), "furry puff": (233, 8), "scaly crescent": (126, 14)}


def tree(root):
    """All files below a directory with their bytes."""
    return {str(file.relative_to(root)): file.read_bytes() for file in Path(root).rglob("*") if file.is_file()}


def grown(mask, by):
    """A boolean mask [H, W], dilated by a square."""
    padded = np.pad(mask, by)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * by + 1, 2 * by + 1))
    return windows.any((-1, -2))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A set of the classes task with duets and trios, large enough that codec and edges do not matter."""
    root = tmp_path_factory.mktemp("videos")
    synthesize(root, Settings("audioset", clips=24, size=160, seconds=3.0, seed=5), workers=2)
    return root


def test_masks_are_where_the_decoded_video_shows_the_objects(videos):
    checked = Counter()
    for truth in truths_of(videos):
        frames, masks = frames_of(videos / truth["path"]), masks_of(videos, truth)
        assert frames.shape == (*masks.shape, 3) == (24, 160, 160, 3)
        for item in truth["objects"]:
            if item["look"] not in HUES:
                continue
            hue, width = HUES[item["look"]]
            for frame, mask in zip(frames[::6], masks[::6], strict=True):
                hsv = np.asarray(Image.fromarray(frame).convert("HSV")).astype(int)
                near = np.abs((hsv[..., 0] - hue + 128) % 256 - 128) <= width
                coloured = near & (hsv[..., 1] > 120) & (hsv[..., 2] > 30)
                here = mask == item["mask"]
                # The colour is nowhere in the background, and spread all over the object.
                assert coloured[grown(mask > 0, 2)].sum() > 0.97 * coloured.sum()
                assert coloured[here].mean() > 0.15
                ours, theirs = (np.argwhere(x) for x in (here, coloured & grown(here, 2)))
                assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.12 * np.sqrt(here.sum())
                checked[item["look"]] += 1
    assert min(checked[look] for look in HUES) >= 8, checked


def test_nothing_moves_outside_the_masks_and_objects_do(videos):
    for truth in truths_of(videos):
        frames, masks = frames_of(videos / truth["path"]).astype(int), masks_of(videos, truth)
        change = np.abs(frames - np.median(frames, 0)).mean(-1)
        shown = grown((masks > 0).any(0), 14)  # with the shadow
        assert change[:, ~shown].mean() < 2
        assert change[:, (masks > 0).any(0)].mean() > 4 * change[:, ~shown].mean()


def test_boxes_are_the_extents_of_the_masks(videos):
    for truth in truths_of(videos):
        masks = masks_of(videos, truth)
        assert masks.dtype == np.uint8
        assert set(np.unique(masks)) == {0} | {item["mask"] for item in truth["objects"] if item["onscreen"]}
        for item in truth["objects"]:
            if not item["onscreen"]:
                assert item["boxes"] is item["mask"] is None
                continue
            for mask, box in zip(masks, item["boxes"], strict=True):
                rows, columns = np.nonzero(mask == item["mask"])
                assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_sources_add_up_to_the_decoded_sound(videos):
    for truth in truths_of(videos):
        sources = sources_of(videos, truth)
        sounding = [item["source"] for item in truth["objects"] if item["sounding"]]
        assert sorted(sounding) == list(range(len(sources)))
        mixture = sources.sum(0) / 32768
        assert 0.05 < np.abs(mixture).max() < 1
        decoded = read_clip(videos / truth["path"], start=0, duration=3.0).waveform[0].numpy()
        assert np.corrcoef(mixture, decoded)[0, 1] > 0.95, truth["path"]
        assert (np.abs(sources).max(1) > 300).all()  # every one of them is heard


def test_brightness_follows_each_objects_own_sound(videos):
    """Of the decoded video, in the object's mask, against its own waveform's level at the time."""
    own, others = [], []
    for truth in truths_of(videos):
        frames, masks, sources = frames_of(videos / truth["path"]), masks_of(videos, truth), sources_of(videos, truth)
        level = levels(sources, truth)
        for item in truth["objects"]:
            if item["sounding"] and item["onscreen"]:
                value = brightness(frames, masks == item["mask"])
                for source, heard in enumerate(level):
                    (own if source == item["source"] else others).append(np.corrcoef(value, heard)[0, 1])
    assert len(own) > 25
    assert np.median(own) > 0.8
    assert np.median(others) < 0.4


def test_scenes_hold_what_they_should(videos):
    truths = truths_of(videos)
    count = Counter(sum(item["onscreen"] for item in truth["objects"]) for truth in truths)
    assert set(count) == {1, 2, 3}
    assert any(not item["sounding"] for truth in truths for item in truth["objects"])
    assert any(not item["onscreen"] for truth in truths for item in truth["objects"])
    for truth in truths:
        heard = {item["label"] for item in truth["objects"] if item["sounding"]}
        assert truth["labels"] == sorted(heard)
        assert truth["label"] in heard
        for item in truth["objects"]:
            assert item["sounding"] or item["onscreen"]
            assert item["class"].startswith(item["look"] or "")
            assert item["class"].endswith(item["timbre"] or "")
    assert len({truth["id"] for truth in truths}) == 24
    assert all(re.fullmatch(r"[\w-]{11}", truth["id"], re.ASCII) for truth in truths)


def test_masks_of_the_archive_need_no_pickle():
    files = layouts.clip_files(SMALL, 0)
    archive = np.load(io.BytesIO(next(data for path, data in files.items() if path.endswith(".npz"))))
    assert archive["masks"].shape == (16, 64, 64)


# Reproducible, resumable ----------------------------------------------------------------------------------------------


def test_same_seed_same_bytes_whatever_the_number_of_workers(tmp_path):
    for name, workers, seed in (("one", 1, 0), ("two", 2, 0), ("other", 1, 1)):
        synthesize(tmp_path / name, replace(SMALL, seed=seed), workers=workers)
    one, two, other = (tree(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert not {data for path, data in one.items() if path.endswith(".mp4")} & set(other.values())


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_a_clip_depends_on_its_index_alone(layout):
    for index in range(6):
        few, many = (layouts.clip_files(replace(SMALL, layout=layout, clips=clips), index) for clips in (4, 400))
        assert few == many
        assert list(few)[-1].endswith("truth.json")


def test_a_file_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(make.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        synthesize(tmp_path, SMALL)
    assert all(name.endswith(".part") for name in tree(tmp_path))


# Eighty clips are rendered and encoded.
def test_killed_in_the_middle_it_goes_on_and_gives_the_same(tmp_path):
    settings = replace(SMALL, clips=40)
    options = f"--clips {settings.clips} --size {settings.size} --seconds {settings.seconds} --workers 2".split()
    process = subprocess.Popen([sys.executable, "-m", "avfusion", "synth", str(tmp_path / "cut"), *options])
    while not list((tmp_path / "cut").glob("truth/*/truth.json")):
        assert process.poll() is None
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert len(gone) >= 2
    assert not alive
    assert not (tmp_path / "cut/annotations/vggsound.csv").exists()
    kept = {truth["id"]: os.stat(tmp_path / "cut" / truth["path"]).st_mtime_ns for truth in truths_of(tmp_path / "cut")}
    assert 0 < len(kept) < settings.clips

    (tmp_path / "cut" / truths_of(tmp_path / "cut")[0]["path"]).with_name("rest.mp4.part").touch()
    made = synthesize(tmp_path / "cut", settings, workers=2)
    synthesize(tmp_path / "whole", settings)
    assert made == settings.clips - len(kept)
    for truth in truths_of(tmp_path / "cut"):
        if truth["id"] in kept:
            assert os.stat(tmp_path / "cut" / truth["path"]).st_mtime_ns == kept[truth["id"]]
    assert {p: d for p, d in tree(tmp_path / "cut").items() if "rest.mp4" not in p} == tree(tmp_path / "whole")


def test_a_lost_clip_is_made_again_and_a_set_can_grow(tmp_path):
    synthesize(tmp_path / "set", replace(SMALL, clips=4))
    shutil.rmtree(next((tmp_path / "set/clips").iterdir()))
    assert synthesize(tmp_path / "set", replace(SMALL, clips=6)) == 3
    synthesize(tmp_path / "new", replace(SMALL, clips=6))
    assert tree(tmp_path / "set") == tree(tmp_path / "new")


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, "seed is 0 there, 1 here"), ({"task": "synchrony"}, "task is 'classes' there, 'synchrony' here"),
     ({"clips": 2}, "clips is 3 there, 2 here"), ({"layout": "audioset"}, "layout is 'vggsound' there")],
)  # fmt: skip
def test_other_settings_are_not_mixed_in(tmp_path, change, named):
    settings = replace(SMALL, clips=3)
    synthesize(tmp_path, settings)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=re.escape(named)):
        synthesize(tmp_path, replace(settings, **change))
    assert tree(tmp_path) == before


def test_somebody_elses_directory_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["synth", str(tmp_path), "--clips", "1"]) == 1
    assert "not empty, and not made by synth" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [("--size 63", "size=63: expected an even number"), ("--classes 1", "classes=1: expected 2 to 12"),
     ("--clips 0", "clips=0"), ("--seconds 0.2", "seconds=0.2"), ("--workers 0", "--workers: 0 is less than 1"),
     ("--seconds 0", "seconds=0"), ("--fps 0", "fps=0"), ("--seconds 4 --layout avsbench", "leave it out"),
     ("--fps 8 --layout flickr-soundnet", "leave it out")],
)  # fmt: skip
def test_bad_options_are_named(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as exit:
        main(["synth", str(tmp_path / "out"), *options.split()])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Worker processes start anew.
def test_a_killed_worker_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "_make", _die)
    with pytest.raises(make.BrokenProcessPool, match="fewer --workers"):
        synthesize(tmp_path, SMALL, workers=2)


def _die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_help_loads_nothing_heavy():
    code = "import sys, avfusion.cli; assert not {'numpy', 'torch', 'av', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_mixture_has_one_picture_and_two_sounds(tmp_path):
    settings = Settings("flickr-soundnet", clips=2, size=64, fps=4)
    mixture(tmp_path / "mixed.mp4", settings)
    frames, sound = read_whole(tmp_path / "mixed.mp4", frame_rate=4)
    seen, heard = scene(settings, 0), scene(settings, 1)
    painted, _ = render_frames(seen, 64, np.arange(len(frames)) / 4)
    assert all(np.abs(np.asarray(image) - true.astype(int)).mean() < 6
               for (_, image), true in zip(frames, painted, strict=True))  # fmt: skip
    own, other = (render_sources(each).sum(0)[: sound.shape[1]] for each in (seen, heard))
    heard = sound[0].numpy()[: len(own)]
    assert np.corrcoef(heard, own + other)[0, 1] > 0.95
    assert all(np.corrcoef(heard, one)[0, 1] < 0.95 for one in (own, other))
