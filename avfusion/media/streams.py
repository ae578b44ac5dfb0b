"""The two streams of a video file, decoded with PyAV from front to back: the frames nearest to times, windows of sound.

Each frame and each sample is decoded once, and no more is held than the windows at hand need.
"""

import math
import os
from bisect import bisect, bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import av
import numpy as np
import torch
import torchaudio.functional as AF
from av.stream import Disposition
from PIL import Image
from torch import Tensor

from avfusion.media.clip import ClipError
from avfusion.media.limits import check_decoded, check_pixels, check_rates, check_times
from avfusion.media.windows import Span, reflect, span_to_resample
from avfusion.remote import is_remote, open_remote

TRUNCATED = "nothing decodes after {:.2f} s of {:.2f} s: the file is truncated or damaged, fetch or export it again"
JUMP = 30.0  # what lies more seconds ahead is sought, and not decoded up to
AHEAD = 64  # packets that are looked at before the first of them is decoded, at most; streams reorder some 16


@contextmanager
def opened(path: str) -> Iterator[av.container.InputContainer]:
    """A file, or one at an address of `avfusion.remote`. Raises `ClipError`."""
    if is_remote(path):
        try:
            with open_remote(path) as file, _opened(path, file) as container:
                yield container
        except FileNotFoundError as error:
            raise ClipError(path, "file", "no such file: give the address of a video file") from error
        except OSError as error:  # what clients of stores raise, whatever happened
            raise ClipError(path, "file", f"cannot be fetched ({type(error).__name__}: {error})") from error
        return
    if not os.path.isfile(path):
        what = "a directory" if os.path.isdir(path) else "no such file"
        raise ClipError(path, "file", f"{what}: give the path of a video file")
    if os.path.getsize(path) == 0:
        raise ClipError(path, "file", "zero bytes: fetch or export it again")
    # The prefix keeps a name such as "http:clip.mp4" from meaning a protocol.
    with _opened(path, f"file:{path}") as container:
        yield container


def _opened(path: str, file) -> av.container.InputContainer:
    with _av_errors(path, "file", "not a video that can be opened"):
        return av.open(file, metadata_errors="replace")  # tags come in all encodings


@contextmanager
def _av_errors(path: str, stream: str, problem: str) -> Iterator[None]:
    """Turn PyAV's errors into a `ClipError`. IndexError is what it raises where a stream appears in mid-file."""
    try:
        yield
    except (av.FFmpegError, IndexError) as error:
        why = getattr(error, "strerror", error)
        reason = f"{problem} ({why}): it may be damaged or truncated, fetch or export it again"
        raise ClipError(path, stream, reason) from error


