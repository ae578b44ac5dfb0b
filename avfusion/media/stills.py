"""Clips that are no video files: a sound file, and pictures taken at known times of it."""

import bisect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import torch
import torchaudio.functional as AF
from PIL import Image
from torch import Tensor

from avfusion.media.clip import Clip, ClipError
from avfusion.media.limits import check_pixels, check_rates
from avfusion.media.windows import Window, reflect, span_to_resample

# What PIL raises for files that are no pictures, damaged, or pretend to be gigantic.
PICTURE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def read_stills(path: Path, audio: Path, **window) -> Clip:
    """`avfusion.read_clip` for a sound file and either one picture or a folder with a picture a second, N.jpg.

    The picture N stands for the second from N to N + 1. `window` are the arguments of `read_clip`.
    """
    times, pictures = _pictures(path)
    return still_clip(os.fspath(path), audio, times, lambda index: pictures[index], **window)


def read_whole_stills(
    path: Path,
    audio: Path,
    *,
    sample_rate: int,
    max_duration: float = 600.0,
    transform: Callable[[Image.Image], Any] = lambda image: image,
) -> tuple[list[tuple[float, Any]], Tensor]:
    """`read_whole` for such files: every picture with its time, and the whole sound."""
    times, pictures = _pictures(path)
    if (length := length_of_sound(audio)) > max_duration:
        raise ClipError(
            os.fspath(path), "audio", f"{length:.0f} s long, more than {max_duration:.0f} s: cut it into clips"
        )
    try:
        samples, rate = soundfile.read(audio, dtype="float32", always_2d=True)
    except (OSError, soundfile.SoundFileRuntimeError) as error:
        raise ClipError(os.fspath(path), "audio", f"cannot be decoded: {error}") from error
    waveform = _sound(os.fspath(path), samples, rate, sample_rate)
    frames = [
        (time, transform(read_picture(os.fspath(path), file))) for time, file in zip(times, pictures, strict=True)
    ]
    return frames, waveform


def length_of_sound(audio: Path) -> float:
    """Of a sound file, in seconds. Raises `ClipError`."""
    try:
        return soundfile.info(audio).duration
    except (OSError, soundfile.SoundFileRuntimeError) as error:
        raise ClipError(os.fspath(audio), "audio", f"cannot be decoded: {error}") from error


def _pictures(path: Path) -> tuple[list[float], list[Path]]:
    if not path.is_dir():
        return [0.0], [path]
    pictures = sorted((p for p in path.iterdir() if p.stem.isdecimal()), key=lambda p: int(p.stem))
    if not pictures:
        raise ClipError(os.fspath(path), "video", "no pictures in the folder, expected 0.jpg, 1.jpg, ...")
    return [int(p.stem) + 0.5 for p in pictures], pictures


def _sound(path: str, samples: np.ndarray, rate: int, sample_rate: int) -> Tensor:
    """[samples, channels] at one rate -> mono at another, [1, samples] in [-1, 1]."""
    check_rates(path, rate, sample_rate)
    waveform = torch.from_numpy(samples).mean(1)[None]
    if not waveform.isfinite().all():
        raise ClipError(path, "audio", "the samples are not finite: export the clip again")
    return (waveform if rate == sample_rate else AF.resample(waveform, rate, sample_rate)).clamp(-1, 1)


def still_clip(
    path: str, audio: Path | BinaryIO, times: Sequence[float], picture: Callable[[int], Path | BinaryIO], **window
) -> Clip:
    """A window of `audio` and, opened by `picture(index)`, the picture whose time is nearest to a moment of it.

    `window` are the arguments of `avfusion.read_clip`, and what is returned and raised is as there; `path` is what to
    show.
    """
    waveform, start, moment = _window_of_sound(path, audio, Window(**window))
    after = bisect.bisect(times, moment)
    nearest = min((i for i in (after - 1, after) if 0 <= i < len(times)), key=lambda i: abs(times[i] - moment))
    return Clip(read_picture(path, picture(nearest)), waveform, start, times[nearest], path)


def read_sound(path: Path, **window) -> tuple[Tensor, float]:
    """A window of a sound file, [1, samples], and where it begins. Arguments and errors are those of `read_clip`."""
    waveform, start, _ = _window_of_sound(os.fspath(path), path, Window(**window))
    return waveform, start


def _window_of_sound(path: str, audio: Path | BinaryIO, window: Window) -> tuple[Tensor, float, float]:
    """The window [1, samples], where it begins, and the moment of its picture."""
    try:
        with soundfile.SoundFile(audio) as sound:
            rate, length = sound.samplerate, sound.frames / sound.samplerate
            check_rates(path, rate, window.sample_rate)
            if not length:
                raise ClipError(path, "audio", "it is empty: fetch or export the clip again")
            first, (moment,) = window.place(path, (0.0, length), (0.0, length))
            begin, stop, skip = span_to_resample(first, window.samples, rate, window.sample_rate)
            begin, skip = (begin, skip) if begin > 0 else (0, first)
            sound.seek(begin)
            content = sound.read(min(stop, sound.frames) - begin, dtype="float32", always_2d=True)
    except (OSError, soundfile.SoundFileRuntimeError) as error:
        raise ClipError(path, "audio", f"cannot be decoded: {error}") from error
    waveform = _sound(path, content, rate, window.sample_rate)[:, skip : skip + window.samples]
    start = first / window.sample_rate
    if not waveform.shape[1]:
        raise ClipError(path, "audio", f"no sound in the window that starts at {start:.2f} s")
    return reflect(waveform, window.samples), start, moment


def read_picture(path: str, file: Path | BinaryIO) -> Image.Image:
    """A picture in RGB, or a `ClipError` of `path`."""
    try:
        with Image.open(file) as image:
            check_pixels(path, *image.size)
            return image.convert("RGB")
    except ClipError:
        raise
    except PICTURE_ERRORS as error:
        raise ClipError(path, "video", f"the picture cannot be decoded: {error}") from error
