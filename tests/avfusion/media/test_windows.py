"""Windows of files of any length, decoded once from front to back."""

import io
import tracemalloc
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from made_clips import FPS, noise, number, picture, with_a_gap, write_clip

from avfusion.media import streams
from avfusion.media.clip import ClipError
from avfusion.media.reader import length_of, read_clip, read_windows
from avfusion.media.windows import Plan

CONTAINERS = {
    "a.mp4": {"keyframes": 12, "b_frames": 2}, "b.mp4": {"keyframes": 1000, "b_frames": 3}, "a.mkv": {"b_frames": 2},
    "a.mov": {}, "a.ts": {"keyframes": 12}, "a.webm": {"video": "libvpx", "audio": "libopus"},
    "a.avi": {"video": "mpeg4", "audio": "pcm_s16le"}, "a.flv": {"rate": 44100, "audio": "aac"},
}  # fmt: skip


@pytest.fixture
def decoded(monkeypatch):
    """Times of everything that is decoded, by stream."""
    times, decode = {"video": [], "audio": []}, streams.Streams._decode

    def counted(self, kind, *arguments):
        for time, frame in decode(self, kind, *arguments):
            times[kind].append((round(time, 6), frame.samples if kind == "audio" else 1))
            yield time, frame

    monkeypatch.setattr(streams.Streams, "_decode", counted)
    return times


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("plan", [Plan(every=0.7), Plan(at=(4, 0.25, 1.5)), Plan(count=3), Plan()], ids=str)
def test_each_window_is_what_read_clip_gives(tmp_path, name, plan):
    path = write_clip(tmp_path / name, seconds=5, sound=noise, **CONTAINERS[name])
    found = list(read_windows(path, plan, duration=1.5))
    assert [window.number for window in found] == list(range(found[0].count))
    for window in found:
        clip = read_clip(path, start=window.start, duration=1.5)
        # Seeking shifts Matroska's sound by the millisecond that it rounds to, and AAC starts anew.
        shift = 16 if name in ("a.mkv", "a.webm", "a.flv") else 0
        errors = [(window.waveform[:, 16:-16] - clip.waveform.roll(by)[:, 16:-16]).abs().max()
                  for by in range(-shift, shift + 1)]  # fmt: skip
        assert min(errors) < (0.05 if shift else 1e-3)  # the noise is 0.5 loud
        assert window.frame_times == pytest.approx([clip.frame_time], abs=1e-9)
        assert np.array_equal(window.frames[0], clip.frame)
        assert window.end == pytest.approx(min(window.start + 1.5, 5), abs=0.1)


def test_which_windows_there_are(tmp_path):
    path = write_clip(tmp_path / "a.mkv", audio="flac", seconds=5)

    def starts(**plan):
        return [window.start for window in read_windows(path, Plan(**plan), duration=2)]

    assert starts(every=1.0) == [0, 1, 2, 3]  # whole ones
    assert starts(every=1.1) == pytest.approx([0, 1.1, 2.2], abs=1e-4)
    assert starts(every=60) == [0]
    assert starts(count=1) == starts() == [1.5]
    assert starts(count=2) == [0, 3]
    assert starts(count=3) == [0, 1.5, 3]
    assert starts(at=(4.5, 0)) == [0, 4.5]  # the second reaches past the end
    short = write_clip(tmp_path / "short.mkv", audio="flac", seconds=1)
    for plan in (Plan(every=0.5), Plan(count=4), Plan()):
        (window,) = read_windows(short, plan, duration=2)  # filled by reflection
        assert (window.start, window.end, window.count) == (0, 1, 1)
        assert torch.equal(window.waveform, read_clip(short, duration=2).waveform)
    assert length_of(path) == pytest.approx(5, abs=0.1)
    assert length_of(tmp_path / "missing.mp4") is None


@pytest.mark.parametrize("options", [{"every": 0.0}, {"every": float("nan")}, {"at": (-1,)}, {"count": 0},
                                     {"every": 1.0, "count": 2}], ids=str)  # fmt: skip
def test_plans_that_cannot_be_meant(options):
    with pytest.raises(ValueError, match=r"every=|at=|count=|give one of every, at and count"):
        Plan(**options)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm"])
