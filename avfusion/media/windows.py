"""Which moments of a clip a model sees: a window of sound, and the time of one frame in it."""

import math
from dataclasses import dataclass

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

    def place(self, path: str, video: Span, audio: Span) -> tuple[int, float]:
        """The first sample of the window, and the time of the frame, in a clip whose streams last so long.

        Draws the start and then the frame, if they are random. Raises `ClipError`.
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
            start = max(min((begin + end) / 2 - self.duration / 2, a_end - self.duration), a_begin)
        elif not 0 <= start < a_end:
            raise ClipError(path, "audio", f"start={start} s is outside the clip, which lasts {a_end:.2f} s")
        first = round(start * self.sample_rate)
        start = first / self.sample_rate
        begin, end = max(start, v_begin), min(start + self.duration, v_end, a_end)
        share = 0.5 if self.frame == "middle" else self._uniform()
        return first, min(begin + share * (end - begin), v_end)

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
