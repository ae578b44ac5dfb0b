"""Public sets of pictures and sound files, annotated in the picture: masks (AVSBench) and boxes (Flickr-SoundNet)."""

from collections.abc import Callable
from pathlib import Path
from xml.etree.ElementTree import ParseError

import numpy as np
from defusedxml import DefusedXmlException, ElementTree
from PIL import Image

from avfusion.data.table import (
    Box,
    Found,
    LayoutError,
    Row,
    Table,
    check_split,
    clipped_box,
    csv_rows,
    one_of,
    parse_seconds,
    plain_name,
    read_json,
    warn_of_boxes,
)
from avfusion.data.vggsound import SPLITS, read_vggss
from avfusion.files import XML_BYTES, check_size
from avfusion.media.limits import check_pixels
from avfusion.media.stills import PICTURE_ERRORS

AVSBENCH = ("v1s", "v1m", "v2")  # its subsets


def avsbench(root: Path, split: str | None) -> Table:
    """metadata.csv, label2idx.json and <subset>/<uid>/{audio.wav, frames/N.jpg, labels_semantic/N.png}.

    Classes are numbered as the masks are, from 0 for the background; label2idx.json may count from 1, or from 0.
    `extra["listed"]` are the classes that the clip's own list names.
    """
    splits = ("train", "val", "test")
    check_split(split, splits)
    index, found = _classes(root / "label2idx.json"), Found()
    columns = "vid,uid,s_min,s_sec,a_obj,split,label"
    for where, (_, uid, s_min, s_sec, sounding, part, subset) in csv_rows(root / "metadata.csv", columns, header=True):
        if split in (None, one_of(part, splits, "split", where)):
            one_of(subset, AVSBENCH, "label", where)
            folder = root / subset / plain_name(uid, where)
            listed = [index[name] for name in sounding.replace("off-the-screen", "background").split("_")
                      if name in index]  # fmt: skip
            there = (folder / "audio.wav").is_file() and (folder / "frames").is_dir()
            start = 60 * parse_seconds(s_min, where) + parse_seconds(s_sec, where)
            found.add(
                f"{subset}/{uid}", folder / "frames" if there else None, subset, start=start,
                label=index.get(sounding), split=part, audio=folder / "audio.wav",
                extra={"subset": subset, "a_obj": sounding, "listed": listed},
            )  # fmt: skip
    return found.table("avsbench", root, sorted(index, key=index.get))


def _classes(path: Path) -> dict[str, int]:
    """The numbers of classes in masks."""
    index = read_json(path)
    numbers = list(index.values()) if isinstance(index, dict) else []
    numbers = sorted(numbers) if all(type(number) is int for number in numbers) else []
    if not numbers or numbers[0] not in (0, 1) or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise LayoutError(f"{path}: expected class names and the numbers from 0 or from 1 on, each once")
    return {name: number - numbers[0] for name, number in index.items()}


def mask_files(row: Row) -> dict[int, Path]:
    """The masks of an AVSBench clip: second -> file. Not every second has to be annotated."""
    files = (row.path.parent / "labels_semantic").glob("*.png")
    return {int(path.stem): path for path in sorted(files, key=lambda path: int(path.stem))}


def read_mask(path: Path) -> np.ndarray:
    """Class indices [H, W] uint8. Raises `LayoutError` where the file is no picture of class indices."""
    try:
        with Image.open(path) as image:
            check_pixels(str(path), *image.size)
            mask = np.asarray(image)
    except PICTURE_ERRORS as error:
        raise LayoutError(f"{path}: {error}") from error
    if mask.ndim != 2:
        raise LayoutError(f"{path}: a picture in colours, expected one channel of class indices")
    return mask


def semantic_masks(row: Row) -> dict[int, np.ndarray]:
    """The masks of an AVSBench clip as `read_mask` reads them, by second."""
    return {second: read_mask(path) for second, path in mask_files(row).items()}


