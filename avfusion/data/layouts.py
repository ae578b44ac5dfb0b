"""The public data sets as they lie on disk, each read by one small function into the same table of clips.

`read(layout, root, split)` looks the function up. docs/data.md shows the folders that each layout expects.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from avfusion.common import unknown
from avfusion.data.pictures import avsbench, flickr_soundnet, stills
from avfusion.data.table import (
    Found,
    LayoutError,
    Row,
    Table,
    check_split,
    csv_rows,
    find_clips,
    find_videos,
    first_file,
    folders_by_spelling,
    one_of,
    parse_seconds,
    plain_name,
    read_json,
    spelling,
)
from avfusion.data.vggsound import SPLITS, vggsound, vggsound_instruments, vggsound_music, vggss

ORDERS = ("names", "folders")
NUMBERED = ("audioset", "avsbench")  # sets that number their classes themselves


def read(layout: str, root: str | os.PathLike, split: str | None = None, *, label_order: str = "names") -> Table:
    """The table of a data set that lies under `root` in one of `LAYOUTS`; `split` "all" or None takes all splits.

    Classes are numbered in the order of their names, or, by the `label_order` "folders", of the release's folders: in
    VGGSound that swaps two of them, the 36th and the 37th.

    Warns where more than 1 % of the clips are not there, and where boxes reach out of the picture.

    Raises:
        ValueError: there is no such layout, no such split in it, or no such order.
        LayoutError: an annotation file is missing or has a row that makes no sense or points outside `root`; none of
            the clips is there.
    """
    if layout not in LAYOUTS:
        raise ValueError(unknown("layout", layout, LAYOUTS))
    if label_order not in ORDERS:
        raise ValueError(unknown("label_order", label_order, ORDERS))
    if label_order == "folders" and layout in NUMBERED:
        raise ValueError(f"label_order='folders': the classes of {layout} are numbered as the set numbers them")
    root, split = Path(root), None if split == "all" else split
    if not root.is_dir():
        raise LayoutError(f"{root}: {'not a directory' if root.exists() else 'no such directory'}")
    table = LAYOUTS[layout](root, split)
    if not table.rows:
        raise LayoutError(
            f"{root}: none of the {len(table.missing):,} clips of {layout} is there"
            + (f", for instance {table.missing[0]}" if table.missing else "")
        )
    return table.in_order_of_folders() if label_order == "folders" else table


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
    found, columns = Found(), "YTID,start_seconds,end_seconds,positive_labels"
    for part in (split,) if split else AUDIOSET_SPLITS:
        for where, (video, *times, labels) in csv_rows(
            root / "annotations" / f"{part}_segments.csv", columns, comment="#"
        ):
            start, end = (parse_seconds(time, where) for time in times)
            key, folder = f"{plain_name(video, where)}_{start:06d}", root / "clips" / plain_name(video[:2], where)
            names = find_clips(folder, f"{key}_", f"{key}_{end:06d}.mp4")
            numbers = tuple(mids[one_of(mid.strip(), mids, "label", where)] for mid in labels.split(","))
            found.add(key, folder / names[0] if names else None, classes[numbers[0]], start=start, labels=numbers,
                      split=part)  # fmt: skip
    return found.table("audioset", root, classes)


Listed = tuple[str, str, list[str], str, str | None]  # where, id, instruments, solo or duet, split


def music(root: Path, split: str | None, *, layout: str = "music", solos: str = "MUSIC_solo", duets: bool = True
) -> Table:  # fmt: skip
    """Clips clips/<class>/<id>.*.mp4, each part of a video a row, of anno/music_{solo,duet}.csv (id, class, split).

    Or of the published anno/MUSIC_solo_videos.json, MUSIC21_solo_videos.json and MUSIC_duet_videos.json, which know no
    splits: as the release does, of the sorted videos that are there about 130 solos, evenly spaced, and 85 duets are
    for testing.
    """
    check_split(split, SPLITS)
    files = {"solo": f"{solos}_videos.json"} | ({"duet": "MUSIC_duet_videos.json"} if duets else {})
    lines: list[Listed] = []
    for kind, published in files.items():
        path = first_file(root / "anno", f"{solos.split('_')[0].lower()}_{kind}.csv", published)
        lines += _published_music(path, kind) if path.suffix == ".json" else _music_csv(path, kind)
    classes = sorted({name for _, _, names, _, _ in lines for name in names})
    index = {name: i for i, name in enumerate(classes)}
    folders = next((where for name in ("clips", "clips_360p_segm") if (where := folders_by_spelling(root / name))), {})

    there: dict[str, list[str]] = defaultdict(list)
    clips = {}
    for where, video, names, kind, _ in lines:
        clips[kind, video] = [
            folder / clip
            for folder in folders.get(spelling("_".join(names)), ())
            for clip in find_clips(folder, f"{plain_name(video, where)}.")
        ]
        if clips[kind, video]:
            there[kind].append(video)
    held_out = {kind: sorted(videos)[:: max(len(videos) // (130 if kind == "solo" else 85), 1)]
                for kind, videos in there.items()}  # fmt: skip
    found = Found()
    for _, video, names, kind, part in lines:
        part = part or ("test" if video in held_out.get(kind, ()) else "train")
        if split not in (None, part):
            continue
        labels = tuple(index[name] for name in names)
        for path in clips[kind, video] or [None]:
            found.add(path.name.removesuffix(".mp4") if path else video, path, " + ".join(names),
                      label=labels[0] if kind == "solo" else None, labels=labels, split=part,
                      extra={"kind": kind})  # fmt: skip
    return found.table(layout, root, classes)


def _music_csv(path: Path, kind: str) -> Iterator[Listed]:
    for where, (video, names, part) in csv_rows(path, "id,class,split", header=True):
        yield where, video, plain_name(names, where).split("+"), kind, one_of(part, SPLITS, "split", where)


def _published_music(path: Path, kind: str) -> Iterator[Listed]:
    try:
        for names, videos in read_json(path)["videos"].items():
            for video in videos:
                yield str(path), plain_name(video, str(path)), plain_name(names, str(path)).split(), kind, None
    except (TypeError, KeyError, AttributeError):
        raise LayoutError(f"{path}: expected an object with videos: lists of ids by instruments") from None


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
    "music-solo": partial(music, layout="music-solo", duets=False),
    "music21": partial(music, layout="music21", solos="MUSIC21_solo", duets=False),
    "avsbench": avsbench,
    "flickr-soundnet": flickr_soundnet,
    "stills": stills,
    "vggss": vggss,
    "folder": folder,
}
