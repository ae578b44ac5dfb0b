"""Reading real clips: the right frame, the right samples, and a `ClipError` for everything else."""

import os
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from made_clips import CLICK, FPS, cut, noise, number, with_a_gap, write_clip
from PIL import Image

from avfusion.media.clip import ClipError
from avfusion.media.reader import read_clip, read_whole
from avfusion.media.transforms import LogMel, image_transform

RATE = 16000


def onset(clip):
    """When the click begins, in seconds of the file."""
    return clip.start + (clip.waveform[0].abs() > 0.3).nonzero()[0].item() / RATE


def resampled(samples, rate, start, count=3 * RATE):
    """What a waveform at `rate` should read as, from `start` seconds on."""
    return torchaudio.functional.resample(torch.as_tensor(samples), rate, RATE)[..., round(start * RATE) :][..., :count]


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {}),
        ("mono.mp4", {"layout": "mono", "rate": 44100}),
        ("8k.mov", {"audio": "pcm_s16le", "rate": 8000, "video": "mpeg4"}),
        ("flac.mkv", {"audio": "flac", "rate": 44100}),
        ("aac.mkv", {}),
        ("vp8.webm", {"video": "libvpx", "audio": "libopus"}),
        ("live.webm", {"video": "libvpx", "audio": "libopus", "container": {"live": "1"}}),
        ("fragments.mp4", {"container": {"movflags": "frag_keyframe+empty_moov"}, "keyframes": 25}),
        ("a.flv", {"rate": 44100}),
        ("a.ts", {}),
    ],
)
def test_frame_and_sound_of_the_middle(tmp_path, name, options):
    clip = read_clip(write_clip(tmp_path / name, **options))
    # These keep the encoders' delay: the file's first moment is up to 80 ms before the first frame and the first sound.
    slack = 0.081 if name in ("a.ts", "a.flv", "fragments.mp4") else 0.002
    assert clip.path == str(tmp_path / name)
    assert clip.waveform.shape == (1, 48000)
    assert clip.waveform.dtype == torch.float32
    assert 0.25 < clip.waveform.abs().max() <= 1
    assert clip.start == pytest.approx(0.5, abs=0.04 + slack)
    assert clip.frame.mode == "RGB"
    assert clip.frame.size == (64, 48)
    assert clip.frame_time == pytest.approx(clip.start + 1.5, abs=0.5 / FPS + 1e-6)
    assert number(clip.frame) / FPS == pytest.approx(clip.frame_time, abs=slack)
    assert onset(clip) == pytest.approx(CLICK, abs=slack)


@pytest.mark.parametrize(
    ("codec", "rate", "layout", "tolerance"),
    [
        ("pcm_u8", 16000, "mono", 5e-3),
        ("pcm_s16le", 44100, "stereo", 1e-4),
        ("pcm_s24le", 48000, "mono", 1e-6),
        ("pcm_s32le", 22050, "stereo", 1e-6),
        ("pcm_f32le", 8000, "mono", 1e-6),
        ("pcm_f64le", 11025, "5.1", 1e-6),
    ],
)
@pytest.mark.parametrize("start", [0.0, 0.7, 0.98725])
def test_waveform_is_exact_to_the_sample(tmp_path, codec, rate, layout, tolerance, start):
    path = write_clip(tmp_path / "a.mov", audio=codec, rate=rate, layout=layout, sound=noise)
    expected = resampled(noise(rate, 4), rate, start)
    torch.testing.assert_close(read_clip(path, start=start).waveform[0], expected, rtol=0, atol=tolerance)


def test_rounded_timestamps_do_not_tear_the_sound(tmp_path):
    path = write_clip(tmp_path / "a.mkv", audio="flac", rate=44100, sound=noise)  # packets of 104.5 ms, said to be 104
    expected = resampled(noise(44100, 4), 44100, 0)
    torch.testing.assert_close(read_clip(path, start=0).waveform[0], expected, rtol=0, atol=1e-4)


def test_waveform_is_clipped_to_full_scale(tmp_path):
    path = write_clip(tmp_path / "a.mov", audio="pcm_f32le", sound=lambda *args: 4 * noise(*args))
    waveform = read_clip(path).waveform
    assert waveform.max() == 1
    assert waveform.min() == -1


