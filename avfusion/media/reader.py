"""A video file -> frames and sound: a window (`read_clip`), many (`read_windows`), or all of it (`read_whole`)."""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import av
import torch
from PIL import Image
from torch import Tensor

from avfusion.media.clip import Clip, ClipError
from avfusion.media.limits import WINDOWS
from avfusion.media.streams import Streams, opened
from avfusion.media.windows import Plan, View, Window


class Excerpt(NamedTuple):
    """A window of a file. Times are in seconds from the file's beginning."""

    number: int  # of the window
    count: int  # type: ignore[assignment]  # windows of the file; a tuple has a method of that name
    start: float
    end: float  # of the window, or of the sound where it ends before
    waveform: Tensor  # [1, samples] float32, mono, in [-1, 1]
    frames: list[Any]  # what the transform made of each
    frame_times: list[float]


def read_clip(
    path: str | os.PathLike,
    *,
    start: float | str | View | None = None,
    duration: float = 3.0,
    sample_rate: int = 16000,
    frame: str = "middle",
    min_duration: float = 0.0,
    generator: torch.Generator | None = None,
) -> Clip:
    """Decode one frame and `duration` seconds of mono sound from a video file.

    Any container and codec that PyAV opens will do. Only the window is decoded, after a seek to shortly before it.

    Args:
        start: where the window begins, in seconds; None centres it on the part of the clip that has picture and sound,
            "random" puts it uniformly at random inside that part, and a `View` is one of several spread over it.
        duration: length of the window in seconds.
        sample_rate: of the returned waveform, in Hz.
        frame: "middle" takes the frame nearest to the middle of the window's part that has picture and sound;
            "random" the one nearest to a uniformly random time there.
        min_duration: how many seconds of picture and sound together the clip must have.
        generator: makes random times reproducible; None uses torch's global generator.

    The waveform has exactly `round(duration * sample_rate)` samples in [-1, 1], the mean of all channels. It follows
    the file's timestamps: to the sample in MP4 and MOV, to the millisecond that Matroska and WebM store. Moments
    without sound before or inside the audio stream are silent; a window that reaches past its end is filled by
    reflection, as in the paper. Rotation stored with the video (phones) is applied, mirroring is not.

    Raises:
        ClipError: the file is missing, empty or no video; has no video or no audio stream; is truncated or damaged
            inside the window; is shorter than `min_duration`; `start` lies outside the clip; the sound is not finite.
        ValueError: another argument is out of range.
    """
    window, path = Window(start, duration, sample_rate, frame, min_duration, generator), os.fspath(path)
    with opened(path) as container:
        streams = Streams(path, container)
        first, moments = window.place(path, streams.extent["video"], streams.extent["audio"])
        image, frame_time = next(streams.frames(moments))
        waveform = next(streams.waveforms([first], window.samples, sample_rate))
    return Clip(image, waveform, first / sample_rate, frame_time, path)


