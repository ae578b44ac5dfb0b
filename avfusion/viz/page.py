"""A look at a data set: one self-contained HTML page with frames, masks, boxes, spectrograms and players.

    table = avfusion.data.read("vggsound", "/data/vggsound")
    write_page("page.html", table_cards(table, 12), title="VGGSound", empty=UNREADABLE)

A page is a list of `Card`s, one a clip. Those of sets made by `avfusion synth` show their ground truth. Pages work from
360 pixels to 4K, in light and dark, by keyboard and screen reader; a Content-Security-Policy lets them run page.js
alone, and load nothing.
"""

import base64
import hashlib
import html
import io
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from matplotlib import colormaps
from PIL import Image

from avfusion.data.table import Row, Table, read_whole_row
from avfusion.files import writing
from avfusion.media.clip import ClipError
from avfusion.media.transforms import LogMel

RATE = 16000  # Hz, of every sound on the page
SIDE, FRAMES = 256, 32  # at most so many pixels and frames of a clip go into the page
UNREADABLE = (
    "No clip of this data set could be read. What is wrong with which file is in the messages of the command; a file "
    "that FFmpeg cannot read was often cut off while it was fetched: fetch it again."
)
COLOURS = ("#e6550d", "#3182bd", "#31a354", "#a05dbf", "#c51b8a", "#8c6d31")
HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; media-src data:; \
style-src '{style_hash}'; script-src '{script_hash}'; base-uri 'none'; form-action 'none'">
<style>{style}</style></head><body><header><h1>{title}</h1><p class="lead">{lead}</p></header>
<main>{body}<div class="tools" role="group" aria-label="What is shown">
<label hidden><input type="checkbox" id="masks" checked>masks</label>
<label hidden><input type="checkbox" id="boxes" checked>boxes</label>
<span hidden id="play">Play a sound and the frames follow it; click a spectrogram to go there.</span></div>
<div class="cards"></div>
<noscript><p class="empty">The clips are drawn by a script in this page: allow it to see them.</p></noscript>
"""


@dataclass(frozen=True)
class Thing:
    """Something in a clip: what it is called, where it is, what it sounds like."""

    name: str
    boxes: Sequence[Sequence[float] | None] | None = None  # of each frame: left, top, right, bottom, as fractions
    mask: int | None = None  # its value in the card's masks
    waveform: np.ndarray | None = None  # [samples] float32 at 16 kHz: its part of the sound


@dataclass(frozen=True)
class Card:
    """What the page shows of one clip."""

    title: str
    caption: str
    frames: np.ndarray  # [T, H, W, 3] uint8
    times: np.ndarray  # [T] seconds
    waveform: np.ndarray  # [samples] float32 at 16 kHz, full scale 1
    things: tuple[Thing, ...] = ()
    masks: np.ndarray | None = None  # [T, H', W'] uint8: 0 where nothing is
    group: str = ""  # the heading that it is under, with the cards beside it


def write_page(
    path: str | os.PathLike, cards: Iterable[Card], *, title: str, empty: str, lead: str = "", body: str = ""
) -> int:
    """Write an HTML file that needs no other file and no network; returns how many cards it has.

    Cards are taken one by one and not all held at once. The file appears when it is complete.

    Args:
        empty: what the page says, and what to do, where there is no card.
        lead: a sentence under the title.
        body: HTML before the cards; it may have `figure`s and `table`s, and no style of its own.
    """
    style, script = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    count = 0
    with writing(path) as part, open(part, "w", encoding="utf-8", newline="\n") as file:  # what is hashed
        file.write(HEAD.format(title=html.escape(title), lead=html.escape(lead), body=body, style=style,
                               style_hash=_hash(style), script_hash=_hash(script)))  # fmt: skip
        for card in cards:
            # "<" in a label must not end the script element.
            data = json.dumps(_data(card)).replace("<", "\\u003c")
            file.write(f'<script type="application/json" class="card">{data}</script>\n')
            count += 1
        if not count:
            file.write(f'<p class="empty">{html.escape(empty)}</p>')
        file.write(f"</main><script>{script}</script></body></html>\n")
    return count


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def table_cards(table: Table, count: int) -> Iterator[Card]:
    """Cards of up to `count` clips, spread over the table. Clips that cannot be read are left out, with a warning."""
    count = min(count, len(table))
    for row in (table.rows[i * len(table) // count] for i in range(count)):
        try:
            yield _card(table, row)
        except ClipError as error:
            warnings.warn(f"not on the page: {error}", stacklevel=2)


def _card(table: Table, row: Row) -> Card:
    frames, waveform = read_whole_row(row, frame_rate=8, sample_rate=RATE, transform=thumbnail)
    frames = frames[:: math.ceil(len(frames) / FRAMES)]
    times, images = np.array([time for time, _ in frames]), stacked([image for _, image in frames])
    labels = row.all_labels
    caption = " · ".join([*(table.classes[label] for label in labels), *filter(None, [row.split])])
    boxes = row.extra.get("boxes", ())
    things = tuple(Thing(f"annotation {number}", [box] * len(times)) for number, box in enumerate(boxes, 1))
    card = Card(row.id, caption, images, times, waveform[0].numpy(), things)
    # The names of synthetic clips, or of their folders, begin with the id.
    for name in reversed(row.path.relative_to(table.root).parts):
        truth = table.root / "truth" / name[:11]
        if (truth / "truth.json").is_file():
            return with_truth(card, truth)
    return card


def with_truth(card: Card, folder: Path) -> Card:
    """Add the objects, masks and sources that `avfusion synth` wrote into `folder`, the clip's truth/<id>."""
    truth = json.loads((folder / "truth.json").read_bytes())
    shown = [int(np.argmin(np.abs(np.array(truth["times"]) - time))) for time in card.times]
    with np.load(folder / "masks.npz", allow_pickle=False) as archive:
        masks = archive["masks"][shown]
    things = []
    for item in truth["objects"]:
        name = [item["look"] or "off screen", item["timbre"] or "silent"]
        boxes = item["boxes"] and [item["boxes"][n] and [v / truth["size"] for v in item["boxes"][n]] for n in shown]
        source = None
        if item["sounding"]:
            source, _ = soundfile.read(folder / "sources" / f"{item['source']}.wav", dtype="float32")
        things.append(Thing(", ".join(name), boxes, item["mask"], source))
    return replace(card, things=tuple(things), masks=masks)


