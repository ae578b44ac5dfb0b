"""A video file -> frames and sound, decoded with PyAV: a window of it (`read_clip`), or all of it (`read_whole`)."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import av
import numpy as np
import torch
import torchaudio.functional as AF
from av.stream import Disposition
from PIL import Image
from torch import Tensor

from avfusion.media.clip import Clip, ClipError
from avfusion.media.windows import View, Window, reflect, span_to_resample

T = TypeVar("T")
TRUNCATED = "nothing decodes after {:.2f} s of {:.2f} s: the file is truncated or damaged, fetch or export it again"


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
    with _open(path) as container:
        reader = _Reader(path, container)
        first, moment = window.place(path, reader.extent[reader.video], reader.extent[reader.audio])
        image, frame_time = reader.nearest_frame(moment)
        waveform = reader.waveform(first, window.samples, sample_rate)
    return Clip(image, waveform, first / sample_rate, frame_time, path)


def read_whole(
    path: str | os.PathLike,
    *,
    frame_rate: float,
    max_frames: int | None = None,
    sample_rate: int = 16000,
    max_duration: float = 600.0,
    crop: bool = False,
    transform: Callable[[Image.Image], T] = lambda image: image,
) -> tuple[list[tuple[float, T]], Tensor]:
    """Decode the part of a video file that has picture and sound: its frames at a rate, and its sound.

    Returns pairs of a time and what `transform` makes of an upright RGB frame, the frame nearest to the middle of each
    of `frame_rate` slots a second, or of `max_frames` slots if these are fewer, and the mono waveform [1, samples].
    Times are in seconds from the waveform's beginning. Frames are transformed as they come: minutes of them do not fit
    into memory.

    Of what is longer than `max_duration` seconds, `crop` takes the middle. Otherwise it raises `ClipError`, as for all
    that `read_clip` does.
    """
    path = os.fspath(path)
    with _open(path) as container:
        reader = _Reader(path, container)
        (v_begin, v_end), (a_begin, a_end) = reader.extent[reader.video], reader.extent[reader.audio]
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
        slots = 1 if reader.still else max(1, int(duration * frame_rate))
        middles = [begin + min((slot + 0.5) / frame_rate, duration) for slot in range(slots)]
        frames = [(time - begin, image) for image, time in reader.frames(middles, transform)]
        return frames, reader.waveform(first, stop - first, sample_rate)


def _open(path: str) -> av.container.InputContainer:
    if not os.path.isfile(path):
        what = "a directory" if os.path.isdir(path) else "no such file"
        raise ClipError(path, "file", f"{what}: give the path of a video file")
    if os.path.getsize(path) == 0:
        raise ClipError(path, "file", "zero bytes: fetch or export it again")
    with _av_errors(path, "file", "not a video that can be opened"):
        # The prefix keeps a name such as "http:clip.mp4" from meaning a protocol. Tags come in all encodings.
        return av.open(f"file:{path}", metadata_errors="replace")


@contextmanager
def _av_errors(path: str, stream: str, problem: str) -> Iterator[None]:
    """Turn PyAV's errors into a `ClipError`. IndexError is what it raises where a stream appears in mid-file."""
    try:
        yield
    except (av.FFmpegError, IndexError) as error:
        why = getattr(error, "strerror", error)
        reason = f"{problem} ({why}): it may be damaged or truncated, fetch or export it again"
        raise ClipError(path, stream, reason) from error