def test_each_frame_and_each_sample_is_decoded_once(tmp_path, decoded, name):
    path = write_clip(tmp_path / name, seconds=6, sound=noise, **CONTAINERS[name])
    assert len(list(read_windows(path, Plan(every=0.25), frames=3, duration=2))) == 17
    video, audio = (decoded[kind] for kind in ("video", "audio"))
    assert len(set(video)) == len(video) <= 6 * FPS
    assert len(set(audio)) == len(audio)
    assert sum(samples for _, samples in audio) == pytest.approx(6 * 48000, abs=3000)


def test_frames_that_nothing_needs_are_left_out(tmp_path, decoded):
    """And the others are the nearest ones all the same."""
    path = write_clip(tmp_path / "a.mp4", seconds=6, keyframes=25, b_frames=3)
    for window in read_windows(path, Plan(every=1.0), duration=1):
        (time,) = window.frame_times
        assert time == pytest.approx(window.start + 0.5, abs=0.5 / FPS + 1e-6)
        assert number(window.frames[0]) == round(time * FPS)
    assert len(decoded["video"]) < 0.7 * 6 * FPS


def test_several_frames_of_windows_that_overlap(tmp_path):
    path = write_clip(tmp_path / "a.mp4", seconds=5, b_frames=2)
    for window in read_windows(path, Plan(every=0.5), frames=4, duration=2):
        assert window.frame_times == pytest.approx([window.start + s for s in (0.25, 0.75, 1.25, 1.75)], abs=0.03)
        assert [number(frame) for frame in window.frames] == [round(time * FPS) for time in window.frame_times]


def irregular(path, times):
    """A video whose frames come at these times, in hundredths of a second, and sound all along."""
    with av.open(str(path), "w") as output:
        video = output.add_stream("libx264", rate=100, options={"bf": "3"})
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = output.add_stream("aac", rate=48000, layout="mono")
        for index, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 100)
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
        for at in range(0, times[-1] * 480, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), "f4"), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, at, Fraction(1, 48000)
            output.mux(audio.encode(frame))
        output.mux(audio.encode(None))
    return str(path)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_frame_rates(tmp_path, name):
    times = [0, 3, 4, 5, 40, 90, 91, 92, 93, 94, 180, 260, 261, 300, 302, 304, 380, 381, 400]
    path = irregular(tmp_path / name, times)
    shown = [read_clip(path, start=start, duration=0.4).frame_time for start in (0, 0.9, 2.5)]
    assert shown == pytest.approx([0.05, 0.94, 2.61], abs=1e-3)
    for window in read_windows(path, Plan(every=0.1), duration=0.4):
        middle = 100 * (window.start + 0.2)
        nearest = min(abs(time - middle) for time in times)
        (time,) = window.frame_times
        assert abs(100 * time - middle) <= nearest + 0.2
        assert times[number(window.frames[0])] == pytest.approx(100 * time, abs=0.2)


def test_a_gap_in_the_sound_is_silent_in_every_window(tmp_path):
    for window in read_windows(with_a_gap(tmp_path / "a.mkv"), Plan(every=0.5), duration=1):
        at = window.start + torch.arange(16000) / 16000
        heard = (at < 0.98) | (at > 5.02)
        silent = (at > 1.02) & (at < 4.98)
        assert window.waveform[0, heard].sub(0.5).abs().max() < 0.02 if heard.any() else silent.any()
        assert window.waveform[0, silent].abs().max() == 0 if silent.any() else heard.any()


