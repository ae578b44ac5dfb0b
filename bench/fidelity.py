"""How far apart this and the release are where they differ: `python -m bench.fidelity` writes results/fidelity.json.

On synthetic clips (made in a temporary folder, minutes) and random maps: the oracle of separation by both targets, cIoU
of maps that are enlarged corners to corners and centres to centres, and the window of sound of a clip's last frame.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from avfusion.data import read
from avfusion.data.samples import Mixed, Windows
from avfusion.files import write_json
from avfusion.media.stills import read_stills
from avfusion.media.transforms import LogMel
from avfusion.metrics.localization import SIZE, consensus_iou, consensus_map
from avfusion.metrics.separation import apply_mask, bss_eval, ratio_masks, released_masks
from avfusion.synth.make import synthesize
from avfusion.synth.scene import Settings
from avfusion.tasks.segmentation import Frames
from bench import measure

PATH = Path(__file__).parent / "results" / "fidelity.json"
MIXTURES, MAPS = 64, 2000


def oracles(folder: Path) -> dict[str, float]:
    """Mean SDR, in dB, of the true masks applied to mixtures of two, by ours and by the release's."""
    synthesize(folder, Settings(layout="vggsound-music", clips=5 * MIXTURES, classes=6, size=64, fps=4))
    mixed, mel = Mixed(Windows(read("vggsound-music", folder, "pairs"), duration=3.0, sample_rate=16000)), LogMel()
    scores = {"ours": [], "released": []}
    for index in range(min(MIXTURES, len(mixed.source.rows))):
        sample = mixed[index]
        sources = torch.cat([sample.clip.waveform, sample.others[0].waveform])
        mixture = sources.sum(0, keepdim=True).expand(2, -1)
        spectra, whole = mel(sources), mel(mixture)
        found = {
            "ours": apply_mask(mixture, ratio_masks(spectra[None])[0], mel),
            "released": apply_mask(mixture, released_masks(spectra, whole), mel, released=True),
        }
        for name, estimates in found.items():
            scores[name].append(bss_eval(sources[None], estimates[None])[0].mean())
    return {name: torch.stack(values).nanmean().item() for name, values in scores.items()} | {
        "mixtures": len(scores["ours"])
    }


def corners() -> dict[str, float]:
    """Largest and mean difference in cIoU, over random 14 x 14 maps and boxes."""
    generator, apart = torch.Generator().manual_seed(0), []
    for _ in range(MAPS):
        low = torch.randn(1, 1, 14, 14, generator=generator)
        corner = torch.rand(2, 2, generator=generator).sort(0).values
        truth = consensus_map([corner.flatten().tolist()], consensus=1)[None]
        centres = F.interpolate(low, (SIZE, SIZE), mode="bilinear")[:, 0]
        apart.append((consensus_iou(low[:, 0], truth) - consensus_iou(centres, truth)).abs())
    apart = torch.cat(apart)
    return {"largest": apart.max().item(), "mean": apart.mean().item(), "maps": MAPS}


def last_frames(folder: Path) -> dict[str, float]:
    """Largest and mean difference, log10 of power, of the last frame's spectrogram when its window leaves the clip."""
    synthesize(folder, Settings(layout="avsbench", clips=60, classes=6, size=64, fps=4))
    frames, mel, apart = Frames(read("avsbench", folder), "v1m"), LogMel(), []
    for index, row in enumerate(frames.rows):
        if row.extra["second"] == 4:
            inside = mel(frames.read(index, duration=3.0).waveform)
            past = mel(read_stills(row.path, row.audio, start=3.0, duration=3.0).waveform)
            apart.append((inside - past).abs())
    return {"largest": torch.stack(apart).max().item(), "mean": torch.stack(apart).mean().item(), "frames": len(apart)}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "oracle of separation, SDR in dB": oracles(Path(folder, "music")),
            "cIoU, corners against centres": corners(),
            "last frame of segmentation, log10 of power": last_frames(Path(folder, "avsbench")),
        }
    device = torch.device("cpu")
    results |= {"command": "python -m bench.fidelity", "device": measure.device_name(device)}
    write_json(PATH, results | measure.environment(device), indent=1)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
