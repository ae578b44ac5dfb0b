"""What classes sound like: one function a timbre, from a pitch over time to a waveform of even loudness."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RATE = 16000  # Hz

Rng = np.random.Generator


def _cycles(f0: np.ndarray) -> np.ndarray:
    return np.cumsum(f0) / RATE


def _harmonics(f0: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A harmonic stack, read from a table of one period. Harmonics above the Nyquist frequency are left out."""
    weights = weights[: int(RATE / 2 / f0.max())]
    spectrum = np.zeros(1025, complex)
    spectrum[1 : len(weights) + 1] = -1j * weights
    table = np.fft.irfft(spectrum)
    return table[(_cycles(f0) * len(table)).astype(np.int64) % len(table)]


def _partials(f0: np.ndarray, ratios: list[float], weights: list[float]) -> np.ndarray:
    """A sum of inharmonic partials, as bells and membranes have."""
    turns = 2 * np.pi * _cycles(f0)
    return sum(weight * np.sin(ratio * turns) for ratio, weight in zip(ratios, weights, strict=True))


def _noise(rng: Rng, samples: int, low: float, high: float) -> np.ndarray:
    """Noise between two frequencies in Hz, with soft edges; unit variance."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    hz = np.fft.rfftfreq(samples, 1 / RATE)
    band = np.fft.irfft(spectrum / ((1 + (low / np.maximum(hz, 1)) ** 6) * (1 + (hz / high) ** 6)), samples)
    return band / band.std()


def _vibrato(f0: np.ndarray, rate: float, depth: float) -> np.ndarray:
    return f0 * (1 + depth * np.sin(2 * np.pi * rate / RATE * np.arange(len(f0))))


def _stack(power: float, step: int = 1) -> np.ndarray:
    """Weights 1 / h^power of every `step`-th harmonic."""
    weights = np.zeros(60)
    weights[::step] = 1 / np.arange(1, 61)[::step] ** power
    return weights


def humming(f0, rng):
    return _harmonics(_vibrato(f0, rng.uniform(3, 5), 0.005), _stack(2.0))


def ringing(f0, rng):
    return _partials(f0, [0.5, 1, 1.19, 1.56, 2, 2.74, 3.76], [0.5, 1, 0.7, 0.4, 0.6, 0.4, 0.3])


def bowing(f0, rng):
    scratch = 0.06 * _noise(rng, len(f0), 2000, 6000)
    tone = _harmonics(_vibrato(f0, rng.uniform(5, 6.5), 0.012), _stack(0.8))
    return tone / tone.std() + scratch


def rattling(f0, rng):
    beat = _cycles(np.full(len(f0), rng.uniform(14, 22))) % 1
    return _noise(rng, len(f0), 1500, 6500) * np.exp(-6 * beat)


def wailing(f0, rng):
    sweep = np.sin(2 * np.pi * (rng.uniform(0.6, 1.1) / RATE * np.arange(len(f0)) + rng.random()))
    return _harmonics(f0 * 2 ** (0.7 * sweep), np.array([1, 0, 0.4, 0, 0.15]))


def singing(f0, rng):
    """Harmonics under the three formants of a vowel."""
    formants = [(730, 1090, 2440), (270, 2290, 3010), (570, 840, 2410)][rng.integers(3)]
    hz = np.arange(1, 41) * np.median(f0)
    weights = sum(gain * np.exp(-(((hz - f) / 130) ** 2)) for f, gain in zip(formants, (1, 0.6, 0.3), strict=True))
    return _harmonics(_vibrato(f0, rng.uniform(4.5, 6), 0.02), weights + 0.1 * _stack(1.5)[:40])


def plucking(f0, rng):
    return _harmonics(f0, _stack(1.0) * np.abs(np.sin(np.arange(1, 61) * np.pi * rng.uniform(0.18, 0.28))))


def whistling(f0, rng):
    tone = _harmonics(_vibrato(f0, rng.uniform(4, 7), 0.01), np.array([1, 0.05]))
    return tone / tone.std() + 0.25 * _noise(rng, len(f0), 1500, 5000)


def buzzing(f0, rng):
    flutter = 1 + 0.6 * np.sin(2 * np.pi * rng.uniform(22, 32) / RATE * np.arange(len(f0)))
    return _harmonics(f0, _stack(0.6, step=2)) * flutter


def hissing(f0, rng):
    return _noise(rng, len(f0), 3500, 7000)


def chirping(f0, rng):
    """Short upward glides, some ten a second."""
    phase = _cycles(np.full(len(f0), rng.uniform(7, 11))) % 1
    return _harmonics(f0 * (1 + 0.6 * phase), np.array([1.0])) * np.sin(np.pi * phase) ** 2


def drumming(f0, rng):
    skin = _partials(f0, [1, 1.59, 2.14, 2.65], [1, 0.5, 0.35, 0.2])
    return skin / skin.std() + 0.25 * _noise(rng, len(f0), 100, 900)


class Timbre(NamedTuple):
    name: str
    wave: Callable[[np.ndarray, Rng], np.ndarray]  # (f0 [samples] in Hz, generator) -> [samples]
    pitch: tuple[float, float]  # range of the lowest note, Hz
    struck: bool = False  # its notes ring out, instead of lasting


TIMBRES = (
    Timbre("humming", humming, (110, 180)),
    Timbre("ringing", ringing, (600, 1000), struck=True),
    Timbre("bowing, fiddling", bowing, (220, 400)),
    Timbre("rattling", rattling, (100, 100)),
    Timbre("wailing", wailing, (500, 800)),
    Timbre("singing", singing, (150, 260)),
    Timbre("plucking", plucking, (180, 330), struck=True),
    Timbre("whistling", whistling, (1100, 1700)),
    Timbre("buzzing", buzzing, (80, 120)),
    Timbre("hissing", hissing, (100, 100)),
    Timbre("chirping", chirping, (2000, 2800)),
    Timbre("drumming", drumming, (60, 100), struck=True),
)
