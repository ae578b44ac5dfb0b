"""How a run stands, as a page, RUN/run.html: its curves, what the model makes of clips, the best and the worst."""

import base64
import html
import io
import json
import math
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from avfusion.data.loader import ClipLoader
from avfusion.training.runs import read_evaluations, read_log
from avfusion.viz.page import Card, Thing, write_page
from avfusion.viz.plots import families, pixels, plot_lines, quantity

SHOWN = 4  # clips among the best, and among the worst
EMPTY = "The evaluation scores no single clips; what the model makes of some is in the picture above."


def show_run(out: Path, picture: Path, loader: ClipLoader, samples: list[dict[str, Any]]) -> None:
    """Write the page of the run in `out`.

    Args:
        picture: what the task has drawn of some clips.
        loader, samples: of the last evaluation: `Result.samples`.
    """
    facts = json.loads((out / "run.json").read_text(encoding="utf-8"))
    cards = clip_cards(loader, best_and_worst(samples))
    lead = f"{facts['task']} on {facts['data']['clips']} clips, as of {datetime.now():%Y-%m-%d %H:%M}"
    body = f"{_curves(out)}{_table(out)}{_figure(picture, 'Some clips of the evaluation')}{_settings(facts)}"
    write_page(out / "run.html", cards, title=out.name, lead=lead, body=body, empty=EMPTY)


def best_and_worst(samples: list[dict[str, Any]], count: int = SHOWN) -> dict[str, list[dict[str, Any]]]:
    """The samples of the highest and of the lowest scores, none in both; those without (silent sources) in neither."""
    scored = sorted((sample for sample in samples if math.isfinite(sample["score"])), key=lambda s: -s["score"])
    best = min(count, -(-len(scored) // 2))
    found = {"best": scored[:best], "worst": scored[best:][::-1][:count]}
    return {name: chosen for name, chosen in found.items() if chosen}


def clip_cards(loader: ClipLoader, chosen: dict[str, list[dict[str, Any]]]) -> Iterator[Card]:
    """A card a clip, as the model sees and hears it, under the heading it is chosen for.

    A clip that cannot be read any more is left out: a page ends no training.
    """
    for group, samples in chosen.items():
        for sample in samples:
            try:
                batch = loader.some([sample["row"]])
            except ValueError:
                continue
            image, waveform, things = batch.image[0], batch.waveform[0].numpy(), ()
            if image.dim() == 4:  # several clips, whose sounds are mixed
                image = image[0]
                things = tuple(Thing(f"source {n}", waveform=x) for n, x in enumerate(waveform, 1))
            more = " · ".join(f"{name} {_text(x)}" for name, x in sample.items() if name not in ("row", "clip"))
            yield Card(str(sample["clip"]), more, _frame(image), np.zeros(1), waveform.sum(0), things, group=group)


def _frame(image: Tensor) -> np.ndarray:
    return (pixels(image)[None] * 255).round().byte().numpy()


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _curves(out: Path) -> str:
    steps, found = [line for line in read_log(out) if "loss" in line], read_evaluations(out)
    plots = []
    if steps:
        lines = {name: [line["loss"][name] for line in steps] for name in steps[0]["loss"]}
        plots.append(_plot("loss", [line["step"] for line in steps], lines, "step", "loss"))
    for title, names in families(found[-1] if found else ()).items():
        if names := [name for name in names if name not in ("step", "epoch")]:
            lines = {name: [row.get(name, math.nan) for row in found] for name in names}
            plots.append(_plot(title, [row["epoch"] for row in found], lines, "epoch", quantity(names[0])))
    return f'<section class="plots">{"".join(plots)}</section>' if plots else ""


def _plot(title: str, x: list[float], lines: dict[str, list[float]], xlabel: str, ylabel: str) -> str:
    file = io.BytesIO()
    plot_lines(file, x, lines, xlabel=xlabel, ylabel=ylabel)
    last = ", ".join(f"{name} {_text(values[-1])}" for name, values in lines.items())
    data = base64.b64encode(file.getvalue()).decode()
    said = html.escape(f"{title} by {xlabel}; the last: {last}")
    return f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{said}"></figure>'


def _table(out: Path) -> str:
    found = read_evaluations(out)
    if not found:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td class="number">{_text(found[0].get(name, math.nan))}</td>'
        f'<td class="number">{_text(value)}</td></tr>'
        for name, value in found[-1].items() if name not in ("step", "epoch")
    )  # fmt: skip
    first, last = (f"epoch {_text(found[at]['epoch'])}" for at in (0, -1))
    return (f'<h2>Scores</h2><div class="wide" tabindex="0" role="region" aria-label="Scores"><table><thead><tr>'
            f'<th scope="col">score</th><th scope="col">{first}</th><th scope="col">{last}</th></tr></thead>'
            f"<tbody>{rows}</tbody></table></div>")  # fmt: skip


def _figure(picture: Path, title: str) -> str:
    if not picture.exists():
        return ""
    data = base64.b64encode(picture.read_bytes()).decode()
    said = html.escape(f"{title}: {picture.name}")
    return (f'<h2>{title}</h2><figure class="wide" tabindex="0" role="group" aria-label="{title}">'
            f'<img src="data:image/png;base64,{data}" alt="{said}"></figure>')  # fmt: skip


def _settings(facts: dict[str, Any]) -> str:
    text = html.escape(", ".join(f"{name} {value}" for name, value in facts["settings"].items() if value != ""))
    return f"<details><summary>Settings</summary><p>{text}</p></details>"