class Streams:
    """An open container, its two streams, and when they begin and end (seconds from the file's beginning).

    A video of a single frame is a still: it lasts as long as the sound, as players show it. `like`: the same file,
    opened before.
    """

    def __init__(self, path: str, container: av.container.InputContainer, like: "Streams | None" = None):
        self.path, self.container = path, container
        self.streams = {kind: self._stream(kind) for kind in ("video", "audio")}
        self.origin = (container.start_time or 0) / av.time_base
        if like is not None:
            self.still, self.extent = like.still, like.extent
            return
        self.still = self.streams["video"].frames == 1  # 0 where the container does not tell
        with _av_errors(path, "file", "cannot be read"):
            self.extent = self._extents()
        for kind in self.streams:
            if kind not in self.extent:
                raise ClipError(path, kind, "it is empty: fetch or export the clip again")
            check_times(path, kind, *self.extent[kind])
        if self.still:
            (v_begin, v_end), (a_begin, a_end) = self.extent["video"], self.extent["audio"]
            self.extent["video"] = min(v_begin, a_begin), max(v_end, a_end)

    def _stream(self, kind: str) -> av.stream.Stream:
        stream = self.container.streams.best(kind)
        if stream is None or stream.disposition & Disposition.attached_pic:
            raise ClipError(self.path, kind, f"no {kind} stream in the file: the model needs picture and sound")
        if stream.codec_context is None:
            raise ClipError(self.path, kind, "no decoder for its codec: convert it to H.264 and AAC, for instance")
        if kind == "video":
            check_pixels(self.path, stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.thread_count = torch.get_num_threads()  # one in the workers of a DataLoader
        return stream

    def _extents(self) -> dict[str, Span]:
        if all(s.duration and s.start_time is not None for s in self.streams.values()):
            spans = {
                kind: (s.start_time * s.time_base, (s.start_time + s.duration) * s.time_base)
                for kind, s in self.streams.items()
            }
        else:  # Matroska, WebM and FLV tell no duration of a stream: look at the packets, without decoding them
            spans, pictures, last = {}, 0, 0
            kinds = {stream: kind for kind, stream in self.streams.items()}
            for packet in self.container.demux():
                if packet.pts is not None:
                    at, stop = packet.pts * packet.time_base, (packet.pts + (packet.duration or 0)) * packet.time_base
                    last = max(last, stop)  # of subtitles, too, whose end the container counts
                    if (kind := kinds.get(packet.stream)) is not None:
                        pictures += kind == "video"
                        begin, end = spans.get(kind, (at, stop))
                        spans[kind] = min(begin, at), max(end, stop)
            self.still = pictures == 1
            promised = self.origin + (self.container.duration or 0) / av.time_base
            if last < promised - 0.25:
                # The file is cut. What is gone counts as promised, so that a window there is refused and not padded.
                spans = {kind: (begin, promised) for kind, (begin, _) in spans.items()}
        return {kind: (float(begin - self.origin), float(end - self.origin)) for kind, (begin, end) in spans.items()}

    def _decode(self, kind: str, time: float, wanted: Sequence[float] = ()) -> Iterator[tuple[float, av.frame.Frame]]:
        """Frames of a stream with their times, from a keyframe at or before `time` (where the container can tell).

        With times that are `wanted`, ascending, frames that are nearest to none of them and that no other frame is
        predicted from are left out.
        """
        stream = self.streams[kind]
        with _av_errors(self.path, kind, "cannot be decoded"):
            # Not before zero, which AVI and FLV refuse; MPEG-TS needs a time before the first frame's, and zero is.
            time = max(time + self.origin, min(self.extent[kind][0] + self.origin, 0))
            self.container.seek(int(time / stream.time_base), stream=stream)
            # AVI stores neither pts nor what could be taken for them: its frames come out in order, at a constant rate.
            counted = kind == "video" and self.container.format.name == "avi" and stream.average_rate
            packets = self.container.demux(stream)
            skips = wanted and not counted and stream.codec_context.name in ("h264", "hevc")
            if skips:
                packets = _marked(packets, [(time + self.origin) / float(stream.time_base) for time in wanted])
            time = begin = None
            for packet in packets:
                if skips:
                    packet, nearest = packet
                    stream.codec_context.skip_frame = "DEFAULT" if nearest else "NONREF"
                begin = packet.dts if begin is None else begin  # of the keyframe, which comes out first
                for frame in packet.decode():
                    if counted and time is not None:
                        time += float(1 / stream.average_rate)
                    elif counted and begin is not None:
                        time = float(begin * stream.time_base) - self.origin
                    elif frame.pts is not None:
                        time = frame.time - self.origin
                    else:
                        raise ClipError(self.path, kind, "its frames have no timestamps: convert it to MP4")
                    yield time, frame

    def frames(self, times: Sequence[float]) -> Iterator[tuple[Image.Image, float]]:
        """The frames nearest to ascending times in seconds, upright, each with its own time."""
        near: list[tuple[float, av.VideoFrame]] = []  # the last frame up to the time and the first one after it
        decoded, jumps = iter(()), True
        for number, target in enumerate(times):
            if not number or (jumps and near and target - near[-1][0] > JUMP):
                reached = near[-1][0] if near else -math.inf
                # Some containers seek by decoding order or only roughly: start well ahead, and where that still comes
                # out too late, decode from the very beginning.
                for seek in (target - 1, -math.inf):
                    decoded = self._decode("video", seek, times[number:])
                    near = [frame] if (frame := next(decoded, None)) else []
                    if near and near[0][0] <= target:
                        break
                jumps = bool(near) and near[0][0] > reached  # else keyframes are too far apart for it
            check_decoded(self.path, "video", target - near[0][0] if near else 0.0)
            while not near or near[-1][0] <= target:
                if (latest := next(decoded, None)) is None:
                    break
                near = [*near[-1:], latest]
            self._check_end(near, target)
            time, frame = min(near, key=lambda found: abs(found[0] - target))
            check_pixels(self.path, frame.width, frame.height)  # it may change on the way
            yield _upright(frame), time

    def _check_end(self, near: list[tuple[float, av.VideoFrame]], target: float) -> None:
        begin, end = self.extent["video"]
        shown_until = begin
        if near:
            time, frame = near[-1]
            shown_until = time + float((frame.duration or 0) * frame.time_base)
        if not near or (not self.still and shown_until < target - 0.5):
            raise ClipError(self.path, "video", TRUNCATED.format(shown_until, end))

    def waveforms(self, firsts: Sequence[int], samples: int, sample_rate: int) -> Iterator[Tensor]:
        """The sound at `sample_rate`, from each of ascending samples on counted from the file's beginning.

        Each is [1, samples].
        """
        rate, (sounds_from, sounds_until) = self.streams["audio"].rate, self.extent["audio"]
        check_rates(self.path, rate, sample_rate)
        held: deque[tuple[int, np.ndarray]] = deque()  # what is decoded and still needed, with its first sample
        decoded, reached = None, None  # up to which sample it is
        for first in firsts:
            begin, stop, skip = span_to_resample(first, samples, rate, sample_rate)
            if decoded is None or (reached is not None and begin - reached > JUMP * rate):
                decoded, reached = self._decode("audio", begin / rate - 0.5), None  # half a second for codecs to settle
                held.clear()
            while held and held[0][0] + len(held[0][1]) <= begin:
                held.popleft()
            while reached is None or reached < stop:
                if (latest := next(decoded, None)) is None:
                    break
                time, frame = latest
                if frame.sample_rate != rate:
                    raise ClipError(
                        self.path, "audio", f"the sample rate changes from {rate} to {frame.sample_rate} Hz"
                    )
                check_decoded(self.path, "audio", begin / rate - time)
                at = round(time * rate)
                if reached is not None and abs(at - reached) < 0.005 * rate:
                    at = reached  # rounded timestamps must not tear neighbouring frames apart
                reached = at + frame.samples
                if reached > begin:
                    held.append((at, _mono(frame)))
            buffer, filled = np.zeros(stop - begin, np.float32), begin
            for at, sound in held:
                lo, hi = max(at, begin), min(at + len(sound), stop)
                if lo < hi:
                    buffer[lo - begin : hi - begin] = sound[lo - at : hi - at]
                    filled = hi
            if reached is None or reached < stop:
                if filled / rate < min(sounds_until, (first + samples) / sample_rate) - 0.25:
                    raise ClipError(self.path, "audio", TRUNCATED.format(filled / rate, sounds_until))
            elif held and held[-1][0] >= stop and (filled > begin or first / sample_rate >= sounds_from):
                filled = (
                    stop  # what comes next lies behind the window: up to there it is silent, if the sound has begun
                )
            if not np.isfinite(buffer).all():
                raise ClipError(self.path, "audio", "the samples are not finite: export the clip again")
            there = min(filled * sample_rate // rate - first, samples)
            if there < 1:
                raise ClipError(
                    self.path, "audio", f"no sound in the window that starts at {first / sample_rate:.2f} s"
                )
            sound = AF.resample(torch.from_numpy(buffer)[None], rate, sample_rate)[:, skip : skip + there]
            yield reflect(sound.clamp(-1, 1), samples)


def _marked(packets: Iterator[av.packet.Packet], wanted: Sequence[float]) -> Iterator[tuple[av.packet.Packet, bool]]:
    """Packets, each with whether its frame is the nearest to one of the times `wanted`, which are as packets count."""
    ahead: deque[av.packet.Packet] = deque()
    times: list[int] = []  # of packets, sorted: those ahead, and the last ones before
    for packet in packets:
        ahead.append(packet)
        if packet.pts is None or packet.dts is None:  # as of the packet at the end
            yield from ((ahead.popleft(), True) for _ in range(len(ahead)))
            continue
        insort(times, packet.pts)
        while ahead:
            own = bisect(times, ahead[0].pts)
            # Packets come in the order of dts, which is no later than pts: up to this one's, none is missing.
            if own == len(times) or times[own] > packet.dts:
                if len(ahead) > AHEAD:
                    yield ahead.popleft(), True
                    continue
                break
            before = times[own - 2] if own > 1 else -math.inf
            least, most = (before + times[own - 1]) / 2, (times[own - 1] + times[own]) / 2
            near = bisect_left(wanted, least - 1e-6)
            yield ahead.popleft(), near < len(wanted) and wanted[near] <= most + 1e-6
        del times[: max(len(times) - 2 * AHEAD, 0)]


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
