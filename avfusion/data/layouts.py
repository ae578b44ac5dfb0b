"""The public data sets as they lie on disk, each read by one small function into the same table of clips.

`read(layout, root, split)` looks the function up. docs/data.md shows the folders that each layout expects.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

import numpy as np
from defusedxml import DefusedXmlException, ElementTree
from PIL import Image

from avfusion.common import unknown
from avfusion.data.table import (
    LayoutError,
    Row,
    Table,
    check_split,
    csv_rows,
    find_clips,
    find_videos,
    one_of,
    parse_key,
    parse_seconds,
    plain_name,
)

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in fractions of the picture's width and height


def read(layout: str, root: str | os.PathLike, split: str | None = None) -> Table:
    """The table of a data set that lies under `root` in one of `LAYOUTS`; `split` "all" or None takes all splits.

    Raises:
        ValueError: there is no such layout, or no such split in it.
        LayoutError: an annotation file is missing or has a row that makes no sense or points outside `root`; none of
            the clips is there.
    """
    if layout not in LAYOUTS:
        raise ValueError(unknown("layout", layout, LAYOUTS))
    root, split = Path(root), None if split == "all" else split
    if not root.is_dir():
        raise LayoutError(f"{root}: {'not a directory' if root.exists() else 'no such directory'}")
    table = LAYOUTS[layout](root, split)
    if not table.rows:
        raise LayoutError(
            f"{root}: none of the {len(table.missing):,} clips of {layout} is there"
            + (f", for instance {table.missing[0]}" if table.missing else "")
        )
    return table


def _vggsound_clip(root: Path, video: str, start: int, label: str, where: str) -> Path | None:
    folder = root / "clips" / plain_name(label.replace(" ", "_"), where)
    names = find_clips(folder, f"{video}_{start:06d}_", f"{video}_{start:06d}_{start + 10:06d}.mp4")
    return folder / names[0] if names else None


def _vggsound_list(root: Path) -> Iterator[tuple[str, str, int, str, str]]:
    for where, (video, start, label, split) in csv_rows(root / "annotations" / "vggsound.csv", "id,start,label,split"):
        yield where, plain_name(video, where), parse_seconds(start, where), label, one_of(split, SPLITS, "split", where)


SPLITS = ("train", "test")


def vggsound(root: Path, split: str | None) -> Table:
    """annotations/vggsound.csv and clips/<label with _>/<id>_<start>_<end>.mp4."""
    check_split(split, SPLITS)
    lines = list(_vggsound_list(root))
    classes = sorted({label for *_, label, _ in lines})
    index = {name: i for i, name in enumerate(classes)}
    rows, missing = [], []
    for where, video, start, label, part in lines:
        if split in (None, part):
            key, path = f"{video}_{start:06d}", _vggsound_clip(root, video, start, label, where)
            rows += [Row(key, path, start, index[label], split=part)] if path else []
            missing += [] if path else [key]
    return Table("vggsound", root, tuple(rows), tuple(classes), tuple(missing))


def _vggsound_subset(name: str, root: Path, split: str | None) -> Table:
    """annotations/<name>_{train,test}.csv, lines "<id>_<start>,<class>"; annotations/<name>_pairs.csv, two to mix."""
    check_split(split, (*SPLITS, "pairs"))
    folders = {(video, start): label for _, video, start, label, _ in _vggsound_list(root)}

    def clip(key: str, label: str, where: str) -> tuple[str, int, Path | None]:
        video, start = parse_key(key, where)
        path = _vggsound_clip(root, video, start, folders.get((video, start), label), where)
        return f"{video}_{start:06d}", start, path

    prefix, rows, missing = root / "annotations" / name.replace("-", "_"), [], []
    lists = {part: list(csv_rows(Path(f"{prefix}_{part}.csv"), "key,class")) for part in SPLITS}
    classes = sorted({label for lines in lists.values() for _, (_, label) in lines})
    index = {label: i for i, label in enumerate(classes)}
    for part, lines in lists.items() if split != "pairs" else ():
        for where, (key, label) in lines if split in (None, part) else ():
            key, start, path = clip(key, label, where)
            rows += [Row(key, path, start, index[label], split=part)] if path else []
            missing += [] if path else [key]
    if split == "pairs":
        columns = "source_1,source_2,class_1,class_2,sep_type"
        for where, (*keys, label_1, label_2, kind) in csv_rows(Path(f"{prefix}_pairs.csv"), columns, header=True):
            labels = tuple(index[one_of(label, index, "class", where)] for label in (label_1, label_2))
            (key_1, start, path_1), (key_2, _, path_2) = map(clip, keys, (label_1, label_2), (where, where))
            key = f"{key_1}+{key_2}"
            if path_1 and path_2:
                other = {"path_2": path_2, "label_2": labels[1], "sep_type": kind}
                rows.append(Row(key, path_1, start, labels[0], labels, split, extra=other))
            else:
                missing.append(key)
    return Table(name, root, tuple(rows), tuple(classes), tuple(missing))


def vggsound_music(root: Path, split: str | None) -> Table:
    return _vggsound_subset("vggsound-music", root, split)


def vggsound_instruments(root: Path, split: str | None) -> Table:
    return _vggsound_subset("vggsound-instruments", root, split)


AUDIOSET_SPLITS = ("balanced_train", "unbalanced_train", "eval")


def audioset(root: Path, split: str | None) -> Table:
    """annotations/<split>_segments.csv and clips/<id[:2]>/<id>_<start>_<end>.mp4; several labels a clip."""
    check_split(split, AUDIOSET_SPLITS)
    mids, classes = {}, []
    for where, (number, mid, name) in csv_rows(
        root / "annotations" / "class_labels_indices.csv", "index,mid,display_name", header=True
    ):
        if number != str(len(mids)):
            raise LayoutError(f"{where}: index {number}, expected {len(mids)}")
        mids[mid] = len(mids)
        classes.append(name)
    rows, missing, columns = [], [], "YTID,start_seconds,end_seconds,positive_labels"
    for part in (split,) if split else AUDIOSET_SPLITS:
        for where, (video, *times, labels) in csv_rows(
            root / "annotations" / f"{part}_segments.csv", columns, comment="#"
        ):
            start, end = (parse_seconds(time, where) for time in times)
            key, folder = f"{plain_name(video, where)}_{start:06d}", root / "clips" / plain_name(video[:2], where)
            names = find_clips(folder, f"{key}_", f"{key}_{end:06d}.mp4")
            found = tuple(mids[one_of(mid.strip(), mids, "label", where)] for mid in labels.split(","))
            rows += [Row(key, folder / names[0], start, labels=found, split=part)] if names else []
            missing += [] if names else [key]
    return Table("audioset", root, tuple(rows), tuple(classes), tuple(missing))


def music(root: Path, split: str | None) -> Table:
    """anno/music_solo.csv, anno/music_duet.csv and clips/<class>/<id>.*.mp4, each part of a video a row."""
    check_split(split, SPLITS)
    lists = {kind: list(csv_rows(root / "anno" / f"music_{kind}.csv", "id,class,split", header=True))
             for kind in ("solo", "duet")}  # fmt: skip
    classes = sorted({name for lines in lists.values() for _, (_, names, _) in lines for name in names.split("+")})
    index = {name: i for i, name in enumerate(classes)}
    rows, missing = [], []
    for kind, lines in lists.items():
        for where, (video, names, part) in lines:
            if split not in (None, one_of(part, SPLITS, "split", where)):
                continue
            folder, labels = root / "clips" / plain_name(names, where), tuple(index[name] for name in names.split("+"))
            clips = find_clips(folder, f"{plain_name(video, where)}.")
            for clip in clips:
                label = labels[0] if kind == "solo" else None
                rows.append(Row(clip[: -len(".mp4")], folder / clip, None, label, labels, part, extra={"kind": kind}))
            missing += [] if clips else [video]
    return Table("music", root, tuple(rows), tuple(classes), tuple(missing))


AVSBENCH_FRAMES = {"v1s": 5, "v1m": 5, "v2": 10}


def avsbench(root: Path, split: str | None) -> Table:
    """metadata.csv, label2idx.json and <subset>/<uid>/{audio.wav, frames/N.jpg, labels_semantic/N.png}."""
    splits = ("train", "val", "test")
    check_split(split, splits)
    index = _json(root / "label2idx.json")
    if not isinstance(index, dict) or sorted(index.values()) != list(range(len(index))):
        raise LayoutError(f"{root / 'label2idx.json'}: expected class names and the numbers from 0 on, each once")
    rows, missing = [], []
    columns = "vid,uid,s_min,s_sec,a_obj,split,label"
    for where, (_, uid, s_min, s_sec, sounding, part, subset) in csv_rows(root / "metadata.csv", columns, header=True):
        if split in (None, one_of(part, splits, "split", where)):
            one_of(subset, AVSBENCH_FRAMES, "label", where)
            folder = root / subset / plain_name(uid, where)
            extra = {"subset": subset, "a_obj": sounding}
            if (folder / "audio.wav").is_file() and (folder / "frames").is_dir():
                start = 60 * parse_seconds(s_min, where) + parse_seconds(s_sec, where)
                label, audio = index.get(sounding), folder / "audio.wav"
                rows.append(Row(f"{subset}/{uid}", folder / "frames", start, label, (), part, audio, extra))
            else:
                missing.append(f"{subset}/{uid}")
    return Table("avsbench", root, tuple(rows), tuple(sorted(index, key=index.get)), tuple(missing))


def mask_files(row: Row) -> dict[int, Path]:
    """The masks of an AVSBench clip: second -> file. Not every second has to be annotated."""
    files = (row.path.parent / "labels_semantic").glob("*.png")
    return {int(path.stem): path for path in sorted(files, key=lambda path: int(path.stem))}


def read_mask(path: Path) -> np.ndarray:
    """Class indices [H, W] uint8. Raises `LayoutError` where the file is no picture of class indices."""
    try:
        with Image.open(path) as image:
            mask = np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise LayoutError(f"{path}: {error}") from error
    if mask.ndim != 2:
        raise LayoutError(f"{path}: a picture in colours, expected one channel of class indices")
    return mask


def semantic_masks(row: Row) -> dict[int, np.ndarray]:
    """The masks of an AVSBench clip as `read_mask` reads them, by second."""
    return {second: read_mask(path) for second, path in mask_files(row).items()}


def flickr_soundnet(root: Path, split: str | None) -> Table:
    """frames/ID.jpg, audio/ID.wav, Annotations/ID.xml with several people's boxes; flickr_{train,test}.txt."""
    lists = {part: root / f"flickr_{part}.txt" for part in SPLITS if (root / f"flickr_{part}.txt").is_file()}
    check_split(split, lists)
    listed = {part: [plain_name(key, where) for where, (key,) in csv_rows(path, "id")] for part, path in lists.items()}
    if not listed:
        listed = {None: sorted(path.stem for path in (root / "frames").glob("*.jpg"))}
    rows, missing = [], []
    for part, keys in listed.items():
        for key in keys if split in (None, part) else ():
            frame, audio = root / "frames" / f"{key}.jpg", root / "audio" / f"{key}.wav"
            if frame.is_file() and audio.is_file():
                annotation = root / "Annotations" / f"{key}.xml"
                boxes = {"boxes": _flickr_boxes(annotation)} if annotation.is_file() else {}
                rows.append(Row(key, frame, split=part, audio=audio, extra=boxes))
            else:
                missing.append(key)
    return Table("flickr-soundnet", root, tuple(rows), (), tuple(missing))


