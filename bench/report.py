"""Results: one JSON file a device, and the Markdown and the pictures that are drawn from it.

    python -m bench.report bench/results/cpu-amd-epyc-2-cores-avx2.json

draws them again. A file holds sections, one a table; a run replaces the sections it measured and leaves the others.
(What bench/gpu.sh measures are rows in a .jsonl file, which bench/gpu/report.py draws: the same command.)
"""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

MIB = 2**20


def save(path: Path, device: str, sections: dict[str, dict], unfinished: list[str]) -> None:
    """Merges the sections into the device's file; `unfinished` names those of a run that has more to measure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text())["sections"] if path.exists() else {}
    results = {"device": device, "sections": dict(sorted((known | sections).items()))}
    if unfinished:
        results["unfinished"] = unfinished
    _replace(path, lambda part: part.write_text(json.dumps(results, indent=1) + "\n"))


def render(path: Path) -> list[Path]:
    """Writes the .md and, if there is something to draw, the .png files beside a results file: their paths."""
    results = json.loads(path.read_text())
    written = [path.with_suffix(".md")]
    _replace(written[0], lambda part: part.write_text(text(results, path.stem)))
    for end, _, draw, sections in _pictures(results):
        written.append(path.with_name(path.stem + end))
        _replace(written[-1], partial(draw, results["device"], sections))
    return written


def text(results: dict, stem: str) -> str:
    """The Markdown of a results file: its pictures, which are named after `stem`, and its sections."""
    pictures = "".join(f"![{shows}]({stem}{end})\n\n" for end, shows, _, _ in _pictures(results))
    return f"# {results['device']}\n\n{pictures}" + "\n".join(map(markdown, results["sections"].values()))


def _pictures(results: dict) -> list[tuple[str, str, Callable, list[dict]]]:
    """(end of the file's name, what it shows, what draws it, its sections) of every picture with something to draw."""
    sections = list(results["sections"].values())
    curves, lines = ([section for section in sections if kind in section] for kind in ("x", "line"))
    bars = [s for s in sections if s not in curves and any("flop_ratio" in row for row in s["rows"])]
    pictures = [
        (".png", "Time and memory relative to no fusion", chart, bars),
        ("-scaling.png", "Time relative to no fusion against batch and tokens", scaling_chart, curves),
        ("-growth.png", "Time and memory against the number of pairs", growth_chart, lines),
    ]
    return [picture for picture in pictures if picture[-1]]


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(f".{path.name}")
    write(part)
    os.replace(part, path)


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1 or unit == "µs":
            return f"{_number(seconds * scale)} {unit}"


def _ratio(x: float) -> str:
    return f"{x:.2f} ×"


def _rate(result: dict) -> str:
    share = f" ({result['peak_share']:.0%})" if "peak_share" in result else ""
    return f"{result['flops'] / 1e9:,.0f}{share}"


def _spread(quantiles: dict) -> str:
    return f"**{_ratio(quantiles['median'])}** ({quantiles['p20']:.2f} – {quantiles['p80']:.2f})"


# Heading -> what it shows of a row; a row without it (KeyError) leaves the cell empty, and no row with it the column.
COLUMNS = {
    "": lambda row: row["name"],
    "videos/s": lambda row: _number(row["per_second"]),
    "time": lambda row: _time(row["seconds"]["median"]),
    "GFLOP/s (of the peak)": lambda row: _rate(row),
    "time ratio (p20 – p80)": lambda row: _spread(row["time_ratio"]),
    "speed-up": lambda row: f"**{_ratio(row['speed_up'])}**",
    "floor": lambda row: f"{row['flop_ratio']:.3f} ×",
    "GFLOP/video": lambda row: f"{row['flop'] / 1e9:.1f}",
    "peak memory, MiB": lambda row: _number(row["peak_memory"] / MIB),
    "memory ratio": lambda row: f"**{_ratio(row['memory_ratio'])}**",
    "saved, MiB": lambda row: _number(row["saved"] / MIB),
    "saved ratio": lambda row: f"**{_ratio(row['saved_ratio'])}**",
    "paper: videos/s": lambda row: f"{row['paper']['per_second']} ({_ratio(row['paper']['time_ratio'])})",
    "paper: memory": lambda row: f"{row['paper']['memory_gb']} GB ({_ratio(row['paper']['memory_ratio'])})",
    "forward": lambda row: _time(row["forward"]["seconds"]["median"]),
    "ratio (p20 – p80)": lambda row: _spread(row["forward"]["time_ratio"]),
    "GFLOP/s (of peak)": lambda row: _rate(row["forward"]),
    "backward": lambda row: _time(row["backward"]["seconds"]["median"]),
    "backward ratio": lambda row: _spread(row["backward"]["time_ratio"]),
    "backward GFLOP/s": lambda row: _rate(row["backward"]),
    "both": lambda row: _time(row["both"]["seconds"]["median"]),
    "both ratio": lambda row: _spread(row["both"]["time_ratio"]),
    "ns a token": lambda row: _number(row["forward"]["seconds"]["median"] / (2 * row["tokens"]) * 1e9),
    "rounds": lambda row: str(row["rounds"]),
    "note": lambda row: row["note"],
}


def _cell(show: Callable[[dict], str], row: dict) -> str:
    try:
        return show(row)
    except KeyError:
        return ""


def table(rows: list[dict]) -> str:
    """A Markdown table, padded so that it also reads well as plain text."""
    columns = [[heading, *(_cell(show, row) for row in rows)] for heading, show in COLUMNS.items()]
    return aligned([column for column in columns if any(column[1:])])


def aligned(columns: list[list[str]]) -> str:
    """Columns, each a heading and its cells, as a Markdown table."""
    widths = [max(3, *map(len, column)) for column in columns]
    lines = [
        "| " + " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(line)) + " |"
        for line in (zip(cells, widths, strict=True) for cells in zip(*columns, strict=True))
    ]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _conditions(section: dict) -> str:
    ratios = f"; ratios are to {section['baseline']}" if "baseline" in section else ""
    return f"Batch {section['batch']}, {section['dtype']}{ratios}."


def markdown(section: dict) -> str:
    """One section: title, table, how it was measured, how to repeat it."""
    made = section["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    text = f"## {section['title']}\n\n"
    text += f"{_conditions(section)}\n\n"
    text += table(section["rows"])
    text += "".join(f"\n- {note}" for note in section["notes"])
    return text + (
        f"\n- Made by `{section['command']}` on {made['date'][:10]}, commit {made['commit'] or 'unknown'}; "
        f"threads: {made['threads']}; {versions}.\n"
    )


# The columns on a terminal; an op's time is that of its forward pass.
TERMINAL = {
    "": lambda row: row["name"],
    "time": lambda row: _time(row.get("forward", row)["seconds"]["median"]),
    "ratio (p20–p80)": lambda row: _plain(row.get("forward", row)["time_ratio"]),
    "floor": lambda row: f"{row['flop_ratio']:.2f}",
    "GFLOP": lambda row: f"{row['flop'] / 1e9:.1f}",
    "MiB": lambda row: _number(row["peak_memory"] / MIB),
    "ratio": lambda row: f"{row['memory_ratio']:.2f}",
    "paper's ratios": lambda row: f"{row['paper']['time_ratio']:.2f}, {row['paper']['memory_ratio']:.2f}",
    "both": lambda row: _time(row["both"]["seconds"]["median"]),
    "both ratio": lambda row: _plain(row["both"]["time_ratio"]),
    "of peak": lambda row: f"{row['peak_share']:.0%}",
    "videos/s": lambda row: _number(row["per_second"]),
}


def _plain(quantiles: dict) -> str:
    return f"{quantiles['median']:.2f} ({quantiles['p20']:.2f}–{quantiles['p80']:.2f})"


def terminal(section: dict, width: int = 100) -> str:
    """One section for a terminal: as many of the columns as fit. A row that was not measured says why."""
    columns = [[heading, *(_cell(show, row) for row in section["rows"])] for heading, show in TERMINAL.items()]
    columns = [column for column in columns if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    while sum(widths) + 2 * (len(widths) - 1) > width:
        widths.pop()
    lines = [*textwrap.wrap(section["title"], width), _conditions(section)]
    for row, (name, *cells) in zip([{}, *section["rows"]], zip(*columns, strict=True), strict=True):
        cells = [cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=False)]
        unmeasured = "note" in row and not {"seconds", "forward"} & row.keys()
        lines.append("  ".join([name.ljust(widths[0]), *([row["note"]] if unmeasured else cells)])[:width].rstrip())
    return "\n".join(lines) + "\n"


def sentence(device: str, section: dict) -> str:
    """What the table of an encoder pass shows."""
    rows = {row["name"]: row for row in section["rows"]}
    prices = [_price(kind, rows[f"{kind}, ours"], rows[f"{kind}, materialised"]) for kind in ("dense", "factorized")]
    return f"On {device}, {'; '.join(prices)}."


def peak_sentence(device: str, section: dict) -> str:
    """What the table of peers shows."""
    rows = {row["name"]: row for row in section["rows"]}
    ours = {name.rpartition(", ")[2]: row for name, row in rows.items() if name.startswith("ours, no fusion")}
    shares = [f"{row['peak_share']:.0%} in {dtype}" for dtype, row in ours.items() if "peak_share" in row]
    reached = f"reaches {' and '.join(shares)} of the measured peak; " if shares else ""
    rates = [f"{_number(row['per_second'])} {name}" for name, row in rows.items() if "no fusion" not in name]
    return f"On {device}, the encoder {reached}videos/s: {'; '.join(rates)}."


def _price(kind: str, ours: dict, materialised: dict) -> str:
    if "time_ratio" not in ours:
        return f"{kind} interactions were not measured ({ours['note']})"
    time = ours["time_ratio"]["median"]
    price = f"{kind} interactions take {time:.2f} times as long as no fusion (floor {ours['flop_ratio']:.2f})"
    if "time_ratio" not in materialised:
        return f"{price} and were not measured materialised ({materialised['note']})"
    theirs = materialised["time_ratio"]["median"]
    factor, how = max((theirs / time, "faster"), (time / theirs, "slower"))
    than = f"{factor:.2f} times {how} than" if factor >= 1.005 else "as fast as"
    return f"{price} and are {than} materialised ({theirs:.2f}; the paper: {materialised['paper']['time_ratio']:.2f})"


INK, GRID, FLOOR = "#1f2933", "#e4e7eb", "#edae49"
COLOURS = {"materialised": "#d1495b", "ours": "#00798c"}  # by the last word of a row's name
BASELINES = "#9aa5b1"


def chart(device: str, sections: list[dict], path: Path) -> None:
    """Bars of time and memory relative to the baseline; a mark is the floor, an outline the ratio in the paper."""
    from matplotlib.figure import Figure

    lines = sum(len(section["rows"]) + 3 for section in sections)
    figure = Figure(figsize=(12, 0.33 * lines + 1.2), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
    figure.suptitle(f"DeepAVFusion ViT-B encoder on {device}", fontsize=14, fontweight="bold", color=INK)
    panels = figure.subplots(len(sections), 2, squeeze=False)
    for (left, right), section in zip(panels, sections, strict=True):
        rows = section["rows"]
        papers = [row.get("paper", {}) for row in rows]
        times = [row["time_ratio"]["median"] if "time_ratio" in row else None for row in rows]
        memory = [row.get("memory_ratio") for row in rows]
        floors = [row["flop_ratio"] for row in rows]
        _bars(left, rows, times, [paper.get("time_ratio") for paper in papers], floors)
        _bars(right, rows, memory, [paper.get("memory_ratio") for paper in papers], [None] * len(rows))
        left.set_title(section["title"], loc="left", fontsize=10.5, color=INK, pad=8)
        left.set_xlabel(f"time relative to {section['baseline']}", color=INK)
        right.set_xlabel(f"peak memory relative to {section['baseline']}", color=INK)
        right.set_yticklabels([])
    _legend(figure)
    figure.savefig(path, dpi=150, format="png", facecolor="white")


def _bars(axes, rows: list[dict], values: list, papers: list, floors: list) -> None:
    """A horizontal bar a row, with its value at the end; None is not drawn."""
    longest = max(x for x in (*values, *papers, *floors) if x is not None)
    for y, (row, value, paper, floor) in enumerate(zip(rows, values, papers, floors, strict=True)):
        if value is not None:
            colour = COLOURS.get(row["name"].rpartition(", ")[2], BASELINES)
            axes.barh(y, value, height=0.62, color=colour, zorder=2)
        if paper is not None:
            axes.barh(y, paper, height=0.62, fill=False, edgecolor=INK, linewidth=1.1, linestyle="--", zorder=3)
        if floor is not None:
            axes.plot([floor, floor], [y - 0.42, y + 0.42], color=FLOOR, linewidth=2.5, zorder=4)
        end = max(x for x in (value, paper, floor, 0) if x is not None)
        text = row["note"] if value is None else f"{value:.2f} ×"
        axes.text(end + longest * 0.015, y, text, va="center", color=INK, fontsize=9.5, fontweight="bold")
    axes.axvline(1, color=INK, linewidth=0.8, zorder=1)
    axes.set_xlim(0, longest * 1.16)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.grid(axis="x", color=GRID, zorder=0)
    axes.tick_params(colors=INK, length=0)
    axes.spines[:].set_visible(False)


def _legend(figure) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    mark = {"linestyle": "none", "marker": "|", "markersize": 12, "markeredgewidth": 2.5}
    handles = [
        Patch(color=COLOURS["ours"], label="ours"),
        Patch(color=COLOURS["materialised"], label="materialised, as released"),
        Patch(color=BASELINES, label="baselines"),
        Line2D([], [], color=FLOOR, label="floor: ratio of FLOP", **mark),
        Patch(fill=False, edgecolor=INK, linestyle="--", label="the paper's Table 6, on its own hardware"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, labelcolor=INK)


LINES = {"materialised": "--", "eager": ":", "automatic": "-", "ours": "-"}  # by the last word of a line's name


def scaling_chart(device: str, sections: list[dict], path: Path) -> None:
    """Time relative to no fusion of each line against the size of the input, which doubles along the axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    figure.suptitle(f"The price of early fusion on {device}", fontsize=14, fontweight="bold", color=INK)
    panels = figure.subplots(1, len(sections), squeeze=False)[0]
    for axes, section in zip(panels, sections, strict=True):
        for line in dict.fromkeys(row["line"] for row in section["rows"]):
            points = [row for row in section["rows"] if row["line"] == line and "time_ratio" in row]
            kind, _, way = line.partition(", ")
            colour = {"dense": COLOURS["ours"], "factorized": FLOOR}.get(kind, BASELINES)
            x, y = [row["x"] for row in points], [row["time_ratio"]["median"] for row in points]
            axes.loglog(x, y, color=colour, linestyle=LINES.get(way, "-"), marker="o", markersize=4, label=line)
        ticks = sorted({row["x"] for row in section["rows"]})
        axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
        low, high = axes.get_ylim()
        steps = [step for step in (1, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50) if low <= step <= high]
        axes.set_yticks(steps, [f"{step} ×" for step in steps], minor=False)
        axes.set_yticks([], minor=True)
        axes.set_xlabel(section["x"], color=INK)
        axes.set_title(f"time relative to {section['baseline']}", loc="left", fontsize=10.5, color=INK)
        axes.grid(color=GRID)
        axes.tick_params(colors=INK)
        axes.spines[:].set_visible(False)
    panels[0].legend(frameon=False, labelcolor=INK)
    figure.savefig(path, dpi=150, format="png", facecolor="white")


def growth_chart(device: str, sections: list[dict], path: Path) -> None:
    """Time and peak memory of each line against the number of pairs, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    figure.suptitle(f"Pair attention on {device}", fontsize=14, fontweight="bold", color=INK)
    time, memory = figure.subplots(1, 2)
    for section in sections:
        interaction, _, row = section["line"].partition(", ")
        colour = {"sum": COLOURS["ours"], "product": COLOURS["materialised"]}[interaction]
        style = {"label": section["line"], "color": colour, "linestyle": LINES[row], "marker": "o", "markersize": 4}
        pairs = [point["pairs"] for point in section["rows"]]
        time.loglog(pairs, [point["both"]["seconds"]["median"] for point in section["rows"]], **style)
        memory.loglog(pairs, [max(point["peak_memory"], 1) / MIB for point in section["rows"]], **style)
    for axes, label in ((time, "seconds, forward and backward"), (memory, "peak memory above the inputs, MiB")):
        axes.set_xlabel("pairs of tokens a head", color=INK)
        axes.set_title(label, loc="left", fontsize=10.5, color=INK)
        axes.grid(color=GRID)
        axes.tick_params(colors=INK)
        axes.spines[:].set_visible(False)
    time.legend(frameon=False, labelcolor=INK)
    figure.savefig(path, dpi=150, format="png", facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="a .json or .jsonl file of bench/results/")
    path = parser.parse_args().file
    if not path.is_file():
        parser.error(f"{path}: no such file")
    if path.suffix == ".jsonl":
        from bench.gpu import report as gpu_report

        gpu_report.render(path)
    else:
        render(path)


if __name__ == "__main__":
    main()
