"""Tables and plots of the study's rows: means over seeds, 95 % intervals, differences paired by seed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from bench.report import COLOURS, GRID, INK
from bench.study.cell import Cell
from bench.study.grid import CHANCE, DENSE, FACTORIZED, MEASURES, NONE, PRODUCT, QUESTIONS, TOKEN, UNIMODAL, Question

Scores = dict[Cell, dict[str, float]]
FEATURES = ("image", "audio", "image+audio", "all", "fusion", "fusion, scaled", "fusion, maximum", "fusion, all tokens")
LABELS = {"class": "class", "look": "look (picture)", "timbre": "timbre (sound)", "pair": "pair (both)",
          "conjunction": "conjunction (both)"}  # fmt: skip
PLOTTED = ("probe class image", "finetune class mean", "finetune conjunction mean", "kernel conjunction fusion",
           "pointing contrast")  # fmt: skip
NEGATIVE = ("silence", "noise", "off-screen")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of the 95 % interval of Student's t; NaN of one value."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return float(x.mean()), np.nan
    return float(x.mean()), float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))


def of_seeds(scores: Scores, cell: Cell, measure: str) -> dict[int, float]:
    found = {seed: scores[c] for seed in range(100) if (c := replace(cell, seed=seed)) in scores}
    return {seed: row[measure] for seed, row in found.items() if measure in row}


def shown(values: Iterable[float], *, sign: bool = False) -> str:
    values = list(values)
    if not values:
        return "–"
    mean, half = interval(values)
    text = f"{100 * mean:+.1f}" if sign else f"{100 * mean:.1f}"
    return text if np.isnan(half) else f"{text} ± {100 * half:.1f}"


def difference(scores: Scores, cell: Cell, base: Cell, measure: str) -> list[float]:
    """By seeds that both have."""
    ours, theirs = of_seeds(scores, cell, measure), of_seeds(scores, base, measure)
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def clear(values: Sequence[float]) -> bool:
    """Whether the interval of a difference leaves out 0."""
    mean, half = interval(values) if values else (0.0, np.nan)
    return bool(abs(mean) > half)


def marked(found: Sequence[float]) -> str:
    """A difference; bold where it is clear."""
    return f"**{shown(found, sign=True)}**" if clear(found) else shown(found, sign=True)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def answer(scores: Scores, question: Question) -> str:
    """A question's table: a column a cell, a row a measure; below a mean its difference from the first cell's."""
    first = next(iter(question.cells.values()))
    some = next(iter(question.measures))
    rows = [["seeds", *(str(len(of_seeds(scores, cell, some))) for cell in question.cells.values())]]
    for measure, title in question.measures.items():
        row = [title]
        for cell in question.cells.values():
            text = shown(of_seeds(scores, cell, measure).values())
            if cell != first and (found := difference(scores, cell, first, measure)):
                text += f"<br>{marked(found)}"
            row.append(text)
        rows.append(row)
    return table(["", *question.cells], rows)


def baselines(scores: Scores) -> str:
    """Chance, and what readers reach that see one modality, in encoders without fusion."""
    rows = []
    for at, (measure, title) in enumerate(MEASURES.items()):
        alone = [measures[at] for measures in UNIMODAL.values()]
        rows.append([title, CHANCE[measure], *(shown(of_seeds(scores, NONE, m).values()) if m else "" for m in alone)])
    return table(["", "chance", *UNIMODAL], rows)


def neighbours(scores: Scores, cell: Cell) -> str:
    """By each of `FEATURES`; and how far neighbours by fusion tokens are ahead, paired by seed."""
    rows = []
    for name in FEATURES:
        found = [shown(of_seeds(scores, cell, f"neighbour {label} {name}").values()) for label in LABELS]
        rows.append([name, *found])
    for other in ("image", "audio", "image+audio"):
        row = [f"fusion − {other}"]
        for label in LABELS:
            ours, theirs = (of_seeds(scores, cell, f"neighbour {label} {name}") for name in ("fusion", other))
            row.append(marked([ours[seed] - theirs[seed] for seed in ours]))
        rows.append(row)
    seeds = len(of_seeds(scores, cell, "probe class all"))
    return table([f"neighbours by ({seeds} seeds)", *LABELS.values()], rows)


def losses(scores: Scores) -> str:
    """Validation losses of masked pre-training, and their differences from those without fusion, in thousandths."""
    rows = []
    cells = {"no fusion": NONE, "late": Cell(layers="3"), "mid": Cell(layers="2-3"), "token": TOKEN,
             "factorized": FACTORIZED, "dense": DENSE, "dense, products": PRODUCT}  # fmt: skip
    for name, cell in cells.items():
        row = [name]
        for measure in ("loss image", "loss audio"):
            found = [10 * x for x in difference(scores, cell, NONE, measure)]  # `shown` is in hundredths
            values = of_seeds(scores, cell, measure).values()
            row.append(f"{np.mean(list(values)):.3f}" if values else "–")
            row.append("" if cell == NONE else marked(found))
        rows.append(row)
    return table(["", "image", "difference / 1000", "audio", "difference / 1000"], rows)


def negative(scores: Scores) -> str:
    rows = []
    for name, cell in {"none": NONE, "token": TOKEN, "factorized": FACTORIZED, "dense": DENSE}.items():
        for kind in NEGATIVE:
            found = [shown(of_seeds(scores, cell, f"{score} {kind}").values())
                     for score in ("AUC negative", "hits", "false alarms", "false area")]  # fmt: skip
            rows.append([name, kind, *found])
    return table(["fusion", "sound", "AUC", "hits", "false alarms", "false area"], rows)


def contrasts(scores: Scores) -> str:
    """Differences that docs/science.md names and no other table has; losses in thousandths."""
    late, mid = Cell(layers="3"), Cell(layers="2-3")
    rows = []
    for what, ours, theirs, measure in (
        ("mid − late", mid, late, "finetune conjunction mean"),
        ("early − mid", DENSE, mid, "finetune conjunction mean"),
        ("products − dense", PRODUCT, DENSE, "finetune conjunction mean"),
        ("factorized − dense", FACTORIZED, DENSE, "probe class image"),
        ("factorized − token", FACTORIZED, TOKEN, "loss audio"), ("dense − token", DENSE, TOKEN, "loss audio"),
        ("3 − 10 epochs", Cell(epochs=3), DENSE, "neighbour class fusion"),
        ("40 − 10 epochs", Cell(epochs=40), DENSE, "neighbour class fusion"),
        ("40 − 10 epochs", Cell(epochs=40), DENSE, "neighbour look fusion"),
    ):  # fmt: skip
        found = difference(scores, ours, theirs, measure)
        scale = 10 if measure.startswith("loss") else 1  # `shown` is in hundredths
        rows.append([MEASURES.get(measure, measure), what, str(len(found)), marked([scale * x for x in found])])
    return table(["measure", "", "seeds", "difference"], rows)


def draw(scores: Scores, path: Path) -> None:
    """A row of panels a question, a column a measure; a dot a cell, its interval, seeds as strokes, chance dotted."""
    questions = [question for question in QUESTIONS.values() if question.measures is MEASURES]
    figure = Figure(figsize=(2.6 * len(PLOTTED) + 2.2, 1.3 * len(questions) + 0.6))
    figure.subplots_adjust(left=0.17, right=0.99, top=0.94, bottom=0.03, hspace=0.5, wspace=0.06)
    grid = figure.subplots(len(questions), len(PLOTTED), squeeze=False, sharex="col")
    for row, (axes, question) in enumerate(zip(grid, questions, strict=True)):
        names = list(question.cells)
        axes[0].set_title(question.title, fontsize=9, color=INK, loc="left", fontweight="bold")
        for ax, measure in zip(axes, PLOTTED, strict=True):
            for at, cell in enumerate(question.cells.values()):
                values = list(of_seeds(scores, cell, measure).values())
                if values:
                    mean, half = interval(values)
                    ax.errorbar(100 * mean, at, xerr=0 if np.isnan(half) else 100 * half, fmt="o", markersize=4,
                                color=COLOURS["ours"])  # fmt: skip
                    ax.plot([100 * v for v in values], [at] * len(values), "|", color=INK, alpha=0.35, markersize=5)
            ax.axvline(float(CHANCE[measure].rstrip(" %")), color=INK, linestyle=":", linewidth=0.8)
            ax.set_yticks(range(len(names)), names if ax is axes[0] else [""] * len(names), fontsize=8)
            ax.set_ylim(len(names) - 0.5, -0.5)
            ax.tick_params(axis="x", labelsize=8)
            ax.grid(color=GRID, axis="x")
            if not row:
                place = ax.get_position()
                figure.text(
                    place.x0, 0.975, MEASURES[measure].replace(", ", ",\n") + ", %", fontsize=9, color=INK, va="center"
                )
    figure.savefig(path, dpi=100, facecolor="white", metadata={"Software": None})


def tables(rows: Sequence[dict]) -> dict[str, tuple[str, str]]:
    """Of the rows of study.jsonl: title and table, by name."""
    scores = {Cell(**row["cell"]): row["scores"] for row in rows}
    found = {"baselines": ("Chance, and one modality alone (encoders without fusion)", baselines(scores))}
    found["losses"] = "Losses of masked pre-training, on moments that it has not seen", losses(scores)
    found |= {name: (question.title, answer(scores, question)) for name, question in QUESTIONS.items()}
    for name, cell in {"dense": DENSE, "dense, 40 epochs": Cell(epochs=40), "factorized": FACTORIZED, "token": TOKEN,
                       "no fusion": NONE}.items():  # fmt: skip
        found[f"neighbours {name}"] = f"Neighbours (Fig. 3): {name}", neighbours(scores, cell)
    found["negative"] = "Sounds of nothing that is seen", negative(scores)
    return found | {"contrasts": ("Other differences", contrasts(scores))}


def filled(page: str, found: dict[str, tuple[str, str]]) -> str:
    """A page with its tables made anew, which stand between <!-- study: NAME --> and <!-- end -->."""
    return re.sub(r"(<!-- study: (.+?) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{found[m[2]][1]}\n{m[3]}", page,
                  flags=re.DOTALL)  # fmt: skip


def report(rows: Sequence[dict], path: Path) -> list[Path]:
    """Write path.md and path.png of the rows of study.jsonl; returns both. Raises ValueError where there is none."""
    if not rows:
        raise ValueError("no rows: run `python -m bench.study` first")
    machines = sorted({f"{row['machine']['device']}, torch {row['machine']['versions']['torch']}" for row in rows})
    seconds = np.median([row["seconds"]["all"] for row in rows])
    parts = [
        "# The study",
        f"`python -m bench.study` ({len(rows)} cells, median {seconds:.0f} s a cell; {'; '.join(machines)}), and "
        "`python -m bench.study --report`. Shares in %, means over seeds ± half of a 95 % interval (Student's t). Each "
        "seed has a world, weights, batches and masks of its own. Below a mean: its difference from the first column, "
        "paired by seed, **bold** where the interval leaves out 0, as 1 in 20 would by chance.",
    ]
    parts += [f"## {title}\n\n{table}" for title, table in tables(rows).values()]
    files = [path.with_suffix(".md"), path.with_suffix(".png")]
    files[0].write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    draw({Cell(**row["cell"]): row["scores"] for row in rows}, files[1])
    return files