FLICKR_SIZE = 256  # the boxes are in pixels of a frame of 256 x 256


def _flickr_boxes(path: Path) -> tuple[Box, ...]:
    try:
        boxes = [
            [int(box.findtext(corner)) / FLICKR_SIZE for corner in ("xmin", "ymin", "xmax", "ymax")]
            for box in ElementTree.parse(path).getroot().iter("bbox")
        ]
    except (ParseError, DefusedXmlException) as error:
        raise LayoutError(f"{path}: no well-formed annotation: {error}") from error
    except (TypeError, ValueError):
        raise LayoutError(f"{path}: a bbox without the whole numbers xmin, ymin, xmax, ymax") from None
    return tuple(_box(box, str(path)) for box in boxes)


def _box(corners: Any, where: str) -> Box:
    try:
        x0, y0, x1, y1 = map(float, corners)
    except (TypeError, ValueError):
        raise LayoutError(f"{where}: {corners!r} is no box of four numbers") from None
    if not (0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1):
        raise LayoutError(f"{where}: the box {corners} has no place in the picture")
    return x0, y0, x1, y1


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LayoutError(f"{path}: no such file") from None
    except ValueError as error:
        raise LayoutError(f"{path}: no valid JSON: {error}") from error


def vggss(root: Path, split: str | None) -> Table:
    """annotations/vggss.json, boxes for test clips of VGGSound, which lie as there."""
    check_split(split, ("test",))
    path = root / "annotations" / "vggss.json"
    entries = _json(path)
    folders = {(video, start): label for _, video, start, label, _ in _vggsound_list(root)}
    facts = []
    for number, entry in enumerate(entries):
        where = f"{path}: entry {number}"
        try:
            key, label, boxes = entry["file"], entry["class"], entry["bbox"]
        except (TypeError, KeyError):
            raise LayoutError(f"{where}: expected an object with file, class and bbox") from None
        facts.append((where, *parse_key(key, where), label, tuple(_box(box, where) for box in boxes)))
    classes = sorted({label for *_, label, _ in facts})
    index = {label: i for i, label in enumerate(classes)}
    rows, missing = [], []
    for where, video, start, label, boxes in facts:
        clip = _vggsound_clip(root, video, start, folders.get((video, start), label), where)
        key = f"{video}_{start:06d}"
        rows += [Row(key, clip, start, index[label], split="test", extra={"boxes": boxes})] if clip else []
        missing += [] if clip else [key]
    return Table("vggss", root, tuple(rows), tuple(classes), tuple(missing))


def folder(root: Path, split: str | None) -> Table:
    """Any directory of videos, without labels."""
    check_split(split, ())
    rows = [Row(path.relative_to(root).as_posix(), path) for path in find_videos(root)]
    return Table("folder", root, tuple(rows))


LAYOUTS: dict[str, Callable[[Path, str | None], Table]] = {
    "vggsound": vggsound,
    "vggsound-music": vggsound_music,
    "vggsound-instruments": vggsound_instruments,
    "audioset": audioset,
    "music": music,
    "avsbench": avsbench,
    "flickr-soundnet": flickr_soundnet,
    "vggss": vggss,
    "folder": folder,
}
