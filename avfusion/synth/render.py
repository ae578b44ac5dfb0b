"""From a scene to frames, masks and waveforms, and to the bytes of media files."""

import io
import math
import wave
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from avfusion.synth.looks import EXTENT, LOOKS, background, sprite
from avfusion.synth.scene import Actor, Scene
from avfusion.synth.timbres import RATE, TIMBRES

# Sprites hold a shadow of opacity 0.4 or less under an antialiased edge: above this the object covers half a pixel.
OBJECT = 0.65 * 255
SWELL, HOP, SWAY = 0.22, 0.1, 0.3  # how far the drive moves an object: of its radius, of the frame, in radians


def render_frames(scene: Scene, size: int, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Paint the scene at `times` (seconds): frames [T, size, size, 3] uint8 and instance masks [T, size, size] uint8.

    A mask holds 1 + the actor's place in `scene.actors` where that actor is seen, 0 elsewhere.
    """
    frames = np.repeat(background(size, np.random.default_rng(scene.seed))[None], len(times), 0)
    masks = np.zeros((len(times), size, size), np.uint8)
    for number, actor in enumerate(scene.actors, 1):
        if actor.onscreen:
            _paint(actor, number, times, frames, masks)
    return frames, masks


def _paint(actor: Actor, number: int, times: np.ndarray, frames: np.ndarray, masks: np.ndarray) -> None:
    size, drive = frames.shape[1], actor.drive(times)
    x, y, radius, angle = _motion(actor, times, drive)
    half = math.ceil(radius.max() * EXTENT * size * 1.05) + 1
    picture = sprite(LOOKS[actor.look], 2 * half, np.random.default_rng(actor.seed))
    light = 0.55 + 0.6 * drive
    left, top = np.floor(x * size).astype(int) - half, np.floor(y * size).astype(int) - half
    for t in range(len(times)):
        # From a pixel of the window back to the sprite.
        zoom = half / (radius[t] * EXTENT * size)
        c, s = zoom * math.cos(angle[t]), zoom * math.sin(angle[t])
        cx, cy = x[t] * size - left[t], y[t] * size - top[t]
        inverse = (c, s, half - c * cx - s * cy, -s, c, half + s * cx - c * cy)
        window = picture.transform(picture.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
        pixels = np.frombuffer(window.tobytes(), np.uint8).reshape(2 * half, 2 * half, 4)

        above, before = max(-top[t], 0), max(-left[t], 0)
        pixels = pixels[above : size - top[t], before : size - left[t]]
        rows = slice(top[t] + above, top[t] + above + pixels.shape[0])
        columns = slice(left[t] + before, left[t] + before + pixels.shape[1])
        behind, opacity = frames[t, rows, columns], pixels[..., 3:].astype(np.float32)
        mixed = behind * (1 - opacity / 255) + np.minimum(pixels[..., :3] * np.float32(light[t]), opacity)
        frames[t, rows, columns] = mixed
        masks[t, rows, columns][opacity[..., 0] > OBJECT] = number


def _motion(actor: Actor, times: np.ndarray, drive: np.ndarray) -> tuple[np.ndarray, ...]:
    """x, y, radius and angle at `times`. They wander slowly; the drive swells, lifts or sways it, by its look."""
    reach_x, rate_x, phase_x, reach_y, rate_y, phase_y = actor.wander
    x = actor.centre[0] + reach_x * np.sin(2 * np.pi * rate_x * times + phase_x)
    y = actor.centre[1] + reach_y * np.sin(2 * np.pi * rate_y * times + phase_y)
    radius, angle = np.full(len(times), actor.radius), actor.tilt + 0.1 * np.sin(2 * np.pi * rate_x * times)
    if actor.look % 3 == 0:
        radius = radius * (1 + SWELL * drive)
    elif actor.look % 3 == 1:
        y = y - HOP * drive
    else:
        angle = angle + SWAY * drive * np.sin(2 * np.pi * 1.7 * times)
    return x, y, radius, angle


def render_sources(scene: Scene) -> np.ndarray:
    """The waveform of each sounding actor, in order: [sources, samples] int16 at `RATE`. Their sum never clips."""
    samples = round(scene.seconds * RATE)
    coarse = np.arange(0, scene.seconds + 0.001, 0.001)
    fine = np.arange(samples) / RATE
    waves = []
    for actor in scene.actors:
        if not actor.sounding:
            continue
        rng, timbre = np.random.default_rng([actor.seed, 1]), TIMBRES[actor.timbre]
        low, high = timbre.pitch
        onsets = np.array([note.onset for note in actor.notes])
        pitches = np.array([note.pitch for note in actor.notes])
        f0 = low * (high / low) ** rng.random() * pitches[np.maximum(np.searchsorted(onsets, fine, "right") - 1, 0)]
        wave = timbre.wave(f0, rng)
        waves.append(actor.gain * wave / wave.std() * np.interp(fine, coarse, actor.envelope(coarse)))
    waves = np.stack(waves)
    waves *= min(0.12, 0.9 / np.abs(waves.sum(0)).max())
    return np.rint(waves * 32767).astype(np.int16)


def boxes(masks: np.ndarray, number: int) -> list[list[int] | None]:
    """Extents of an instance in each mask: [left, top, right, bottom] in pixels, right and bottom exclusive."""
    found = []
    for mask in masks == number:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        visible = len(rows) > 0
        found.append([int(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)] if visible else None)
    return found


def mp4(frames: np.ndarray, fps: int, waveform: np.ndarray) -> bytes:
    """Encode frames [T, H, W, 3] uint8 and a waveform [samples] int16 as H.264 and AAC, a keyframe a second."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        # One thread: the bytes must not depend on the number of cores, and clips are made in parallel anyway.
        options = {"preset": "ultrafast", "crf": "18", "threads": "1"}
        video = output.add_stream("libx264", rate=fps, options=options)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt, video.codec_context.gop_size = "yuv420p", fps
        # The coder "fast" takes a third of the default's time, which is most of a clip's.
        audio = output.add_stream("aac", rate=RATE, layout="mono", options={"aac_coder": "fast"})
        audio.bit_rate = 64000

        packets = []
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            packets += video.encode(frame)
        samples = waveform[None].astype(np.float32) / 32768
        sound = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = RATE, 0, Fraction(1, RATE)
        packets += video.encode(None) + audio.encode(sound) + audio.encode(None)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            output.mux(packet)
    return file.getvalue()


def wav(waveform: np.ndarray) -> bytes:
    """A waveform [samples] int16 as a mono WAV file at `RATE`."""
    file = io.BytesIO()
    with wave.open(file, "wb") as output:
        output.setparams((1, 2, RATE, 0, "NONE", None))
        output.writeframes(waveform.astype("<i2").tobytes())
    return file.getvalue()


def picture(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
