"""The drawings of the site, as SVG, from the code: sizes of the default encoder, and which package imports which."""

import ast
from pathlib import Path

from avfusion import EncoderConfig

ROOT = Path(__file__).parents[1]


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, width: float, height: float, *lines: str, kind: str = "box") -> str:
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" class="{kind}"/>'
    top = y + height / 2 + 5 - 8 * (len(lines) - 1)
    said = (text(x + width / 2, top + 16 * n, line, "small" if n else "") for n, line in enumerate(lines))
    return shape + "".join(said)


def arrow(*points: tuple[float, float]) -> str:
    path = "M" + " L".join(f"{x} {y}" for x, y in points)
    return f'<path d="{path}" class="line" marker-end="url(#head)"/>'


def svg(width: int, height: int, title: str, *parts: str) -> str:
    head = ('<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto-start-reverse"><path d="M0 0 L8 4 L0 8 z" fill="currentColor"/></marker></defs>')  # fmt: skip
    return (f'<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{title}">'
            f"<title>{title}</title>{head}{''.join(parts)}</svg>")  # fmt: skip


def clip() -> str:
    """Clip -> windows -> tokens -> layers -> features."""
    c = EncoderConfig()
    (rows, columns), (mels, frames) = c.image_grid, c.audio_grid
    seconds = c.audio_size[1] / 64  # LogMel makes 64 frames a second
    return svg(
        920, 330, "A clip becomes windows, tokens, layers and features",
        box(10, 130, 90, 60, "clip", "any container"),
        box(140, 60, 140, 60, f"frame {c.image_size[0]} x {c.image_size[1]}", "nearest to the middle"),
        box(140, 200, 140, 60, f"{seconds:g} s of sound", f"log-mel {c.audio_size[0]} x {c.audio_size[1]}"),
        box(320, 60, 130, 60, f"{rows * columns} image tokens", f"{rows} x {columns} patches"),
        box(320, 130, 130, 60, f"{c.num_fusion_tokens} fusion tokens", "learnt"),
        box(320, 200, 130, 60, f"{mels * frames} audio tokens", f"{mels} x {frames} patches"),
        '<rect x="490" y="40" width="240" height="250" rx="8" class="line" stroke-dasharray="5 4"/>',
        text(610, 30, f"{c.depth} layers, {c.dim} wide, {c.num_heads} heads"),
        box(510, 60, 200, 60, "image block", "reads the fusion tokens (R3)"),
        box(510, 130, 200, 60, "fusion block", "attends to every pair (R1)"),
        box(510, 200, 200, 60, "audio block", "reads the fusion tokens (R3)"),
        box(770, 60, 140, 60, "x_image", f"{rows * columns} x {c.dim}"),
        box(770, 130, 140, 60, "x_fusion", f"{c.num_fusion_tokens} x {c.dim}"),
        box(770, 200, 140, 60, "x_audio", f"{mels * frames} x {c.dim}"),
        arrow((100, 150), (120, 150), (120, 90), (138, 90)), arrow((100, 170), (120, 170), (120, 230), (138, 230)),
        *(arrow((280, y), (318, y)) for y in (90, 230)),
        *(arrow((450, y), (508, y)) for y in (90, 160, 230)),
        *(arrow((710, y), (768, y)) for y in (90, 160, 230)),
        *(arrow((x, y), (x, z)) for x, y, z in ((590, 120, 128), (630, 130, 122), (590, 200, 192), (630, 190, 198))),
        text(460, 318, "features: all tokens, or their means", "small"),
    )  # fmt: skip


FLOORS = (("cli",), ("tasks", "viz"), ("training", "embedding"), ("data", "metrics"), ("models", "media", "synth"))


def packages() -> str:
    """The packages of avfusion, and who imports whom, read from the files."""
    place, parts, width = {}, [], 860
    for level, rooms in enumerate(FLOORS):
        for n, room in enumerate(rooms):
            x = width / 2 + (n - (len(rooms) - 1) / 2) * 230
            place[room] = (x, 20 + 92 * level)
    place["avfkernels"], place["csrc"] = (width / 2, 20 + 92 * 5), (width / 2, 20 + 92 * 6)
    edges = set()
    for room in place:
        folder = ROOT / ("avfkernels" if room == "avfkernels" else f"avfusion/{room}")
        for file in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [])  # fmt: skip
                for name in names:
                    first, *rest = name.split(".")
                    other = first if first == "avfkernels" else rest[0] if first == "avfusion" and rest else ""
                    if other in place and other != room:
                        edges.add((room, other))
    edges.add(("avfkernels", "csrc"))
    implied = {(a, c) for a, b in edges for c in _reached(b, edges)}
    for a, b in sorted(edges - implied):
        (x1, y1), (x2, y2) = place[a], place[b]
        if y1 == y2:
            step = 75 if x2 > x1 else -75
            parts.append(arrow((x1 + step, y1 + 22), (x2 - step, y2 + 22)))
        else:
            parts.append(arrow((x1 + (x2 - x1) * 0.08, y1 + 44), (x2 + (x1 - x2) * 0.12, y2 - 2)))
    does = {"cli": "a file a command", "tasks": "a file a task", "viz": "pictures and pages", "training": "one loop",
            "embedding": "clips to features", "data": "sets to batches", "metrics": "against oracles",
            "models": "encoder, heads", "media": "files to inputs", "synth": "the synthetic world",
            "avfkernels": "ops, modules, layer", "csrc": "C ABI: CPU and CUDA"}  # fmt: skip
    parts += [box(x - 75, y, 150, 44, room, does[room]) for room, (x, y) in place.items()]
    return svg(width, 640, "The packages and which imports which: arrows point down only", *parts)


def _reached(room: str, edges: set[tuple[str, str]]) -> set[str]:
    direct = {b for a, b in edges if a == room}
    return direct.union(*(_reached(other, edges) for other in direct))


def separates() -> str:
    """R1: all pairs, beside two attentions that are added."""
    cell, rows, columns, parts = 15, 6, 12, []
    for i in range(rows):
        parts.append(f'<rect x="20" y="{60 + i * cell}" width="{cell - 2}" height="{cell - 2}" class="audio"/>')
        for j in range(columns):
            parts.append(f'<rect x="{44 + j * cell}" y="{60 + i * cell}" width="{cell - 2}" height="{cell - 2}" '
                         'class="pair"/>')  # fmt: skip
    for j in range(columns):
        parts.append(f'<rect x="{44 + j * cell}" y="36" width="{cell - 2}" height="{cell - 2}" class="image"/>')
        parts.append(f'<rect x="{420 + j * cell}" y="70" width="{cell - 2}" height="{cell - 2}" class="image"/>')
    for i in range(rows):
        parts.append(f'<rect x="{420 + i * cell}" y="120" width="{cell - 2}" height="{cell - 2}" class="audio"/>')
    c = EncoderConfig()
    v, a = (x * y for x, y in (c.image_grid, c.audio_grid))
    return svg(
        680, 190, "All pairs, and the two attentions that give the same", *parts,
        text(134, 24, f"softmax over {v} x {a} = {v * a:,} pairs"), text(320, 110, "="),
        text(420, 60, f"softmax over {v} image tokens", anchor="start"),
        text(420, 112, f"+ softmax over {a} audio tokens", anchor="start"),
        text(420, 165, f"{v + a} keys; exact, nothing approximated", "small", "start"),
    )  # fmt: skip
