"""The one table that every layout is read into, and how annotation files are read: bad rows by file and line."""

import csv
import hashlib
import json
import math
import os
import re
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from avfusion import files
from avfusion.common import unknown
from avfusion.media.clip import Clip
from avfusion.media.reader import read_clip, read_whole
from avfusion.media.stills import read_stills, read_whole_stills

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in fractions of the picture's width and height

VIDEO_SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm")


class LayoutError(ValueError):
    """A data set that cannot be read as it lies: names the file and, where there is one, the line."""


@dataclass(frozen=True, slots=True)
class Row:
    """One clip of a table."""

    id: str
    path: Path  # of the video; where `audio` is set: of the picture, or of a folder with a picture a second, N.jpg
    start: float | None = None  # where the clip was cut from its source video, in seconds; the file itself begins at 0
    label: int | None = None  # index into the table's classes, None where the set has no single one
    labels: tuple[int, ...] = ()  # all of them, where the set is multi-label
    split: str | None = None
    audio: Path | None = None  # the sound, where it is a file of its own
    extra: dict[str, Any] = field(default_factory=dict)  # what only this layout has

    @property
    def all_labels(self) -> tuple[int, ...]:
        """However many there are."""
        return self.labels or (() if self.label is None else (self.label,))


@dataclass(frozen=True)
class Table:
    """The clips of a data set that are there, and how many are not: public sets lose videos all the time."""

    layout: str
    root: Path
    rows: tuple[Row, ...]
    classes: tuple[str, ...] = ()
    missing: tuple[str, ...] = field(default=(), repr=False)  # ids that the annotations list and the folder lacks
    sha256: str = field(init=False)  # of the list of what was found: classes; id, path, labels and split of each row

    def __post_init__(self):
        digest = hashlib.sha256(json.dumps([self.layout, *self.classes]).encode())
        for row in self.rows:
            path = row.path.relative_to(self.root) if row.path.is_relative_to(self.root) else row.path
            fact = [row.id, path.as_posix(), row.label, row.labels, row.split]
            digest.update(json.dumps(fact).encode())
        object.__setattr__(self, "sha256", digest.hexdigest())

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        total = len(self.rows) + len(self.missing)
        return (
            f"{self.layout}: {len(self.rows):,} of {total:,} clips found under {self.root} "
            f"({len(self.missing):,} missing), {len(self.classes)} classes, sha256 {self.sha256}"
        )

    def in_order_of_folders(self) -> "Table":
        """The same with classes numbered as the DeepAVFusion release numbers them: in the order of `folder_name`."""
        classes = tuple(sorted(self.classes, key=folder_name))
        new = {old: classes.index(name) for old, name in enumerate(self.classes)}
        rows = [
            replace(
                row, label=new.get(row.label), labels=tuple(new[label] for label in row.labels),
                extra=row.extra | ({"label_2": new[row.extra["label_2"]]} if "label_2" in row.extra else {}),
            )
            for row in self.rows
        ]  # fmt: skip
        return replace(self, rows=tuple(rows), classes=classes)

    def where(self, wanted: Callable[[Row], bool]) -> "Table":
        """The table of the rows that `wanted` is true for."""
        return replace(self, rows=tuple(filter(wanted, self.rows)), missing=())

    def name(self, index: int) -> str:
        """The path to show for a row."""
        return os.fspath(self.rows[index].path)

    def read(self, index: int, **window) -> Clip:
        """`avfusion.read_clip` for a row, whatever kind of files it has. Raises `ClipError`."""
        row = self.rows[index]
        return read_clip(row.path, **window) if row.audio is None else read_stills(row.path, row.audio, **window)


def read_whole_row(row: Row, *, frame_rate: float, sample_rate: int, transform: Callable) -> tuple[list, Tensor]:
    """`avfusion.media.reader.read_whole` for a row, whatever kind of files it has. Raises `ClipError`."""
    if row.audio is None:
        return read_whole(row.path, frame_rate=frame_rate, sample_rate=sample_rate, transform=transform)
    return read_whole_stills(row.path, row.audio, sample_rate=sample_rate, transform=transform)


class Found:
    """What a list of clips comes to: rows of those that are there, and the ids of those that are not."""

    def __init__(self):
        self.rows: list[Row] = []
        self.missing: list[str] = []
        self.listed, self.lacking = Counter(), Counter()  # clips by the name of their class

    def add(self, key: str, path: Path | None, of: str | None = None, **facts) -> None:
        """A clip of the list, of the class `of`; `path` is None where it is not there, `facts` are of its row."""
        self.listed[of] += 1
        if path is None:
            self.missing.append(key)
            self.lacking[of] += 1
        else:
            self.rows.append(Row(key, path, **facts))

    def table(self, layout: str, root: Path, classes: Iterable[str] = ()) -> Table:
        """Warns, and names the classes, where some clips are there and more than 1 % are not."""
        lost, listed = len(self.missing), self.listed.total()
        if self.rows and lost > 0.01 * listed:
            ranked = sorted(
                self.lacking, key=lambda name: (self.lacking[name] < self.listed[name], -self.lacking[name])
            )
            told = [f"{self.lacking[name]} of {self.listed[name]} of {name!r}" for name in ranked if name is not None]
            more = f", ... ({len(told)} classes)" if len(told) > NAMED else ""
            warnings.warn(
                f"{root}: {lost:,} of {listed:,} clips of {layout} are not there ({lost / listed:.1%})"
                + (f": {', '.join(told[:NAMED])}{more}" if told else f", for instance {self.missing[0]}"),
                stacklevel=2,
            )
        return Table(layout, root, tuple(self.rows), tuple(classes), tuple(self.missing))