def read_windows(
    path: str | os.PathLike,
    plan: Plan = Plan(),  # noqa: B008  it is immutable
    *,
    frames: int = 1,
    duration: float = 3.0,
    sample_rate: int = 16000,
    transform: Callable[[Image.Image], Any] = lambda image: image,
    skip: Collection[int] = (),
) -> Iterator[Excerpt]:
    """Decode windows of a video file, of any length, from front to back: each is what `read_clip` gives for it.

    Every frame and every sample of sound is decoded at most once, and only the windows at hand are held. What lies 30 s
    behind the next window is sought instead.

    Args:
        plan: which windows.
        frames: how many of each window, evenly spread.
        duration, sample_rate: as for `read_clip`.
        transform: what becomes of a frame, an upright RGB picture.
        skip: numbers of windows to leave out.

    Raises `ClipError` as `read_clip` does, after the windows before the one that cannot be read; where a time of
    `plan.at` lies outside the file, after all others.
    """
    path = os.fspath(path)
    with ExitStack() as stack:
        eyes = ears = Streams(path, stack.enter_context(opened(path)))
        video, audio = eyes.extent["video"], eyes.extent["audio"]
        if plan.every is not None and (min(video[1], audio[1]) / plan.every) > WINDOWS:
            raise ClipError(path, "file", f"it says that it lasts {min(video[1], audio[1]):.0f} s, which are more than "
                                          f"{WINDOWS:,} windows: cut it, or take fewer")  # fmt: skip
        starts, placed, outside = plan.starts(video, audio, duration), [], None
        for number, start in enumerate(starts):
            try:
                if number not in skip:
                    placed.append((number, *Window(start, duration, sample_rate).place(path, video, audio, frames)))
            except ClipError as error:
                outside = outside or error
        if len(placed) > 1:  # the two streams go on side by side
            ears = Streams(path, stack.enter_context(opened(path)), eyes)
        samples = round(duration * sample_rate)
        waveforms = ears.waveforms([first for _, first, _ in placed], samples, sample_rate)
        times = sorted({moment for *_, moments in placed for moment in moments})  # windows overlap
        shown, held = zip(times, eyes.frames(times), strict=False), dict[float, Any]()
        for number, first, moments in placed:
            held = {moment: frame for moment, frame in held.items() if moment >= moments[0]}
            while moments[-1] not in held:
                moment, (image, time) = next(shown)
                held[moment] = transform(image), time
            start = first / sample_rate
            yield Excerpt(
                number, len(starts), start, max(min(start + duration, audio[1]), start), next(waveforms),
                [held[moment][0] for moment in moments], [held[moment][1] for moment in moments],
            )  # fmt: skip
        if outside is not None:
            raise outside


def read_whole(
    path: str | os.PathLike,
    *,
    frame_rate: float,
    max_frames: int | None = None,
    sample_rate: int = 16000,
    max_duration: float = 600.0,
    crop: bool = False,
    transform: Callable[[Image.Image], Any] = lambda image: image,
) -> tuple[list[tuple[float, Any]], Tensor]:
    """Decode the part of a video file that has picture and sound: its frames at a rate, and its sound.

    Returns pairs of a time and what `transform` makes of an upright RGB frame, the frame nearest to the middle of each
    of `frame_rate` slots a second, or of `max_frames` slots if these are fewer, and the mono waveform [1, samples].
    Times are in seconds from the waveform's beginning. Frames are transformed as they come: minutes of them do not fit
    into memory.

    Of what is longer than `max_duration` seconds, `crop` takes the middle. Otherwise it raises `ClipError`, as for all
    that `read_clip` does.
    """
    path = os.fspath(path)
    with opened(path) as container:
        streams = Streams(path, container)
        (v_begin, v_end), (a_begin, a_end) = streams.extent["video"], streams.extent["audio"]
        begin, end = max(v_begin, a_begin, 0), min(v_end, a_end)
        if crop and end - begin > max_duration:
            begin, end = (begin + end - max_duration) / 2, (begin + end + max_duration) / 2
        first, stop = round(begin * sample_rate), round(end * sample_rate)
        begin, duration = first / sample_rate, (stop - first) / sample_rate
        if duration <= 0:
            raise ClipError(path, "file", f"too short: {0:.2f} s of picture and sound, needed are some s")
        if duration > max_duration:
            raise ClipError(path, "file", f"{duration:.0f} s long, more than {max_duration:.0f} s: cut it into clips")
        frame_rate = min(frame_rate, max_frames / duration) if max_frames else frame_rate
        slots = 1 if streams.still else max(1, int(duration * frame_rate))
        middles = [begin + min((slot + 0.5) / frame_rate, duration) for slot in range(slots)]
        frames = [(time - begin, transform(image)) for image, time in streams.frames(middles)]
        return frames, next(streams.waveforms([first], stop - first, sample_rate))


def length_of(path: str | os.PathLike) -> float | None:
    """How long a video file says that it is, in seconds; None where it cannot be opened, or does not tell."""
    try:
        with opened(os.fspath(path)) as container:
            return container.duration / av.time_base if container.duration else None
    except ClipError:
        return None