def flickr_soundnet(root: Path, split: str | None) -> Table:
    """frames/ID.jpg, audio/ID.wav, Annotations/ID.xml with several people's boxes; flickr_{train,test}.{txt,csv}.

    The published flickr_test.csv has a second column, a time in the video that the frame was taken from.
    """
    cut = 0

    def boxes(key: str) -> dict:
        nonlocal cut
        annotation = root / "Annotations" / f"{key}.xml"
        if not annotation.is_file():
            return {}
        found = _flickr_boxes(annotation)
        cut += sum(changed for _, changed in found)
        return {"boxes": tuple(box for box, _ in found)}

    table = _stills("flickr-soundnet", root, split, "flickr", boxes)
    warn_of_boxes(root / "Annotations", cut)
    return table


def stills(root: Path, split: str | None) -> Table:
    """frames/ID.jpg, audio/ID.wav and lists NAME_{train,test}.{txt,csv}: an id, and a class or a time where there is
    one. So EZ-VSL and its successors publish their benchmarks. Boxes are those of vggss.json, where it is there.
    """
    path, boxes = root / "vggss.json", {}
    if path.is_file():
        boxes = {key: {"boxes": found} for _, key, _, found in read_vggss(path)}
    return _stills("stills", root, split, "*", lambda key: boxes.get(key, {}))


def _stills(layout: str, root: Path, split: str | None, name: str, boxes: Callable[[str], dict]) -> Table:
    lists = {}
    for part in SPLITS:
        files = sorted({*root.glob(f"{name}_{part}.txt"), *root.glob(f"{name}_{part}.csv")})
        if len(files) > 1:
            raise LayoutError(f"{files[0]}, {files[1].name}: two lists of the split {part}; keep one of them there")
        if files:
            with open(files[0], encoding="utf-8-sig", errors="replace") as file:
                columns = "id,class" if "," in file.readline() else "id"
            lists[part] = [(where, plain_name(key, where), *rest)
                           for where, (key, *rest) in csv_rows(files[0], columns, loose=True)]  # fmt: skip
    check_split(split, lists)
    if not lists:
        lists = {None: [(str(root), path.stem) for path in sorted((root / "frames").glob("*.jpg"))]}
    seconds = all(_number(value) for lines in lists.values() for _, _, *rest in lines for value in rest)
    classes = [] if seconds else sorted({value for lines in lists.values() for _, _, *rest in lines for value in rest})
    index, found = {label: i for i, label in enumerate(classes)}, Found()
    for part, lines in lists.items():
        for where, key, *rest in lines if split in (None, part) else ():
            frame, audio = root / "frames" / f"{key}.jpg", root / "audio" / f"{key}.wav"
            there, label = frame.is_file() and audio.is_file(), rest[0] if rest and not seconds else None
            found.add(
                key, frame if there else None, label, start=parse_seconds(rest[0], where) if rest and seconds else None,
                label=index.get(label), split=part, audio=audio, extra=boxes(key) if there else {},
            )  # fmt: skip
    return found.table(layout, root, classes)


def _number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()


FLICKR_SIZE = 256  # the boxes are in pixels of a frame of 256 x 256


def _flickr_boxes(path: Path) -> list[tuple[Box, bool]]:
    try:
        check_size(path, XML_BYTES)
    except ValueError as error:
        raise LayoutError(str(error)) from error
    try:
        boxes = [
            [int(box.findtext(corner)) / FLICKR_SIZE for corner in ("xmin", "ymin", "xmax", "ymax")]
            for box in ElementTree.parse(path).getroot().iter("bbox")
        ]
    except (ParseError, DefusedXmlException, LookupError) as error:  # of an encoding that is none
        raise LayoutError(f"{path}: no well-formed annotation: {error}") from error
    except (TypeError, ValueError):
        raise LayoutError(f"{path}: a bbox without the whole numbers xmin, ymin, xmax, ymax") from None
    return [clipped_box(box, str(path)) for box in boxes]
