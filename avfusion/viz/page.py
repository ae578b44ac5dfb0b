"""A look at a data set: one self-contained HTML page with frames, masks, boxes, spectrograms and players.

    table = avfusion.data.read("vggsound", "/data/vggsound")
    write_page("page.html", table_cards(table, 12), title="VGGSound")

A page is a list of `Card`s, one a clip. Those of sets made by `avfusion synth` show their ground truth.
"""

import base64
import html
import io
import json
import math
import os
import warnings
import wave
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from matplotlib import colormaps
from PIL import Image

from avfusion.data.table import Row, Table, read_whole_row
from avfusion.media.clip import ClipError
from avfusion.media.transforms import LogMel

RATE = 16000  # Hz, of every sound on the page
SIDE, FRAMES = 256, 32  # at most so many pixels and frames of a clip go into the page
COLOURS = ("#e6550d", "#3182bd", "#31a354", "#a05dbf", "#c51b8a", "#8c6d31")


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


def write_page(path: str | os.PathLike, cards: Iterable[Card], *, title: str) -> int:
    """Write an HTML file that needs no other file and no network; returns how many cards it has.

    Cards are taken one by one and not all held at once. The file appears when it is complete.
    """
    part, count = Path(f"{os.fspath(path)}.part"), 0
    with open(part, "w", encoding="utf-8") as file:
        file.write(HEAD.replace("TITLE", html.escape(title)))
        for card in cards:
            # "<" in a label must not end the script element.
            data = json.dumps(_data(card)).replace("<", "\\u003c")
            file.write(f'<script type="application/json" class="card">{data}</script>\n')
            count += 1
        file.write(f"<script>{SCRIPT}</script></body></html>\n")
    os.replace(part, path)
    return count


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
    labels = row.labels or (() if row.label is None else (row.label,))
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


# From arrays to what the page holds -----------------------------------------------------------------------------------


