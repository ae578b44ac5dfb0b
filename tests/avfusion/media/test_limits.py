"""Limits: what a file may ask of this machine, and what is said where it asks for more."""

import re
import struct
import zlib
from pathlib import Path

import pytest
import soundfile
import torch
from made_clips import picture, write_clip
from PIL import Image

from avfusion import ClipError, data, files
from avfusion.data import shards
from avfusion.data.pictures import _flickr_boxes, read_mask
from avfusion.media import limits, reader, streams
from avfusion.media.reader import read_clip, read_windows
from avfusion.media.stills import read_picture, read_sound, read_whole_stills
from avfusion.media.windows import Plan


def refused(message):
    return pytest.raises(ClipError, match=message)


def test_pixels_of_a_frame(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4")
    monkeypatch.setattr(limits, "PIXELS", 64 * 48)
    assert read_clip(path).frame.size == (64, 48)
    monkeypatch.setattr(limits, "PIXELS", 64 * 48 - 1)
    with refused(r"video stream: 64 x 48 pixels, more than 3,071: scale it down"):
        read_clip(path)


def png(path, width, height):
    """A picture that says so of itself, and is small."""
    Image.new("L", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    return path


def test_pixels_of_a_picture_are_not_decoded(tmp_path):
    path = png(tmp_path / "a.png", 9000, 9000)
    with refused("9000 x 9000 pixels, more than 67,108,864: scale it down"):
        read_picture("a", path)
    with pytest.raises(data.LayoutError, match="9000 x 9000 pixels"):
        read_mask(path)


@pytest.mark.parametrize(("rate", "fits"), [(44100, True), (22254, True), (47999, False), (1_000_000, False)])
def test_rates_that_need_a_filter_of_gigabytes(tmp_path, rate, fits):
    """16,000 x 47,999 weights and their intermediates are 9 GB."""
    soundfile.write(tmp_path / "a.wav", torch.zeros(rate).numpy(), rate)
    if fits:
        assert read_sound(tmp_path / "a.wav", duration=0.5)[0].shape == (1, 8000)
        return
    with refused(f"audio stream: {rate} Hz cannot be resampled to 16000 Hz here: convert it to 48000 Hz"):
        read_sound(tmp_path / "a.wav", duration=0.5)
    if rate < limits.RATE:
        path = write_clip(tmp_path / "a.mkv", audio="pcm_s16le", rate=rate, layout="mono")
        with refused(f"{rate} Hz cannot be resampled"):
            read_clip(path)


def test_seconds_that_are_decoded_on_the_way_to_a_window(tmp_path, monkeypatch):
    """A file of one keyframe."""
    path = write_clip(tmp_path / "a.mp4", seconds=6.0, keyframes=1000, picture=lambda _: picture(0))
    assert read_clip(path, start=4.0, duration=1.0).frame_time == pytest.approx(4.5, abs=0.05)
    monkeypatch.setattr(limits, "SECONDS", 3.0)
    with refused("video stream: 4 s lie between a keyframe and a window, more than 3: convert it, with keyframes"):
        read_clip(path, start=4.0, duration=1.0)
    assert len(list(read_windows(path, Plan(every=1.0), duration=1.0))) == 6  # each is near to the one before


def test_windows_of_a_file_that_says_it_lasts_for_ever(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4")
    monkeypatch.setattr(reader, "WINDOWS", 3)
    with refused("it says that it lasts 4 s, which are more than 3 windows: cut it, or take fewer"):
        list(read_windows(path, Plan(every=0.5)))


def test_timestamps_of_ages(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4")
    monkeypatch.setattr(limits, "MOMENT", 3)
    with refused("it lasts from 0 s to 4 s: its timestamps are damaged, export the clip again"):
        read_clip(path)


def test_sound_that_is_read_whole(tmp_path):
    soundfile.write(tmp_path / "a.wav", torch.zeros(8000 * 3).numpy(), 8000)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    frames, waveform = read_whole_stills(tmp_path / "a.jpg", tmp_path / "a.wav", sample_rate=16000)
    assert (len(frames), waveform.shape) == (1, (1, 48000))
    with refused("3 s long, more than 2 s: cut it into clips"):
        read_whole_stills(tmp_path / "a.jpg", tmp_path / "a.wav", sample_rate=16000, max_duration=2.0)


def test_bytes_of_an_annotation(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(f"<annotation>{' ' * 2**20}</annotation>")
    with pytest.raises(data.LayoutError, match=r"a\.xml: 1,048,601 bytes, more than the 1,048,576 that such"):
        _flickr_boxes(path)


def test_every_limit_is_documented():
    text = (Path(__file__).parents[3] / "docs/promises.md").read_text()
    for module in (limits, files, shards):
        for name in vars(module):
            if re.fullmatch("PIXELS|SECONDS|MOMENT|RATE|KERNEL|WINDOWS|JSON_BYTES|XML_BYTES|MEMBERS", name):
                assert f"{getattr(module, name):,}".removesuffix(".0") in text, name


def test_a_frame_that_grows_on_the_way_is_refused(tmp_path, monkeypatch):
    path, asked = write_clip(tmp_path / "a.mp4"), []
    monkeypatch.setattr(streams, "check_pixels", lambda path, *size: asked.append(size))
    read_clip(path)
    assert asked == [(64, 48), (64, 48)]  # what the container says, and what the frame is
