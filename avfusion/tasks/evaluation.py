"""Evaluating a downstream run, and writing what it finds where people look: JSON, CSV, pictures, sounds."""

import json
import math
from dataclasses import replace
from pathlib import Path

import soundfile
import torch

from avfusion.clips import Clip
from avfusion.plots import plot_overlay
from avfusion.runs import write_csv
from avfusion.tasks.downstream import Prediction, load_run

SHOWN = 4  # clips among the best, and among the worst


def evaluate_run(run: Path, expected: str, out: Path, **changes) -> dict[str, float]:
    """Evaluate a run's last checkpoint, on the data of its settings but for `changes` of these.

    Writes to `out`: summary.json, samples.csv (a row a clip) and best.png and worst.png by score. Returns the summary.
    """
    task, model = load_run(run, expected)
    task.config, task.thorough = replace(task.config, **changes), True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).encoder.compiled = task.config.compile
    source = task.open_evaluation()
    batch = min(task.config.batch_size, max(len(source.rows), 1))
    loader = task.loader(source, batch, train=False, rank=0, world_size=1)
    with torch.no_grad():
        result = task.evaluate(model, loader, torch.float32)
    out.mkdir(parents=True, exist_ok=True)
    facts = {"run": run.name, "task": task.name, "clips": len(result.samples), "sha256": source.sha256}
    text = json.dumps(facts | {"summary": result.summary}, indent=1)
    (out / "summary.json").write_text(text + "\n", encoding="utf-8")
    if result.samples:
        write_csv(out / "samples.csv", result.samples)
        scored = [sample for sample in result.samples if math.isfinite(sample["score"])]  # a silent source has no SDR
        ranked = [sample["row"] for sample in sorted(scored, key=lambda sample: -sample["score"])]
        for name, rows in (("best", ranked[:SHOWN]), ("worst", ranked[::-1][:SHOWN])):
            if rows:
                task.draw(model, loader, rows, out / f"{name}.png")
    return result.summary


def write_prediction(prediction: Prediction, clip: Clip, folder: Path) -> list[Path]:
    """Write <clip's name>.json, a picture a map and a sound file a sound; returns the files.

    A clip of the same name in another folder gets a number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem, number = Path(clip.path).stem, 1
    while (file := folder / f"{stem}.json").exists() and json.loads(file.read_text())["clip"] != str(clip.path):
        number += 1
        stem = f"{Path(clip.path).stem}-{number}"
    files = [folder / f"{stem}.json"]
    facts = {"clip": str(clip.path), "start": clip.start, "frame_time": clip.frame_time} | prediction.facts
    files[0].write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for name, values in prediction.maps.items():
        files.append(folder / f"{stem}-{name.replace(' ', '-')}.png")
        plot_overlay(files[-1], clip.frame, values)
    for name, samples in prediction.sounds.items():
        files.append(folder / f"{stem}-{name.replace(' ', '-')}.wav")
        soundfile.write(files[-1], samples.clamp(-1, 1).cpu().numpy(), 16000)
    return files
