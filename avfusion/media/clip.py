"""A clip as the model sees it, and the error of one that cannot be read."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


class ClipError(ValueError):
    """A clip that cannot be read: `path`, the `stream` at fault ("file", "video" or "audio") and the `reason`."""

    def __init__(self, path: str, stream: str, reason: str):
        super().__init__(path, stream, reason)  # all three in args: the error crosses process boundaries by pickling
        self.path, self.stream, self.reason = path, stream, reason

    def __str__(self) -> str:
        where = "" if self.stream == "file" else f"{self.stream} stream: "
        return f"{self.path}: {where}{self.reason}"


@dataclass(frozen=True)
class Clip:
    """One frame and the sound around it. Times are in seconds from the file's beginning, as a player shows them."""

    frame: "Image.Image"  # RGB, upright
    waveform: "Tensor"  # [1, samples] float32, mono, in [-1, 1]
    start: float  # of the waveform
    frame_time: float
    path: str