class _Reader:
    """An open container, its two streams, and when they begin and end (seconds from the file's beginning).

    A video of a single frame is a still: it lasts as long as the sound, as players show it.
    """

    def __init__(self, path: str, container: av.container.InputContainer):
        self.path, self.container = path, container
        self.video, self.audio = self._stream("video"), self._stream("audio")
        self.origin = (container.start_time or 0) / av.time_base
        self.still = self.video.frames == 1  # 0 where the container does not tell
        with _av_errors(path, "file", "cannot be read"):
            self.extent = self._extents()
        for stream in (self.video, self.audio):
            if stream not in self.extent:
                raise ClipError(path, stream.type, "it is empty: fetch or export the clip again")
        if self.still:
            (v_begin, v_end), (a_begin, a_end) = self.extent[self.video], self.extent[self.audio]
            self.extent[self.video] = min(v_begin, a_begin), max(v_end, a_end)

    def _stream(self, kind: str) -> av.stream.Stream:
        stream = self.container.streams.best(kind)
        if stream is None or stream.disposition & Disposition.attached_pic:
            raise ClipError(self.path, kind, f"no {kind} stream in the file: the model needs picture and sound")
        if stream.codec_context is None:
            raise ClipError(self.path, kind, "no decoder for its codec: convert it to H.264 and AAC, for instance")
        stream.codec_context.thread_count = torch.get_num_threads()  # one in the workers of a DataLoader
        return stream

    def _extents(self) -> dict[av.stream.Stream, tuple[float, float]]:
        streams = (self.video, self.audio)
        if all(s.duration and s.start_time is not None for s in streams):
            spans = {s: (s.start_time * s.time_base, (s.start_time + s.duration) * s.time_base) for s in streams}
        else:  # Matroska, WebM and FLV tell no duration of a stream: look at the packets, without decoding them
            spans, pictures = {}, 0
            for packet in self.container.demux():
                if packet.pts is not None:
                    pictures += packet.stream is self.video
                    at, stop = packet.pts * packet.time_base, (packet.pts + (packet.duration or 0)) * packet.time_base
                    begin, end = spans.get(packet.stream, (at, stop))
                    spans[packet.stream] = min(begin, at), max(end, stop)
            self.still = pictures == 1
            promised = self.origin + (self.container.duration or 0) / av.time_base
            if max((end for _, end in spans.values()), default=0) < promised - 0.25:
                # The file is cut. What is gone counts as promised, so that a window there is refused and not padded.
                spans = {stream: (begin, promised) for stream, (begin, _) in spans.items()}
        return {s: (float(begin - self.origin), float(end - self.origin)) for s, (begin, end) in spans.items()}

    def _decode(
        self, stream: av.stream.Stream, time: float, skip_until: float = -math.inf
    ) -> Iterator[tuple[float, av.frame.Frame]]:
        """Frames of a stream with their times, from a keyframe at or before `time` (where the container can tell).

        Before `skip_until`, frames that no other frame is predicted from are left out.
        """
        with _av_errors(self.path, stream.type, "cannot be decoded"):
            # Not before zero, which AVI and FLV refuse; MPEG-TS needs a time before the first frame's, and zero is.
            time = max(time + self.origin, min(self.extent[stream][0] + self.origin, 0))
            self.container.seek(int(time / stream.time_base), stream=stream)
            skip_until = (skip_until + self.origin) / stream.time_base  # as packets count
            # AVI stores neither pts nor what could be taken for them: its frames come out in order, at a constant rate.
            counted = stream is self.video and self.container.format.name == "avi" and stream.average_rate
            time = begin = None
            for packet in self.container.demux(stream):
                begin = packet.dts if begin is None else begin  # of the keyframe, which comes out first
                if stream is self.video:
                    skip = packet.pts is not None and packet.pts < skip_until and not counted
                    stream.codec_context.skip_frame = "NONREF" if skip else "DEFAULT"
                for frame in packet.decode():
                    if counted and time is not None:
                        time += float(1 / stream.average_rate)
                    elif counted and begin is not None:
                        time = float(begin * stream.time_base) - self.origin
                    elif frame.pts is not None:
                        time = frame.time - self.origin
                    else:
                        raise ClipError(self.path, stream.type, "its frames have no timestamps: convert it to MP4")
                    yield time, frame

    def nearest_frame(self, target: float) -> tuple[Image.Image, float]:
        """The frame nearest to `target` seconds, upright, and its time."""
        # Some containers seek by decoding order or only roughly: start well ahead, and where that still comes out too
        # late, decode from the very beginning. On the way to the target, frames are skipped where the codec can tell
        # that nothing depends on them; if all the frames before the target were, the second attempt skips none.
        exact = self.video.codec_context.name in ("h264", "hevc")
        attempts = [(target - 1, target - 0.5)] * exact + [(target - 1, -math.inf), (-math.inf, -math.inf)]
        for seek, skip_until in attempts:
            near = []  # the last frame up to the target and the first one after it
            for time, frame in self._decode(self.video, seek, skip_until):
                near = [*near[-1:], (time, frame)]
                if time > target:
                    break
            if near and skip_until <= near[0][0] <= target:
                break
        self._check_end(near, target)
        time, frame = min(near, key=lambda found: abs(found[0] - target))
        return _upright(frame), time

    def frames(self, targets: list[float], transform: Callable[[Image.Image], T]) -> list[tuple[T, float]]:
        """The frames nearest to ascending times in seconds, upright and transformed, and their times, in one pass."""
        found = []
        for seek in [targets[0] - 2] * (targets[0] > 10) + [-math.inf]:  # roughly, as above
            decoded = self._decode(self.video, seek)
            near = list(islice(decoded, 1))
            if near and near[0][0] <= targets[0]:
                break
        for target in targets:
            while not near or near[-1][0] <= target:
                latest = next(decoded, None)
                if latest is None:
                    break
                near = [*near[-1:], latest]
            self._check_end(near, target)
            time, frame = min(near, key=lambda frame: abs(frame[0] - target))
            found.append((transform(_upright(frame)), time))
        return found

    def _check_end(self, near: list[tuple[float, av.VideoFrame]], target: float) -> None:
        begin, end = self.extent[self.video]
        shown_until = begin
        if near:
            time, frame = near[-1]
            shown_until = time + float((frame.duration or 0) * frame.time_base)
        if not near or (not self.still and shown_until < target - 0.5):
            raise ClipError(self.path, "video", TRUNCATED.format(shown_until, end))

    def waveform(self, first: int, samples: int, sample_rate: int) -> Tensor:
        """The sound at `sample_rate`, from sample `first` on counted from the file's beginning: [1, samples]."""
        rate = self.audio.rate
        begin, stop, skip = span_to_resample(first, samples, rate, sample_rate)
        buffer, filled, expected = np.zeros(stop - begin, np.float32), begin, None
        for time, frame in self._decode(self.audio, begin / rate - 0.5):  # half a second for codecs to settle in
            if frame.sample_rate != rate:
                raise ClipError(self.path, "audio", f"the sample rate changes from {rate} to {frame.sample_rate} Hz")
            at = round(time * rate)
            if expected is not None and abs(at - expected) < 0.005 * rate:
                at = expected  # rounded timestamps must not tear neighbouring frames apart
            expected = at + frame.samples
            lo, hi = max(at, begin), min(expected, stop)
            if lo < hi:
                buffer[lo - begin : hi - begin] = _mono(frame)[lo - at : hi - at]
                filled = hi
            if expected >= stop:
                # What comes next lies behind the window: up to there it is silent, if the sound has begun.
                if at >= stop and (filled > begin or first / sample_rate >= self.extent[self.audio][0]):
                    filled = stop
                break
        else:
            end = self.extent[self.audio][1]
            if filled / rate < min(end, (first + samples) / sample_rate) - 0.25:
                raise ClipError(self.path, "audio", TRUNCATED.format(filled / rate, end))
        if not np.isfinite(buffer).all():
            raise ClipError(self.path, "audio", "the samples are not finite: export the clip again")
        there = min(filled * sample_rate // rate - first, samples)
        if there < 1:
            raise ClipError(self.path, "audio", f"no sound in the window that starts at {first / sample_rate:.2f} s")
        sound = AF.resample(torch.from_numpy(buffer)[None], rate, sample_rate)[:, skip : skip + there]
        return reflect(sound.clamp(-1, 1), samples)


def _upright(frame: av.VideoFrame) -> Image.Image:
    image = frame.to_image()
    # Both count degrees counter-clockwise.
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _mono(frame: av.AudioFrame) -> np.ndarray:
    """Mean of the channels of a decoded frame, whatever its sample format: [samples] float32, full scale 1."""
    x = frame.to_ndarray()
    x = x if frame.format.is_planar else x.reshape(frame.samples, -1).T
    mono = np.add.reduce(x, 0, np.float32) / np.float32(len(x))
    if x.dtype == np.uint8:
        return (mono - 128) / 128
    return mono if x.dtype.kind == "f" else mono / -float(np.iinfo(x.dtype).min)