def thumbnail(image: Image.Image) -> np.ndarray:
    """[h, w, 3], neither side above `SIDE`."""
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    return np.asarray(image)


def stacked(images: list[np.ndarray]) -> np.ndarray:
    """[N, h, w, 3]; pictures of another size than the first, as of a stream that changes it, are fitted."""
    height, width = images[0].shape[:2]
    return np.stack([
        image if image.shape[:2] == (height, width) else np.asarray(Image.fromarray(image).resize((width, height)))
        for image in images
    ])  # fmt: skip


def _data(card: Card) -> dict:
    frames, columns = _sheet(card.frames)
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(card.things))]
    sounds = [{"name": "sound", "colour": ""} | _sound(card.waveform)]
    for thing, colour in zip(card.things, colours, strict=True):
        if thing.waveform is not None:
            sounds.append({"name": thing.name, "colour": colour} | _sound(thing.waveform))
    return {
        "title": card.title, "caption": card.caption, "group": card.group,
        "times": [round(float(time), 3) for time in card.times],
        "height": card.frames.shape[1], "width": card.frames.shape[2], "columns": columns,
        "frames": _picture(Image.fromarray(frames), "JPEG", quality=85),
        "masks": None if card.masks is None else _overlay(card, colours),
        "things": [
            {"name": thing.name, "colour": colour, "boxes": thing.boxes,
             "silent": thing.mask is not None and thing.waveform is None}
            for thing, colour in zip(card.things, colours, strict=True)
        ],
        "sounds": sounds,
    }  # fmt: skip


def _sheet(tiles: np.ndarray) -> tuple[np.ndarray, int]:
    """Lay T pictures out in a grid, row by row, and tell how many columns it has."""
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    padded = np.zeros((rows * columns, *tiles.shape[1:]), np.uint8)
    padded[: len(tiles)] = tiles
    return np.concatenate([np.concatenate(list(row), 1) for row in np.split(padded, rows)]), columns


def _overlay(card: Card, colours: list[str]) -> str:
    """Masks as a sheet of the same grid, in the colours of the things and transparent elsewhere."""
    palette = np.zeros((256, 4), np.uint8)
    for thing, colour in zip(card.things, colours, strict=True):
        if thing.mask is not None:
            palette[thing.mask] = [*bytes.fromhex(colour[1:]), 255]
    return _picture(Image.fromarray(palette[_sheet(card.masks)[0]]), "PNG")


def _sound(waveform: np.ndarray) -> dict:
    file = io.BytesIO()
    soundfile.write(file, np.rint(np.clip(waveform, -1, 1) * 32767).astype(np.int16), RATE, format="WAV")
    return {"audio": _uri("audio/wav", file.getvalue()), "seconds": round(len(waveform) / RATE, 3),
            "spectrogram": _spectrogram(waveform)}  # fmt: skip


def _spectrogram(waveform: np.ndarray) -> str | None:
    """The log-mel spectrogram that the model sees, over 70 dB."""
    if len(waveform) < RATE // 20:
        return None
    decibels = 10 * LogMel()(torch.from_numpy(np.ascontiguousarray(waveform))).numpy()[::-1]
    shades = np.clip((decibels - decibels.max()) / 70 + 1, 0, 1)
    return _picture(Image.fromarray(colormaps["magma"](shades, bytes=True)).convert("RGB"), "JPEG", quality=85)


def _picture(image: Image.Image, kind: str, **options) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return _uri(f"image/{kind.lower()}", file.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
