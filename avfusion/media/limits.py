"""What a file may ask of this machine: more pixels, hertz, windows or decoding are refused, with the remedy."""

import math

from avfusion.media.clip import ClipError

PIXELS = 2**26  # of a frame or a picture: twice those of 8K video
SECONDS = 3600.0  # decoded for one window: from the keyframe before it, or the file's beginning, on
MOMENT = 100_000_000  # seconds, of a stream's beginning and end: three years
RATE = 768_000  # Hz, of sound
KERNEL = 2**27  # weights of a filter that resamples: rates that have no common divisor need gigabytes of them
WINDOWS = 1_000_000  # of a file


def check_pixels(path: str, width: int, height: int) -> None:
    if width * height > PIXELS:
        raise ClipError(path, "video", f"{width} x {height} pixels, more than {PIXELS:,}: scale it down")


def check_times(path: str, stream: str, begin: float, end: float) -> None:
    if not (abs(begin) <= MOMENT and abs(end) <= MOMENT):
        raise ClipError(path, stream, f"it lasts from {begin:.0f} s to {end:.0f} s: its timestamps are damaged, export "
                                      "the clip again")  # fmt: skip


def check_rates(path: str, rate: int, sample_rate: int) -> None:
    """Of a sound that is resampled."""
    divisor = math.gcd(rate, sample_rate)
    if not 0 < rate <= RATE or (rate // divisor) * (sample_rate // divisor) > KERNEL:
        raise ClipError(
            path, "audio", f"{rate} Hz cannot be resampled to {sample_rate} Hz here: convert it to 48000 Hz"
        )


def check_decoded(path: str, stream: str, seconds: float) -> None:
    """Of what lies between a window and where it can be decoded from."""
    if seconds > SECONDS:
        raise ClipError(path, stream, f"{seconds:.0f} s lie between a keyframe and a window, more than {SECONDS:.0f}: "
                                      "convert it, with keyframes each few seconds")  # fmt: skip
