"""Small clips made with PyAV, for the tests: every frame shows its own number, every sound is known."""

from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition

WIDTH, HEIGHT, FPS = 64, 48, 25
CLICK = 2.0  # seconds: where the default sound has its click


def click(rate: int, seconds: float) -> np.ndarray:
    """Silence with 5 ms of a loud 2 kHz tone at `CLICK`: [samples] float32."""
    t = np.arange(round(seconds * rate)) / rate
    return (np.where((t >= CLICK) & (t < CLICK + 0.005), 0.8 * np.cos(2 * np.pi * 2000 * (t - CLICK)), 0)).astype("f4")


def noise(rate: int, seconds: float) -> np.ndarray:
    """Low-passed noise, so that any resampler keeps it: [samples] float32 in [-0.5, 0.5]."""
    white = np.random.default_rng(0).standard_normal(round(seconds * rate) + 63)
    smooth = np.convolve(white, np.hanning(64), "valid")
    return (0.5 * smooth / np.abs(smooth).max()).astype("f4")


def picture(number: int) -> np.ndarray:
    """`number` in binary: eight black or white columns, the highest bit on the left."""
    bits = [(number >> bit) & 1 for bit in range(7, -1, -1)]
    gray = np.tile(np.repeat(bits, WIDTH // 8) * 255, (HEIGHT, 1)).astype("u1")
    return np.repeat(gray[..., None], 3, -1)


def number(image) -> int:
    """Which `picture` a decoded frame is."""
    row = np.asarray(image.convert("L"))[HEIGHT // 2, WIDTH // 16 :: WIDTH // 8]
    return int("".join(str(int(level > 127)) for level in row), 2)


def write_clip(
    path,
    *,
    video="libx264",
    audio="aac",
    seconds=4.0,
    audio_seconds=None,
    fps=FPS,
    rate=48000,
    layout="stereo",
    sample_format=None,
    sound=click,
    video_start=0.0,
    audio_start=0.0,
    keyframes=None,
    b_frames=None,
    rotation=0,
    container=None,
    picture=picture,
    cover=False,
    tags=None,
):
    """Encode a clip and return its path as a string.

    `video` or `audio` None leaves that stream out. `sound(rate, seconds)` gives [samples] or [channels, samples].
    `keyframes` is the distance between keyframes in frames; `container` are options of the muxer; `cover` marks the
    video as a cover picture.
    """
    with av.open(str(path), "w", options=container or {}) as output:
        packets = []
        output.metadata.update(tags or {})
        if video:
            stream = output.add_stream(video, rate=fps)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "rgb24" if video == "png" else "yuv420p"
            if cover:
                stream.disposition = Disposition.attached_pic
            if keyframes:
                stream.codec_context.gop_size = keyframes
            if b_frames is not None:
                stream.codec_context.max_b_frames = b_frames
            if rotation:
                stream.set_display_rotation(rotation)
            for i in range(round(seconds * fps)):
                frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
                frame.pts, frame.time_base = round(video_start * fps) + i, Fraction(1, fps)
                packets += stream.encode(frame)
            packets += stream.encode(None)
        if audio:
            stream = output.add_stream(audio, rate=rate, layout=layout)
            if sample_format:
                stream.codec_context.format = sample_format
            samples = sound(rate, seconds if audio_seconds is None else audio_seconds)
            channels = stream.codec_context.layout.nb_channels
            planes = np.ascontiguousarray(np.broadcast_to(samples, (channels, samples.shape[-1])), "f4")
            if planes.size:
                frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=layout)
                frame.sample_rate, frame.pts = rate, round(audio_start * rate)
                frame.time_base = Fraction(1, rate)
                packets += stream.encode(frame)
                packets += stream.encode(None)
        for packet in sorted((p for p in packets if p.dts is not None), key=lambda p: p.dts * p.time_base):
            output.mux(packet)
    return str(path)


def cut(path, share=0.5):
    """Keep the first `share` of a file's bytes; returns the path."""
    with open(path, "r+b") as file:
        file.truncate(int(file.seek(0, 2) * share))
    return path


def with_a_gap(path, rate=16000):
    """Sound from 0 to 1 s and from 5 to 6 s, all of 0.5."""
    with av.open(str(path), "w") as output:
        video, audio = output.add_stream("libx264", rate=FPS), output.add_stream("pcm_s16le", rate=rate, layout="mono")
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        packets = []
        for i in range(6 * FPS):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            packets += video.encode(frame)
        for second in (0, 5):
            for part in range(10):
                frame = av.AudioFrame.from_ndarray(np.full((1, rate // 10), 2**14, "i2"), format="s16", layout="mono")
                frame.sample_rate, frame.time_base, frame.pts = (
                    rate,
                    Fraction(1, rate),
                    second * rate + part * rate // 10,
                )
                packets += audio.encode(frame)
        packets += [*video.encode(None), *audio.encode(None)]
        for packet in sorted((p for p in packets if p.dts is not None), key=lambda p: p.dts * p.time_base):
            output.mux(packet)
    return str(path)
