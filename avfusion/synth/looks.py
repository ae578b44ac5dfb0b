"""What classes look like: shapes and textures, drawn as shaded sprites; and the backgrounds they stand before.

Coordinates of shapes and textures run from -1 to 1 over the object, x to the right and y down.
"""

import colorsys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

EXTENT = 1.3  # a sprite shows [-EXTENT, EXTENT]: the object, and room for its shadow
SHADOW = 0.4  # opacity

Array = np.ndarray
Rng = np.random.Generator


def fractal_noise(rng: Rng, height: int, width: int, power: float) -> Array:
    """Noise whose amplitude falls as 1 / frequency^power: [height, width] float32, periodic, mean 0, variance 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((height, width), np.float32)) / frequency**power
    noise = np.fft.irfft2(spectrum, (height, width))
    return (noise / noise.std()).astype(np.float32)


class Look(NamedTuple):
    """How a class looks: formulas of x, y, r, a (the angle) and, for textures, n, fractal noise of the same size."""

    name: str
    shape: Callable[[Array, Array, Array, Array], Array]  # positive inside, about the distance to the edge
    texture: Callable[[Array, Array, Array, Array, Array], Array]  # how much of the second colour, in [0, 1]
    colours: tuple[tuple[float, float, float], tuple[float, float, float]]  # hue, saturation, value


def _soft(wave: Array) -> Array:
    return np.clip(0.5 + 3 * wave, 0, 1)


def _cross(x, y, r, a):
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(0.36 - x, 0.95 - y), np.minimum(0.36 - y, 0.95 - x))


def _bricks(x, y, r, a, n):
    along = (x * 2.5 + 0.5 * (np.floor(y * 5) % 2)) % 1
    mortar = (np.minimum(along, 1 - along) < 0.06) | ((y * 5) % 1 < 0.15)
    return np.where(mortar, 1, np.clip(0.15 + 0.15 * n, 0, 1))


def _scales(x, y, r, a, n):
    along = (x * 4 + 0.5 * (np.floor(y * 4) % 2)) % 1
    return np.clip(np.hypot(along - 0.5, (y * 4) % 1) ** 3 * 1.2 + 0.08 * n, 0, 1)


LOOKS = (
    Look("striped ball", lambda x, y, r, a: 1 - r,
         lambda x, y, r, a, n: _soft(np.sin(9 * (x + 0.4 * y) + 0.1 * n)),
         ((0.0, 0.85, 0.85), (0.1, 0.1, 0.98))),
    Look("spotted cushion", lambda x, y, r, a: 0.9 - (x**4 + y**4) ** 0.25,
         lambda x, y, r, a, n: _soft(np.cos(7 * x) * np.cos(7 * y) - 0.35 + 0.05 * n),
         ((0.61, 0.75, 0.75), (0.15, 0.25, 1.0))),
    Look("marbled star", lambda x, y, r, a: (0.72 + 0.27 * np.cos(5 * a + np.pi / 2) - r) * 0.75,
         lambda x, y, r, a, n: 0.5 + 0.5 * np.sin(5 * (x - y) + 2.5 * n),
         ((0.14, 0.85, 1.0), (0.09, 0.85, 0.75))),
    Look("chequered diamond", lambda x, y, r, a: (1.05 - np.abs(x) - np.abs(y)) * 0.7,
         lambda x, y, r, a, n: _soft(np.sin(8 * x) * np.sin(8 * y)),
         ((0.78, 0.7, 0.6), (0.83, 0.15, 0.95))),
    Look("wooden gear",
         lambda x, y, r, a: np.minimum(0.86 + 0.12 * np.clip(3 * np.cos(10 * a), -1, 1) - r, r - 0.22),
         lambda x, y, r, a, n: 0.5 + 0.5 * np.sin(22 * np.hypot(x + 0.6, 0.5 * y) + 1.2 * n),
         ((0.07, 0.65, 0.6), (0.09, 0.5, 0.85))),
    Look("furry puff", lambda x, y, r, a: 0.88 + 0.05 * np.cos(9 * a) + 0.04 * np.cos(31 * a) - r,
         lambda x, y, r, a, n: 0.5 + 0.5 * np.sin(40 * a + 6 * np.sin(9 * r) + 3 * n) * np.clip(r * 1.5, 0, 1),
         ((0.92, 0.45, 0.95), (0.9, 0.65, 0.65))),
    Look("brick cross", _cross, _bricks, ((0.03, 0.7, 0.7), (0.1, 0.1, 0.8))),
    Look("veined flower", lambda x, y, r, a: (0.62 + 0.36 * np.abs(np.cos(2.5 * a)) - r) * 0.8,
         lambda x, y, r, a, n: np.clip(np.where(r < 0.25, 1, 0.35 + 0.35 * np.cos(25 * a) * r + 0.1 * n), 0, 1),
         ((0.86, 0.7, 0.95), (0.15, 0.8, 1.0))),
    Look("scaly crescent", lambda x, y, r, a: np.minimum(1 - r, np.hypot(x - 0.5, y + 0.1) - 0.62), _scales,
         ((0.47, 0.8, 0.8), (0.52, 0.9, 0.35))),
    Look("woven heart",
         lambda x, y, r, a: 1 - np.hypot(x * 1.05, (0.15 - y) * 1.15 - 0.55 * np.sqrt(np.abs(x))),
         lambda x, y, r, a, n: np.abs(
             np.where((np.floor(x * 5) + np.floor(y * 5)) % 2, np.sin(5 * np.pi * x), np.sin(5 * np.pi * y))),
         ((0.98, 0.75, 0.55), (0.97, 0.6, 0.95))),
    Look("metal ring", lambda x, y, r, a: np.minimum(1 - r, r - 0.5),
         lambda x, y, r, a, n: np.clip(0.5 + 0.4 * np.sin(2 * a + 0.6) + 0.15 * np.sin(60 * r), 0, 1),
         ((0.58, 0.1, 0.55), (0.58, 0.05, 0.98))),
    Look("spiral shell", lambda x, y, r, a: (1 - np.hypot(x, y * 1.35)) * 0.8,
         lambda x, y, r, a, n: _soft(np.sin(a + 14 * r + 0.15 * n)),
         ((0.08, 0.3, 0.98), (0.06, 0.7, 0.55))),
)  # fmt: skip


def sprite(look: Look, side: int, rng: Rng) -> Image.Image:
    """An object with its shadow, lit from the upper left: a `side` x `side` image, mode RGBa (premultiplied).

    Object pixels are opaque and shadow pixels less than half so (`render.OBJECT` lies between).
    """
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 * EXTENT - EXTENT
    x, y = np.meshgrid(axis, axis)
    field = look.shape(x, y, np.hypot(x, y), np.arctan2(y, x))
    inside = np.clip(0.5 + field / (axis[1] - axis[0]), 0, 1)

    turn, shift = rng.uniform(-0.3, 0.3), rng.uniform(-0.1, 0.1, 2)
    u, v = x * np.cos(turn) - y * np.sin(turn) + shift[0], x * np.sin(turn) + y * np.cos(turn) + shift[1]
    noise = fractal_noise(rng, side, side, 1.3)
    mix = look.texture(u, v, np.hypot(u, v), np.arctan2(v, u), noise)[..., None]
    first, second = (_colour(hsv, rng) for hsv in look.colours)
    albedo = first + mix * (second - first)

    height = np.sqrt(1 - (1 - np.clip(field / 0.6, 0, 1)) ** 2)  # a rounded edge
    slope_y, slope_x = np.gradient(height, axis[1] - axis[0])
    normal = np.stack([-slope_x, -slope_y, np.full_like(x, 1.6)], -1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    light = np.array([-0.5, -0.6, 0.62], np.float32)
    diffuse = np.clip(normal @ light, 0, 1)[..., None]
    gloss = np.clip(normal @ (light + np.array([0, 0, 1])) / 1.8, 0, 1)[..., None] ** 24
    colour = np.clip(albedo * (0.35 + 0.75 * diffuse) + 0.3 * gloss, 0, 1)

    blurred = Image.fromarray((inside * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(side / 30))
    fall = max(side // 18, 1)  # the shadow lies to the lower right
    shadow = SHADOW * np.asarray(blurred, np.float32)[..., None] / 255
    shadow = np.pad(shadow, ((fall, 0), (fall, 0), (0, 0)))[:side, :side]
    inside = inside[..., None]
    pixels = np.concatenate([colour * inside, inside + (1 - inside) * shadow], -1)
    return Image.frombytes("RGBa", (side, side), (pixels * 255).astype(np.uint8).tobytes())


def _colour(hsv: tuple[float, float, float], rng: Rng) -> Array:
    hue, saturation, value = np.array(hsv) + rng.uniform(-1, 1, 3) * (0.02, 0.08, 0.08)
    return np.array(colorsys.hsv_to_rgb(hue % 1, np.clip(saturation, 0, 1), np.clip(value, 0, 1)), np.float32)


# Sky above and at the horizon, clouds, far hills, ground: RGB.
OUTDOORS = (
    ((0.30, 0.52, 0.82), (0.78, 0.87, 0.95), (0.97, 0.97, 0.98), (0.42, 0.55, 0.55), (0.36, 0.50, 0.22)),  # meadow
    ((0.35, 0.33, 0.55), (0.96, 0.66, 0.45), (0.98, 0.76, 0.62), (0.42, 0.32, 0.42), (0.38, 0.32, 0.26)),  # dusk
    ((0.55, 0.60, 0.66), (0.80, 0.82, 0.84), (0.90, 0.90, 0.91), (0.46, 0.50, 0.53), (0.42, 0.45, 0.36)),  # overcast
    ((0.36, 0.60, 0.86), (0.90, 0.88, 0.80), (0.98, 0.96, 0.92), (0.74, 0.58, 0.42), (0.82, 0.68, 0.46)),  # desert
    ((0.45, 0.62, 0.82), (0.88, 0.92, 0.96), (1.00, 1.00, 1.00), (0.62, 0.68, 0.76), (0.88, 0.91, 0.95)),  # snow
    ((0.05, 0.07, 0.16), (0.16, 0.20, 0.34), (0.22, 0.25, 0.38), (0.09, 0.11, 0.18), (0.12, 0.17, 0.14)),  # night
)
# Wall and floor.
INDOORS = (
    ((0.80, 0.76, 0.68), (0.50, 0.35, 0.22)),
    ((0.58, 0.66, 0.64), (0.62, 0.50, 0.38)),
    ((0.70, 0.60, 0.58), (0.36, 0.30, 0.28)),
    ((0.86, 0.85, 0.82), (0.55, 0.56, 0.58)),
)


def background(size: int, rng: Rng) -> Array:
    """A landscape under clouds, or a room: [size, size, 3] uint8."""
    horizon = int(size * rng.uniform(0.4, 0.58))
    if rng.random() < 0.7:
        picture = _outdoors(size, horizon, OUTDOORS[rng.integers(len(OUTDOORS))], rng)
    else:
        picture = _indoors(size, int(horizon * 1.25), INDOORS[rng.integers(len(INDOORS))], rng)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    vignette = 1 - 0.14 * (axis[:, None] ** 2 + axis**2)
    grain = 0.012 * rng.standard_normal((size, size), np.float32)
    exposure = rng.uniform(0.88, 1.08)
    return (np.clip(picture * (vignette * exposure)[..., None] + grain[..., None], 0, 1) * 255).astype(np.uint8)


def _outdoors(size: int, horizon: int, palette: tuple, rng: Rng) -> Array:
    zenith, haze, cloud, hill, ground = (np.array(colour, np.float32) for colour in palette)
    down = np.linspace(0, 1, horizon, dtype=np.float32)[:, None, None]
    clouds = np.clip(fractal_noise(rng, size, size, 1.5)[: 2 * horizon : 2] * 0.6 + rng.uniform(-0.4, 0.3), 0, 1)
    picture = np.empty((size, size, 3), np.float32)
    picture[:horizon] = zenith + (haze - zenith) * down**1.5
    above = clouds[:horizon, :, None]
    picture[: len(above)] += (cloud - picture[: len(above)]) * above * 0.85
    picture[horizon:] = _ground(size, horizon, ground, fractal_noise(rng, size, size, 0.9))

    rows = np.arange(size)[:, None]
    for layer in (0.2, 0.6, 1.0):  # hills, the nearer the darker and the lower
        line = fractal_noise(rng, 1, size, 1.5)[0] * 0.03 * size + size * 0.05 * (1.5 - layer)
        crest = horizon - np.maximum(line, 0)
        cover = np.clip(rows - crest + 0.5, 0, 1) * (rows < horizon + 1)
        picture += (haze + (hill - haze) * (0.35 + 0.6 * layer) - picture) * cover[..., None]
    return picture


def _ground(size: int, horizon: int, colour: Array, noise: Array) -> Array:
    """A textured plane in perspective, below the horizon."""
    depth = 1 / (np.arange(size - horizon, dtype=np.float32) + size * 0.04)[:, None]
    across = ((np.arange(size) - size / 2) * depth * size * 0.3).astype(np.int64) % size
    along = np.broadcast_to((depth * size * size * 0.12).astype(np.int64) % size, across.shape)
    near = np.linspace(0.35, 1, size - horizon, dtype=np.float32)[:, None]  # far away the texture averages out
    shade = 1 + 0.12 * near * noise[along, across] + 0.05 * noise[horizon:] - 0.12 * near
    return colour * shade[..., None]


def _indoors(size: int, edge: int, palette: tuple, rng: Rng) -> Array:
    wall, floor = (np.array(colour, np.float32) for colour in palette)
    rows, columns = np.arange(size, dtype=np.float32)[:, None], np.arange(size, dtype=np.float32)
    plaster = 1 + 0.025 * fractal_noise(rng, size, size, 1.0)
    stripes = 1 + rng.choice([0, 0.05]) * np.sign(np.sin(columns / size * 2 * np.pi * 9))
    picture = wall * (plaster * stripes)[..., None]

    depth = np.maximum(rows - edge, 0) + size * 0.25
    plank = (columns - size / 2) / depth * 6
    shade = 1 + 0.12 * np.sin(2.4 * np.floor(plank) ** 2) - 0.35 * (np.abs(plank % 1 - 0.5) > 0.475)
    grain = 1 + 0.06 * np.repeat(fractal_noise(rng, size, size, 0.8)[:, ::4], 4, 1)[:, :size]
    picture[edge:] = (floor * (shade * grain)[..., None])[edge:]
    picture[max(edge - size // 28, 0) : edge] = np.clip(wall * 1.12, 0, 1)  # the skirting board
    lamp = np.hypot(columns / size - rng.uniform(0.2, 0.8), rows / size - 0.1)
    return picture * (0.62 + 0.5 * np.exp(-((lamp / 0.6) ** 2)))[..., None]