def test_windows_that_lie_far_apart_are_sought(tmp_path, decoded, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", seconds=9, sound=noise, keyframes=12)
    monkeypatch.setattr(streams, "JUMP", 2.0)
    plan = Plan(at=(0.5, 7.5))
    first, second = read_windows(path, plan, duration=0.5)
    assert len(decoded["video"]) < 3 * FPS
    assert sum(samples for _, samples in decoded["audio"]) < 4 * 48000
    assert [number(window.frames[0]) for window in (first, second)] == [
        round(FPS * window.frame_times[0]) for window in (first, second)
    ]
    for window in (first, second):
        expected = read_clip(path, start=window.start, duration=0.5).waveform
        torch.testing.assert_close(window.waveform, expected, rtol=0, atol=1e-3)


def test_a_file_of_one_keyframe_is_not_sought_again_and_again(tmp_path, decoded, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", seconds=9, keyframes=1000)
    monkeypatch.setattr(streams, "JUMP", 1.0)
    found = list(read_windows(path, Plan(every=1.5), duration=1))
    assert [number(window.frames[0]) for window in found] == [round(FPS * w.frame_times[0]) for w in found]
    assert len(decoded["video"]) <= 2 * 9 * FPS + 10  # one vain attempt


def test_memory_does_not_grow_with_the_file(tmp_path):
    """4 minutes of sound are 46 MB as numbers."""
    quiet = {"audio": "flac", "sound": lambda rate, seconds: np.zeros(int(rate * seconds), "f4")}
    path = write_clip(tmp_path / "a.mkv", seconds=240, fps=4, **quiet)
    alive = []

    def shrink(image):
        alive.append(weakref.ref(image))
        return image.size

    tracemalloc.start()
    try:
        windows = 0
        for window in read_windows(path, Plan(every=1.0), transform=shrink):
            windows += 1
            assert window.waveform.shape == (1, 48000)
            assert sum(ref() is not None for ref in alive) <= 2
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()
    assert windows == 238


def test_windows_that_are_skipped_change_no_other(tmp_path):
    path = write_clip(tmp_path / "a.mp4", seconds=5, sound=noise, b_frames=2)
    whole = {window.number: window for window in read_windows(path, Plan(every=0.5), duration=1)}
    some = list(read_windows(path, Plan(every=0.5), duration=1, skip={0, 1, 2, 4}))
    assert [window.number for window in some] == [3, 5, 6, 7, 8]
    for window in some:
        torch.testing.assert_close(window.waveform, whole[window.number].waveform, rtol=0, atol=1e-3)
        assert np.array_equal(window.frames[0], whole[window.number].frames[0])
        assert window.count == 9
    assert list(read_windows(path, Plan(every=0.5), duration=1, skip=range(9))) == []


def test_what_lies_before_damage_is_there(tmp_path):
    path = write_clip(tmp_path / "a.mkv", seconds=8, sound=noise)
    content = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(content[: len(content) // 2])
    found = []

    def read():
        for window in read_windows(path, Plan(every=0.5), duration=1):
            found.append(window.number)

    with pytest.raises(ClipError, match="truncated or damaged"):
        read()
    assert found == list(range(len(found)))
    assert 4 <= len(found) <= 8


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_a_file_that_shrinks_while_it_is_read(tmp_path, name):
    path = write_clip(tmp_path / name, seconds=60, fps=10, sound=noise)
    windows = read_windows(path, Plan(every=0.5), duration=1)
    assert next(windows).number == 0
    with open(path, "r+b") as file:
        file.truncate(file.seek(0, 2) // 2)
    with pytest.raises(ClipError, match=r"truncated or damaged|may be damaged"):
        list(windows)


def test_times_outside_the_file_are_named_after_the_windows_inside(tmp_path):
    windows = read_windows(write_clip(tmp_path / "a.mp4", seconds=3), Plan(at=(1, 9)), duration=1)
    assert next(windows).start == 1
    with pytest.raises(ClipError, match=r"start=9.0 s is outside the clip, which lasts 3\.\d+ s"):
        next(windows)


@pytest.mark.parametrize(("options", "stream"), [({"audio": None}, "audio"), ({"video": None}, "video")])
def test_files_of_one_stream_are_refused(tmp_path, options, stream):
    with pytest.raises(ClipError, match=f"no {stream} stream in the file"):
        next(read_windows(write_clip(tmp_path / "a.mp4", seconds=1, **options), Plan(every=1.0)))


def test_files_at_addresses(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", seconds=3, sound=noise)
    content = (tmp_path / "a.mp4").read_bytes()
    # Of one file in fsspec's memory all readers share the place; of any other store each has its own.
    monkeypatch.setattr(streams, "open_remote", lambda path: io.BytesIO(content))
    here, there = (list(read_windows(p, Plan(every=0.5), duration=1)) for p in (path, "s3://clips/a.mp4"))
    assert len(here) == 5
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.waveform, other.waveform)
        assert np.array_equal(one.frames[0], other.frames[0])
    monkeypatch.undo()
    with pytest.raises(ClipError, match="no such file: give the address"):
        read_clip("memory://clips/missing.mp4")
    for address in ("file:///etc/passwd", "simplecache::memory://clips/a.mp4", "ftp://host/a.mp4"):
        with pytest.raises((ClipError, ValueError), match=r"begins with one of|no such file"):
            read_clip(address)
