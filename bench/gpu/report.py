"""From rows to tables and a picture, on any machine: `python -m bench.report FILE.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path

from bench.report import BASELINES, COLOURS, FLOOR, GRID, INK, aligned

# Of each section: the columns of its table, and how each is written. A row without one leaves the cell empty.
WHAT = ("fusion", "backend", "batch", "masked", "dtype", "way")
TIMES = ("ms", "ms_p20", "ms_p80")
COLUMNS = {
    "ceiling": ("what", "dtype", "GB_per_s", "TFLOP_per_s"),
    "encoder": (*WHAT, "variant", *TIMES, "ratio", "flop_ratio", "peak_MiB", "error_norm", "note"),
    "accelerate": (*WHAT, *TIMES, "peak_MiB", "error_norm"),
    "launches": ("fusion", "batch", "dtype", "launches"),
    "pretrain": (*WHAT, *TIMES, "ratio", "clips_per_s", "matmul_share", "peak_MiB", "note"),
    "pair_attention": ("interaction", "shape", "backend", "forward_us", "both_us", "host_us", "error_norm"),
    "latent_attention": ("shape", "backend", "forward_us", "both_us", "host_us", "error_norm"),
    "prefix_attention": ("shape", "backend", "forward_us", "both_us", "host_us", "error_norm"),
    "build": ("seconds", "exit"),
    "tests": ("tests", "failures", "errors", "skipped", "seconds"),
    "sanitizer": ("tool", "backend", "seconds", "exit", "skipped"),
}
TITLES = {
    "ceiling": "What the card gives: a copy, a product of matrices",
    "encoder": "Encoder, inference: ratio to no fusion, run in the same way",
    "accelerate": "`avfkernels.accelerate` on a stand-in for the authors' classes",
    "launches": "Events of one forward pass, as the profiler counts them",
    "pretrain": "A step of masked pre-training with AdamW: ratio to no fusion, run in the same way",
    "pair_attention": "Pair attention (shape: B, H, F, N1, N2, dk, dv), microseconds, by replaying a graph",
    "latent_attention": "Latent attention (shape: B, M, N, D), microseconds",
    "prefix_attention": "Prefix attention (shape: B, H, N, P, d), microseconds",
    "build": "Build with nvcc",
    "tests": "`pytest -m gpu`",
    "sanitizer": "compute-sanitizer",
}


def load(path: Path) -> list[dict]:
    """The rows; a last line that was cut off is left out. Raises ValueError naming a line that is none."""
    rows, lines = [], path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not a row of JSON") from None
    return rows


def with_ratios(rows: list[dict]) -> list[dict]:
    """Each row with its time relative to no fusion: same process, same input, run in the same way."""

    def key(row):
        return tuple(str(row.get(name)) for name in ("section", "part", "batch", "masked", "dtype", "way", "prototype"))

    none = {key(row): row["ms"] for row in rows if row.get("fusion") == "none" and "ms" in row}
    return [row | ({"ratio": row["ms"] / none[key(row)]} if "ms" in row and key(row) in none else {}) for row in rows]


def cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def render(path: Path) -> None:
    """Writes the .md and, if there are rows of the encoder, the .png beside a file of rows."""
    rows = with_ratios(load(path))
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    made = rows[-1]
    text = f"# {made['device']}\n\n"
    text += "".join(f"{row['note']}\n\n" for row in rows if row["section"] == "note")
    if chart(rows, path.with_suffix(".png")):
        text += f"![Time of the encoder relative to no fusion]({path.stem}.png)\n\n"
    for section, columns in COLUMNS.items():
        shown = [row for row in rows if row["section"] == section and "error" not in row]
        if shown:
            table = [[name, *(cell(row.get(name)) for row in shown)] for name in columns]
            text += f"## {TITLES[section]}\n\n{aligned([column for column in table if any(column[1:])])}\n"
    failed = [row for row in rows if "error" in row]
    if failed:
        text += "## What failed, or was not reached\n\n"
        hidden = {"error", "section", "part", "command", "device", "commit", "date", "torch", "triton"}
        for row in failed:
            what = ", ".join(f"{key} {value}" for key, value in row.items() if key not in hidden)
            text += f"- {row['section']}{f' ({what})' if what else ''}: {row['error']}\n"
        text += "\n"
    versions = ", ".join(f"{name} {made[name]}" for name in ("torch", "triton") if made.get(name))
    command = made.get("command", "`bench/gpu.sh`")
    text += f"Made by {command} on {made['date'][:10]}, commit {made['commit']}; {versions}.\n"
    path.with_suffix(".md").write_text(text)


def chart(rows: list[dict], path: Path) -> bool:
    """Bars of the encoder's ratio to no fusion, a panel an input; a mark is the floor, the ratio of FLOP."""
    shown = [row for row in rows if row["section"] == "encoder" and row.get("ratio") and row["fusion"] != "none"
             and row["dtype"] == "bfloat16" and "streams" not in row["way"]]  # fmt: skip
    if not shown:
        return False
    from matplotlib.figure import Figure

    inputs = sorted({(row["batch"], row["masked"]) for row in shown}, key=lambda key: (key[1], key[0]))
    panels = {key: [row for row in shown if (row["batch"], row["masked"]) == key] for key in inputs}
    heights = [len(panel) + 2 for panel in panels.values()]
    figure = Figure(figsize=(11, 0.26 * sum(heights) + 1), layout="constrained")
    figure.suptitle(f"The price of early fusion on {shown[0]['device']}, bfloat16", fontweight="bold", color=INK)
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, ((batch, masked), panel) in zip(grid, panels.items(), strict=True):
        longest = min(6.0, max(row["ratio"] for row in panel))
        for y, row in enumerate(panel):
            kind = "materialised" if row["backend"] == "reference" else "ours"
            colour = BASELINES if row["fusion"] == "token" else COLOURS[kind]
            axes.barh(y, min(row["ratio"], longest), height=0.66, color=colour, zorder=2)
            if "flop_ratio" in row and row["flop_ratio"] < longest:
                axes.plot([row["flop_ratio"]] * 2, [y - 0.42, y + 0.42], color=FLOOR, linewidth=2.5, zorder=4)
            axes.text(min(row["ratio"], longest) + longest * 0.01, y, f"{row['ratio']:.2f} ×", va="center", fontsize=8)
        names = [f"{r['fusion']}, {r['backend']}, {r['way']}{', prototype' * bool(r.get('prototype'))}" for r in panel]
        axes.set_yticks(range(len(panel)), names, fontsize=8)
        axes.set_title(
            f"batch {batch}, {'masked input' if masked else 'all tokens'}", loc="left", fontsize=9, color=INK
        )
        axes.axvline(1, color=INK, linewidth=0.8)
        axes.set_ylim(len(panel) - 0.4, -0.6)
        axes.set_xlim(0, longest * 1.12)
        axes.grid(axis="x", color=GRID, zorder=0)
        axes.tick_params(colors=INK, length=0)
        axes.spines[:].set_visible(False)
    grid[-1].set_xlabel("time relative to no fusion, run in the same way; mark: ratio of FLOP", color=INK)
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})
    return True