def test_channels_are_averaged(tmp_path):
    def left_only(rate, seconds):
        return np.stack([noise(rate, seconds), np.zeros(round(rate * seconds), "f4")])

    path = write_clip(tmp_path / "a.mov", audio="pcm_f32le", rate=RATE, sound=left_only)
    expected = torch.as_tensor(noise(RATE, 4)[: 3 * RATE]) / 2
    torch.testing.assert_close(read_clip(path, start=0).waveform[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_seeking_gives_the_same_sound_as_reading_from_the_beginning(tmp_path, name):
    path = write_clip(tmp_path / name, seconds=8, sound=noise, layout="mono")
    whole = read_clip(path, start=0, duration=8).waveform
    for start in (0.0, 0.01, 1.234, 4.9):
        window = read_clip(path, start=start, duration=2).waveform
        at = round(start * RATE)
        shift = 16 if name == "a.mkv" else 0  # Matroska rounds timestamps to milliseconds
        errors = [
            (whole[:, at + s :][:, : window.shape[1] - 32] - window[:, : window.shape[1] - 32]).abs().max()
            for s in range(-min(shift, at), shift + 1)
        ]
        assert min(errors) < 0.02  # the noise is 0.5 loud


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
@pytest.mark.parametrize("keyframes", [12, 1000])
def test_frame_is_the_nearest_one_with_sparse_keyframes_and_b_frames(tmp_path, name, keyframes):
    path = write_clip(tmp_path / name, seconds=5, keyframes=keyframes)
    first = read_clip(path, start=0, duration=0.001)  # MPEG-TS: the first frame is not at zero
    for start in (0.0, 0.3, 1.013, 1.44, 3.21):
        clip = read_clip(path, start=start, duration=1.0)
        assert abs(clip.frame_time - (start + 0.5)) <= 0.5 / FPS + 1e-6
        assert number(clip.frame) == round((clip.frame_time - first.frame_time) * FPS)


def test_random_frames_come_from_the_window_and_follow_the_generator(tmp_path):
    path = write_clip(tmp_path / "a.mp4", seconds=6)

    def numbers(seed):
        generator = torch.Generator().manual_seed(seed)
        clips = [read_clip(path, start=2, duration=1, frame="random", generator=generator) for _ in range(20)]
        return [number(clip.frame) for clip in clips]

    assert numbers(0) == numbers(0) != numbers(1)
    assert min(numbers(0)) >= 2 * FPS
    assert max(numbers(0)) <= 3 * FPS
    assert max(numbers(0)) - min(numbers(0)) > FPS // 2


def test_audio_that_starts_late_stays_in_sync(tmp_path):
    def tone(rate, seconds):
        return np.full(round(rate * seconds), 0.5, "f4")

    path = write_clip(tmp_path / "a.mkv", audio="flac", sound=tone, audio_start=1.5, audio_seconds=2.5)
    waveform = read_clip(path, start=0).waveform[0]
    assert waveform[: round(1.498 * RATE)].abs().max() == 0
    assert waveform[round(1.502 * RATE) :].sub(0.5).abs().max() < 0.01
    clip = read_clip(path)  # centred on what both streams share: 1.5 to 4 s, too short for the window
    assert clip.start == pytest.approx(1.5, abs=0.002)
    assert clip.frame_time == pytest.approx(2.75, abs=0.5 / FPS + 0.002)


def test_video_that_starts_late_stays_in_sync(tmp_path):
    clip = read_clip(write_clip(tmp_path / "a.mp4", seconds=3, audio_seconds=5, video_start=2.0))
    assert clip.start == pytest.approx(2.0, abs=0.01)  # centre of 2 to 5 s
    assert clip.frame_time == pytest.approx(3.5, abs=0.5 / FPS + 1e-6)
    assert number(clip.frame) == round((clip.frame_time - 2.0) * FPS)
    assert onset(clip) == pytest.approx(CLICK, abs=0.002)


@pytest.mark.parametrize("name", ["a.mov", "a.mkv"])
@pytest.mark.parametrize("audio_seconds", [0.01, 0.8])
def test_short_audio_is_reflected_and_not_called_truncated(tmp_path, name, audio_seconds):
    path = write_clip(tmp_path / name, audio="pcm_s16le", rate=RATE, sound=noise, audio_seconds=audio_seconds)
    clip = read_clip(path)
    x = torch.as_tensor(noise(RATE, audio_seconds))
    expected = torch.cat([x, x.flip(0)] * 200)[: 3 * RATE]
    torch.testing.assert_close(clip.waveform[0], expected, rtol=0, atol=1e-4)
    assert clip.frame_time <= audio_seconds  # the frame belongs to what is heard


@pytest.mark.parametrize("name", ["still.mp4", "still.mkv"])
def test_a_still_lasts_as_long_as_its_sound(tmp_path, name):
    """Of a video of one frame, `read_whole` once gave the 40 ms of sound under that frame."""
    path = write_clip(tmp_path / name, seconds=1 / FPS, audio_seconds=4.0)
    frames, waveform = read_whole(path, frame_rate=8)
    assert [number(image) for _, image in frames] == [0]
    assert waveform.shape[1] / 16000 == pytest.approx(4.0, abs=0.05)
    clip = read_clip(path, min_duration=3.5)
    assert clip.start == pytest.approx(0.5, abs=0.03)
    assert clip.frame_time == pytest.approx(0.0, abs=0.03)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_of_the_phone_is_undone(tmp_path, rotation):
    upright = np.zeros((48, 64, 3), "u1")
    upright[:12, :16] = 255  # a white corner at the top left
    clip = read_clip(write_clip(tmp_path / "a.mp4", rotation=rotation, picture=lambda _: upright))
    corners = {(0, 0): "top left", (0, 1): "top right", (1, 0): "bottom left", (1, 1): "bottom right"}
    image = np.asarray(clip.frame.convert("L"))
    white = [place for (y, x), place in corners.items() if image[-5 * y + 2, -5 * x + 2] > 127]
    assert white == [{90: "bottom left", 180: "bottom right", -90: "top right"}[rotation]]
    assert clip.frame.size == ((64, 48) if rotation == 180 else (48, 64))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_slideshow_shows_its_last_picture_to_the_end(tmp_path, name):
    path = write_clip(tmp_path / name, seconds=3, fps=1, audio_seconds=10, rate=RATE)
    clip = read_clip(path, start=6.5)
    assert (clip.frame_time, number(clip.frame)) == (2.0, 2)
    assert read_clip(path, start=0.0).frame_time in (1.0, 2.0)


def test_tags_in_another_encoding_do_no_harm(tmp_path):
    path = tmp_path / "a.mkv"
    write_clip(path, tags={"title": "Cafe au lait"})
    path.write_bytes(path.read_bytes().replace(b"Cafe", b"Caf\xe9"))
    assert read_clip(path).waveform.shape == (1, 48000)


def test_file_name_that_looks_like_a_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip("a.mp4")
    os.rename("a.mp4", "http:a.mp4")
    assert read_clip("http:a.mp4").waveform.shape == (1, 48000)


@pytest.mark.parametrize("name", ["guitar_and_keyboard.mp4", "keyboard_and_tabla.mp4"])
def test_demonstration_clips(name):
    path = Path(__file__).parents[4] / "shared" / "media" / name
    if not path.exists():
        pytest.skip("the demonstration clips are not here")
    clip = read_clip(path)
    assert clip.frame.size == (256, 230)
    assert clip.waveform.std() > 0.01
    assert clip.start == 0


# --- what goes wrong --------------------------------------------------------------------------------------------------


def nan(rate, seconds):
    return np.where(np.arange(round(rate * seconds)) == rate, np.nan, 0.1)


def text(path):
    path.write_text("It was a dark and stormy night; the rain fell in torrents.\n" * 50)
    return path


FASTSTART = {"movflags": "faststart"}  # the index in front of the data

BROKEN = {
    "missing": (lambda d: d / "a.mp4", "file", "no such file"),
    "directory": (lambda d: d, "file", "a directory"),
    "empty": (lambda d: (d / "a.mp4").touch() or d / "a.mp4", "file", "zero bytes"),
    "text": (lambda d: text(d / "a.mp4"), "file", "not a video"),
    "no audio": (lambda d: write_clip(d / "a.mp4", audio=None), "audio", "no audio stream"),
    "no video": (lambda d: write_clip(d / "a.mp4", video=None), "video", "no video stream"),
    "cover picture": (lambda d: write_clip(d / "a.mp4", video="png", seconds=1, cover=True), "video", "no video"),
    "no samples": (lambda d: write_clip(d / "a.mkv", audio="flac", audio_seconds=0), "audio", "empty"),
    "no samples, mov": (lambda d: write_clip(d / "a.mov", audio="pcm_s16le", audio_seconds=0), "audio", ""),
    "mp4 cut": (lambda d: cut(write_clip(d / "a.mp4")), "file", "truncated"),
    "mp4 cut behind its index": (
        lambda d: cut(write_clip(d / "a.mp4", sound=noise, container=FASTSTART)), None, "truncated"),
    "mov cut behind its index": (
        lambda d: cut(write_clip(d / "a.mov", audio="pcm_s16le", container=FASTSTART)), "video", "truncated"),
    "mkv cut": (lambda d: cut(write_clip(d / "a.mkv", sound=noise)), None, "truncated"),
    "webm cut": (
        lambda d: cut(write_clip(d / "a.webm", video="libvpx", audio="libopus", sound=noise)), None, "truncated"),
    "not finite": (lambda d: write_clip(d / "a.mov", audio="pcm_f32le", sound=nan), "audio", "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_clip_is_refused_with_path_stream_and_reason(tmp_path, case):
    make, stream, reason = BROKEN[case]
    path = make(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    with pytest.raises(ClipError) as caught:
        read_clip(path)
    error = caught.value
    assert error.path == str(path)
    assert error.stream == stream or (stream is None and error.stream in ("video", "audio"))
    assert reason in error.reason
    assert str(error).startswith(str(path))
    assert error.stream == "file" or f"{error.stream} stream: " in str(error)
    if before:
        assert len(os.listdir("/proc/self/fd")) == before, "the file is still open"


def test_damaged_bytes_raise_nothing_but_clip_errors(tmp_path):
    random = np.random.default_rng(0)
    outcomes = set()
    for name in ("a.mp4", "a.mkv", "a.ts", "a.flv"):
        intact = np.fromfile(write_clip(tmp_path / name, sound=noise), "u1")
        for _ in range(25):
            damaged = intact[: random.integers(1, 2 * len(intact))].copy()  # half of them cut
            head = min(3000, len(damaged))  # where the headers are
            damaged[random.integers(0, head, 5)] = random.integers(0, 256, 5)
            damaged.tofile(tmp_path / name)
            try:
                read_clip(tmp_path / name)
                outcomes.add("read")
            except ClipError as error:
                outcomes.add(error.stream)
    assert {"file", "audio"} <= outcomes


def test_cut_file_can_be_read_before_the_cut(tmp_path):
    path = cut(write_clip(tmp_path / "a.mkv", seconds=8, sound=noise))
    assert read_clip(path, start=0.5, duration=1).waveform.std() > 0.01


@pytest.mark.parametrize("start", [-0.5, 4.5, float("nan")])
def test_start_outside_the_clip_names_its_duration(tmp_path, start):
    with pytest.raises(ClipError, match=r"outside the clip, which lasts 4\.0") as caught:
        read_clip(write_clip(tmp_path / "a.mp4"), start=start)
    assert caught.value.stream == "audio"


def test_window_past_the_end_is_reflected(tmp_path):
    path = write_clip(tmp_path / "a.mov", audio="pcm_s16le", rate=RATE, sound=noise)
    x = torch.as_tensor(noise(RATE, 4)[3 * RATE :])
    expected = torch.cat([x, x.flip(0), x])
    torch.testing.assert_close(read_clip(path, start=3).waveform[0], expected, rtol=0, atol=1e-4)


def test_a_gap_in_the_sound_is_silent(tmp_path):
    path = with_a_gap(tmp_path / "a.mkv")
    around = read_clip(path, start=0, duration=6).waveform[0]
    for start in (0, 0.5, 2, 4.5):  # the gap begins in the window, is all of it, ends in it
        window = read_clip(path, start=start, duration=2).waveform[0]
        expected = around[round(start * RATE) :][: 2 * RATE]  # which ends with the sound
        torch.testing.assert_close(window[: len(expected)], expected)
    assert around[round(1.01 * RATE) : round(4.99 * RATE)].abs().max() == 0
    assert around[round(0.01 * RATE) : round(0.99 * RATE)].sub(0.5).abs().max() < 0.01


@pytest.mark.parametrize("video", ["mpeg4", "libx264"])
def test_avi_which_stores_no_pts(tmp_path, video):
    path = write_clip(tmp_path / "a.avi", video=video, audio="pcm_s16le", rate=RATE, keyframes=12, b_frames=2)
    for target in (0.5, 1.9, 3.1):
        clip = read_clip(path, start=target - 0.25, duration=0.5)
        assert clip.frame_time == pytest.approx(target, abs=0.5 / FPS + 1e-6)
        # A keyframe of MPEG-4 may come out before frames that are coded after it, and the container does not tell.
        assert abs(number(clip.frame) - round(clip.frame_time * FPS)) <= (2 if video == "mpeg4" else 0)
    frames, _ = read_whole(path, frame_rate=FPS)  # the last ones come out of the decoder at the end, by no packet
    numbers = [number(image) for _, image in frames]
    assert len(numbers) >= 4 * FPS - 2
    assert len({n - round(time * FPS) for n, (time, _) in zip(numbers, frames, strict=True)}) == 1
    assert numbers[-1] == 4 * FPS - 1


def test_whole_files_are_transformed_as_they_are_read(tmp_path):
    """Minutes of frames at full size do not fit into memory."""
    path, alive = write_clip(tmp_path / "a.mp4"), []

    def shrink(image):
        alive.append(weakref.ref(image))
        assert sum(ref() is not None for ref in alive) <= 2
        return image.size

    frames, _ = read_whole(path, frame_rate=8, transform=shrink)
    assert [size for _, size in frames] == [(64, 48)] * 32


def test_window_before_the_sound_is_refused(tmp_path):
    path = write_clip(tmp_path / "a.mkv", audio="flac", audio_start=3.0, audio_seconds=1.0)
    with pytest.raises(ClipError, match=r"no sound in the window that starts at 0\.50 s"):
        read_clip(path, start=0.5, duration=1)


@pytest.mark.parametrize(("name", "value"), [("duration", 0.0), ("frame", "first")])
def test_bad_argument_is_a_plain_value_error(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name}=") as caught:
        read_clip(tmp_path / "a.mp4", **{name: value})
    assert not isinstance(caught.value, ClipError)


def test_clip_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ClipError("a.mp4", "audio", "no audio stream")))
    assert (error.path, error.stream, error.reason) == ("a.mp4", "audio", "no audio stream")
    assert str(error) == "a.mp4: audio stream: no audio stream"


# --- transforms -------------------------------------------------------------------------------------------------------


def test_log_mel_is_the_papers_spectrogram():
    waveform = torch.as_tensor(noise(RATE, 3))[None, None].repeat(2, 1, 1) * torch.tensor([1.0, 0.1])[:, None, None]
    reference = torchaudio.transforms.MelSpectrogram(sample_rate=RATE, n_fft=800, hop_length=250, n_mels=128)
    expected = torch.log10(reference(waveform) + 1e-7)[..., :-1]
    log_mel = LogMel()(waveform)
    assert log_mel.shape == (2, 1, 128, 192)
    torch.testing.assert_close(log_mel, expected, rtol=0, atol=1e-4)


def test_log_mel_stays_out_of_checkpoints_and_in_float32():
    mel = LogMel()
    assert not mel.state_dict()
    loud = torch.ones(1, 48000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = mel(loud)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, mel(loud), rtol=0, atol=0)


def test_log_mel_refuses_a_waveform_shorter_than_half_a_window():
    with pytest.raises(ValueError, match=r"waveform \(1, 400\).*400 samples"):
        LogMel()(torch.zeros(1, 400))


def test_evaluation_transform_is_the_normalised_centre():
    image = Image.new("RGB", (640, 360), (255, 0, 0))
    image.paste((0, 255, 0), (160, 20, 480, 340))
    x = image_transform()(image)
    assert x.shape == (3, 224, 224)
    assert x.dtype == torch.float32
    green = (torch.tensor([0.0, 1.0, 0.0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(x.amax((1, 2)), green, rtol=0, atol=1e-4)  # 7/8 of 360 pixels: nothing red is left
    torch.testing.assert_close(x.amin((1, 2)), green, rtol=0, atol=1e-4)
    assert image_transform((96, 128))(image).shape == (3, 96, 128)


def test_training_transform_varies():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 120, 3), "u1"))
    torch.manual_seed(0)
    transform = image_transform((32, 48), train=True)
    a, b = transform(image), transform(image)
    assert a.shape == b.shape == (3, 32, 48)
    assert not torch.equal(a, b)
