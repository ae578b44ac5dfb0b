"""Which moments of a clip a model sees: windows of sound, and the times of frames in them."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from avfusion.media.clip import ClipError

Span = tuple[float, float]  # begin and end, seconds from the file's beginning


@dataclass(frozen=True)
class View:
    """The start of window `number` of `count`, evenly spread over the `span` seconds in the middle of a clip."""

    number: int
    count: int
    span: float = 10.0

    def start(self, begin: float, end: float, duration: float) -> float:
        """In a clip that lasts from `begin` to `end`: the first window begins with the span, the last ends with it."""
        first = max((begin + end - self.span) / 2, begin)
        last = max(min(first + self.span, end) - duration, first)
        return first + (last - first) * self.number / max(self.count - 1, 1)


@dataclass(frozen=True)
class Plan:
    """Which windows of a file: one in its middle, or what one of the fields asks for.

    All are taken of the part that has picture and sound, whose windows lie whole inside: what is left at its end, less
    than `every`, is not seen. A part that is shorter than a window is one window, whose sound is filled by reflection.
    Raises ValueError where a field is out of range, or two are given.
    """

    every: float | None = None  # a window each so many seconds, from the beginning on
    at: tuple[float, ...] = ()  # windows that begin at these seconds; past the end, sound is reflected
    count: int | None = None  # so many, evenly spread: the first begins with the part, the last ends with it

    def __post_init__(self):
        object.__setattr__(self, "at", tuple(sorted({float(time) for time in self.at})))
        if sum((self.every is not None, bool(self.at), self.count is not None)) > 1:
            raise ValueError("windows: give one of every, at and count")
        if self.every is not None and not 0.01 <= self.every < math.inf:
            raise ValueError(f"every={self.every} s: expected at least 0.01")
        if not all(0 <= time < math.inf for time in self.at):
            raise ValueError(f"at={self.at}: expected seconds from the file's beginning")
        if self.count is not None and self.count < 1:
            raise ValueError(f"count={self.count}: expected at least 1")

    def starts(self, video: Span, audio: Span, duration: float) -> list[float]:
        """Where the windows begin, ascending, in a clip whose streams last so long, in seconds."""
        if self.at:
            return list(self.at)
        begin, end = max(video[0], audio[0], 0), min(video[1], audio[1])
        room = end - begin - duration
        if room > 0 and self.every is not None:
            return [begin + number * self.every for number in range(1 + int(room / self.every + 1e-6))]
        if room > 0 and self.count not in (None, 1):
            view = View(0, self.count, end - begin)
            return [replace(view, number=number).start(begin, end, duration) for number in range(self.count)]
        return [middle(video, audio, duration)]


def middle(video: Span, audio: Span, duration: float) -> float:
    """The start of the window in the middle of what has picture and sound, which the sound fills if it can."""
    mean = (max(video[0], audio[0]) + min(video[1], audio[1])) / 2
    return max(min(mean - duration / 2, audio[1] - duration), audio[0])


@dataclass(frozen=True)
class Window:
    """The arguments of `read_clip` that say which moments are wanted. Raises ValueError where one is out of range."""

    start: float | str | View | None = None
    duration: float = 3.0
    sample_rate: int = 16000
    frame: str = "middle"
    min_duration: float = 0.0
    generator: torch.Generator | None = None

    def __post_init__(self):
        if self.samples < 1:
            raise ValueError(f"duration={self.duration} s at sample_rate={self.sample_rate} Hz is not a single "
                             "sample: give more")  # fmt: skip
        if self.frame not in ("middle", "random"):
            raise ValueError(f'frame={self.frame!r}: expected "middle" or "random"')

    @property
    def samples(self) -> int:
        return round(self.duration * self.sample_rate)

    def place(self, path: str, video: Span, audio: Span, frames: int = 1) -> tuple[int, list[float]]:
        """The first sample of the window, and the times of frames, in a clip whose streams last so long.

        Several frames are evenly spread. Draws the start and then the frame, if they are random. Raises `ClipError`.
        """
        (v_begin, v_end), (a_begin, a_end) = video, audio
        begin, end = max(v_begin, a_begin), min(v_end, a_end)
        if end - begin < self.min_duration:
            raise ClipError(path, "file", f"too short: {end - begin:.2f} s of picture and sound, needed are "
                                          f"{self.min_duration} s")  # fmt: skip
        start = self.start
        if start == "random":
            start = max(begin, 0) + self._uniform() * max(end - begin - self.duration, 0)
        elif isinstance(start, View):
            start = start.start(begin, end, self.duration)
        elif start is None:
            start = middle(video, audio, self.duration)
        elif not 0 <= start < a_end:
            raise ClipError(path, "audio", f"start={start} s is outside the clip, which lasts {a_end:.2f} s")
        first = round(start * self.sample_rate)
        start = first / self.sample_rate
        begin, end = max(start, v_begin), min(start + self.duration, v_end, a_end)
        shares = [self._uniform()] if self.frame == "random" else [(n + 0.5) / frames for n in range(frames)]
        return first, [min(begin + share * (end - begin), v_end) for share in shares]

    def _uniform(self) -> float:
        return torch.rand((), generator=self.generator).item()


def span_to_resample(first: int, samples: int, rate: int, sample_rate: int) -> tuple[int, int, int]:
    """What to read at `rate` for `samples` from `first` on at `sample_rate`: begin, end, samples to skip at the front.

    The beginning may be negative. It is a time where both rates have a sample, so that resampling shifts nothing; 50 ms
    on either side are more than the filter's width.
    """
    step = rate // math.gcd(rate, sample_rate)
    begin = math.floor((first / sample_rate - 0.05) * rate / step) * step
    stop = math.ceil(((first + samples) / sample_rate + 0.05) * rate)
    return begin, stop, first - begin * sample_rate // rate


def reflect(x: Tensor, samples: int) -> Tensor:
    """The first `samples` of [x, reversed x, x, reversed x, ...]."""
    period = torch.cat([x, x.flip(-1)], -1)
    return period.repeat(1, math.ceil(samples / period.shape[-1]))[:, :samples]
