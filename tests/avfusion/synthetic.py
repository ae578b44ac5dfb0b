"""Reading synthetic data sets for the tests, with nothing of what wrote them."""

import json
import wave
from pathlib import Path

import av
import numpy as np

from avfusion.synth.scene import Settings

SMALL = Settings(clips=10, size=64, seconds=2.0)


def frames_of(path):
    """All frames of a video file: [T, H, W, 3] uint8."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def samples_of(path):
    """A WAV file's samples as integers; 16 kHz, mono, 16 bit."""
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(int)


def truths_of(root):
    return [json.loads(file.read_bytes()) for file in sorted(Path(root).glob("truth/*/truth.json"))]


def masks_of(root, truth):
    with np.load(Path(root) / "truth" / truth["id"] / "masks.npz", allow_pickle=False) as archive:
        return archive["masks"]


def sources_of(root, truth):
    files = sorted(Path(root, "truth", truth["id"], "sources").iterdir(), key=lambda file: int(file.stem))
    return np.stack([samples_of(file) for file in files])


def levels(sources, truth):
    """Loudness of each source around the time of each frame: [S, T]."""
    power = np.pad(sources.astype(float) ** 2, ((0, 0), (960, 960)))
    starts = [round(at * 16000) for at in truth["times"]]
    return np.sqrt([[row[start : start + 1920].mean() for start in starts] for row in power])


def brightness(frames, masks):
    """Mean brightness of the masked pixels of every frame: [T]."""
    return np.array([frame[mask].mean() for frame, mask in zip(frames, masks, strict=True)])