NAMED = 12  # classes that a warning names


def csv_rows(
    path: Path, columns: str, *, header: bool = False, comment: str | None = None, loose: bool = False
) -> Iterator[tuple[str, list]]:
    """ "file:line" and the fields of each row of a CSV file, which has exactly these columns.

    `loose`: commas in the last column stand without quotes, as in some published lists.
    """
    names = columns.split(",")
    if not path.is_file():
        raise LayoutError(f"{path}: no such file; expected the columns {columns}")
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, skipinitialspace=not loose, strict=True)
        try:
            for fields in reader:
                where = f"{path}:{reader.line_num}"
                if not fields or (comment and fields[0].startswith(comment)):
                    continue
                if loose and len(fields) > len(names):
                    fields[len(names) - 1 :] = [",".join(fields[len(names) - 1 :])]
                if len(fields) != len(names):
                    raise LayoutError(f"{where}: {len(fields)} fields, expected the {len(names)} columns {columns}")
                if header:
                    if fields != names:
                        raise LayoutError(f"{where}: the header is {','.join(fields)}, expected {columns}")
                    header = False
                    continue
                yield where, fields
        except (csv.Error, UnicodeDecodeError) as error:
            raise LayoutError(f"{path}:{reader.line_num}: {error}") from error


def first_file(folder: Path, *names: str) -> Path:
    """The first of these files that is there; where none is, the first, for the message."""
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def read_json(path: Path) -> Any:
    """Raises LayoutError where there is none, or `avfusion.files` refuses it."""
    try:
        return files.read_json(path)
    except FileNotFoundError:
        raise LayoutError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise LayoutError(str(error)) from error


def clipped_box(corners: Any, where: str) -> tuple[Box, bool]:
    """A box cut to the picture, as published evaluations cut it, and whether that changed it.

    One that ends before it begins is left empty.
    """
    try:
        corners = tuple(map(float, corners))
        if len(corners) != 4 or any(map(math.isnan, corners)):
            raise ValueError
    except (TypeError, ValueError):
        raise LayoutError(f"{where}: {corners!r} is no box of four numbers") from None
    x0, y0, x1, y1 = (min(max(corner, 0.0), 1.0) for corner in corners)
    box = (x0, y0, max(x0, x1), max(y0, y1))
    return box, box != corners


def warn_of_boxes(path: Path, cut: int) -> None:
    if cut:
        warnings.warn(f"{path}: {cut} box{'es reach' if cut > 1 else ' reaches'} out of the picture, cut to it, as "
                      "published evaluations do", stacklevel=2)  # fmt: skip


def folder_name(label: str) -> str:
    """A class's name as the DeepAVFusion release spells its folder: space, parentheses and comma become _."""
    return re.sub(r"[ (),]", "_", label)


def spelling(name: str) -> str:
    """What all published spellings of a class's name have in common."""
    return re.sub(r"[ (),_+]+", "_", name).strip("_")


def folders_by_spelling(parent: Path) -> dict[str, list[Path]]:
    """The entries of a directory by the `spelling` of their names."""
    found: dict[str, list[Path]] = {}
    for name in _names(parent):
        found.setdefault(spelling(name), []).append(parent / name)
    return found


def parse_seconds(text: str, where: str) -> int:
    try:
        seconds = float(text)
        if not 0 <= seconds < 1e6:
            raise ValueError
    except ValueError:
        raise LayoutError(f"{where}: {text!r} is no time in seconds") from None
    return int(seconds)


def plain_name(text: str, where: str) -> str:
    """A name from an annotation file that becomes part of a path: it must not lead anywhere else."""
    if not text or text in (".", "..") or any(c in text for c in "/\\\0"):
        raise LayoutError(f"{where}: {text!r} is not the plain name of a file, it would point outside the data set")
    return text


def one_of(text: str, allowed: Iterable[str], what: str, where: str) -> str:
    if text not in allowed:
        some = sorted(allowed)
        listed = ", ".join(some[:8]) + (f", ... ({len(some)} in all)" if len(some) > 8 else "")
        raise LayoutError(f"{where}: {what} {text!r}, expected one of {listed}")
    return text


def parse_key(text: str, where: str) -> tuple[str, int]:
    """Id and start of what is written as <id>_<start>."""
    video, _, start = text.rpartition("_")
    return plain_name(video, where), parse_seconds(start, where)


def check_split(split: str | None, splits: Iterable[str]) -> None:
    if split is not None and split not in splits:
        raise ValueError(unknown("split", split, [*splits, "all"]))


@cache
def _listing(folder: Path, modified: int) -> tuple[str, ...]:
    return tuple(sorted(os.listdir(folder)))


def _names(folder: Path) -> tuple[str, ...]:
    """What is in a folder, sorted; nothing where there is none."""
    # A listing a folder takes the place of a look-up a clip, of which large sets have millions.
    try:
        return _listing(folder, folder.stat().st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError):
        return ()


def find_clips(folder: Path, prefix: str, *exact: str) -> list[str]:
    """Names in a folder: the first of `exact` that is there, otherwise all that start with `prefix`, as .mp4."""
    names = _names(folder)
    for name in exact:
        at = bisect_left(names, name)
        if at < len(names) and names[at] == name:
            return [name]
    at, found = bisect_left(names, prefix), []
    while at < len(names) and names[at].startswith(prefix):
        if names[at].endswith(".mp4"):
            found.append(names[at])
        at += 1
    return found


def find_videos(folder: Path) -> list[Path]:
    """All video files under a folder, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