def _data(card: Card) -> dict:
    frames, columns = _sheet(card.frames)
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(card.things))]
    sounds = [{"name": "sound", "colour": "#222"} | _sound(card.waveform)]
    for thing, colour in zip(card.things, colours, strict=True):
        if thing.waveform is not None:
            sounds.append({"name": thing.name, "colour": colour} | _sound(thing.waveform))
    return {
        "title": card.title, "caption": card.caption, "times": [round(float(time), 3) for time in card.times],
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
    pcm = np.rint(np.clip(waveform, -1, 1) * 32767).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as output:
        output.setnchannels(1)
        output.setsampwidth(2)
        output.setframerate(RATE)
        output.writeframes(pcm.tobytes())
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


HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light; --line: #ddd }
body { font: 14px/1.45 system-ui, sans-serif; color: #222; background: #f5f5f3; margin: 0 auto; padding: 20px;
       max-width: 1500px }
h1 { font-size: 20px; margin: 0 0 4px }
nav { position: sticky; top: 0; z-index: 1; background: #f5f5f3; padding: 6px 0 10px; display: flex; gap: 18px }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(640px, 1fr)); gap: 16px }
article { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 12px; display: grid;
          grid-template-columns: 272px 1fr; gap: 4px 16px; align-content: start }
h2 { grid-column: 1 / 3; font: 600 14px ui-monospace, monospace; margin: 0 }
h2 span { font: 13px system-ui, sans-serif; color: #666; margin-left: 8px }
canvas { width: 272px; border-radius: 4px; display: block }
input[type=range] { width: 100%; margin: 6px 0 0 }
ul { list-style: none; margin: 4px 0 0; padding: 0; font-size: 13px }
i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px }
.sound { margin: 0 0 8px }
.sound b { font-weight: 500; font-size: 13px }
.strip { position: relative; height: 56px; background: #000; border-radius: 4px; overflow: hidden; cursor: pointer }
.strip img { width: 100%; height: 100%; display: block }
.strip u { position: absolute; top: 0; bottom: 0; width: 1px; background: #fff }
audio { width: 100%; height: 28px; margin-top: 2px; display: block }
</style></head><body><h1>TITLE</h1>
<nav><label><input type="checkbox" id="masks" checked> masks</label>
<label><input type="checkbox" id="boxes" checked> boxes</label>
<span>Play a sound and the frames follow it; click a spectrogram to go there.</span></nav><main></main>
"""

SCRIPT = """
'use strict';
const root = document.documentElement, main = document.querySelector('main'), redraws = [];
root.dataset.ready = 0;
window.onerror = (message) => { root.dataset.error = message };
const make = (parent, tag, properties) => parent.appendChild(Object.assign(document.createElement(tag), properties));
const checked = (id) => document.getElementById(id).checked;
const load = async (source) => {
  if (!source) return null;
  const image = new Image();
  image.src = source;
  await image.decode();
  return image;
};

async function show(card) {
  const article = make(main, 'article', {});
  make(make(article, 'h2', { textContent: card.title }), 'span', { textContent: card.caption });
  const left = make(article, 'div', {}), right = make(article, 'div', {});
  const canvas = make(left, 'canvas', { width: 2 * card.width, height: 2 * card.height });
  const slider = make(left, 'input', { type: 'range', min: 0, max: card.times.length - 1,
                                       value: card.times.length >> 1, ariaLabel: 'frame' });
  slider.hidden = card.times.length < 2;
  const list = make(left, 'ul', {});
  for (const thing of card.things) {
    const item = make(list, 'li', {});
    make(item, 'i', {}).style.background = thing.colour;
    item.append(thing.name);
  }
  const sounds = [];
  for (const sound of card.sounds) {
    const block = make(right, 'div', { className: 'sound' });
    make(block, 'i', {}).style.background = sound.colour;
    make(block, 'b', { textContent: sound.name });
    const strip = make(block, 'div', { className: 'strip' });
    if (sound.spectrogram) make(strip, 'img', { src: sound.spectrogram, alt: 'spectrogram of ' + sound.name });
    const needle = make(strip, 'u', {});
    const audio = make(block, 'audio', { controls: true, src: sound.audio, preload: 'metadata' });
    strip.onclick = (event) => { seek(event.offsetX / strip.clientWidth * sound.seconds); audio.play() };
    audio.onplay = () => { for (const other of document.querySelectorAll('audio')) if (other !== audio) other.pause();
                           follow(audio) };
    audio.onseeked = () => follow(audio);
    sounds.push({ audio, needle, seconds: sound.seconds });
  }
  const seek = (time) => { for (const { audio } of sounds) audio.currentTime = time };
  const follow = (audio) => {
    let last = 0;
    while (last + 1 < card.times.length && card.times[last + 1] <= audio.currentTime) last++;
    slider.value = last;
    draw(audio.currentTime);
    if (!audio.paused) requestAnimationFrame(() => follow(audio));
  };

  const [frames, masks] = await Promise.all([load(card.frames), load(card.masks)]);
  const context = canvas.getContext('2d');
  const rows = Math.ceil(card.times.length / card.columns);
  const tile = (image, number) => {
    const w = image.width / card.columns, h = image.height / rows;
    context.drawImage(image, number % card.columns * w, Math.floor(number / card.columns) * h, w, h,
                      0, 0, canvas.width, canvas.height);
  };
  const draw = (time) => {
    const number = Number(slider.value);
    tile(frames, number);
    if (masks && checked('masks')) {
      context.globalAlpha = 0.25;
      context.imageSmoothingEnabled = false;
      tile(masks, number);
      context.globalAlpha = 1;
      context.imageSmoothingEnabled = true;
    }
    for (const thing of checked('boxes') ? card.things : []) {
      const box = thing.boxes && thing.boxes[number];
      if (!box) continue;
      const [x, y, right, bottom] = box.map((v, i) => v * (i % 2 ? canvas.height : canvas.width));
      context.strokeStyle = thing.colour;
      context.lineWidth = 3;
      context.setLineDash(thing.silent ? [8, 6] : []);
      context.strokeRect(x, y, right - x, bottom - y);
    }
    for (const { needle, seconds } of sounds) needle.style.left = 100 * time / seconds + '%';
  };
  slider.oninput = () => { seek(card.times[slider.value]); draw(card.times[slider.value]) };
  redraws.push(() => draw(card.times[slider.value]));
  draw(card.times[slider.value]);
  root.dataset.ready++;
}
for (const id of ['masks', 'boxes']) document.getElementById(id).onchange = () => redraws.forEach((redraw) => redraw());
for (const element of document.querySelectorAll('script.card'))
  show(JSON.parse(element.textContent)).catch((error) => { root.dataset.error = error });
"""
