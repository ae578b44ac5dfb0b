"""VGGSound, and the public sets that are made of its clips."""

from collections.abc import Iterator
from pathlib import Path

from avfusion.data.table import (
    Found,
    LayoutError,
    Table,
    check_split,
    clipped_box,
    csv_rows,
    find_clips,
    first_file,
    folders_by_spelling,
    one_of,
    parse_key,
    parse_seconds,
    plain_name,
    read_json,
    spelling,
    warn_of_boxes,
)

SPLITS = ("train", "test")


class _Clips:
    """annotations/vggsound.csv, and the clips in clips/<label>/<id>_<start>_<end>.mp4.

    Folders may spell labels in any of the published ways: as they are, with _ for spaces, or, as the DeepAVFusion
    release, with _ for each of space, parentheses and comma.
    """

    def __init__(self, root: Path):
        self.folders, path = folders_by_spelling(root / "clips"), root / "annotations" / "vggsound.csv"
        self.list = [
            (plain_name(video, where), parse_seconds(start, where), plain_name(label, where),
             one_of(split, SPLITS, "split", where))
            for where, (video, start, label, split) in csv_rows(path, "id,start,label,split")
        ]  # fmt: skip
        self.labels = {(video, start): label for video, start, label, _ in self.list}

    def find(self, video: str, start: int, label: str) -> Path | None:
        """The clip of this class, or of the one that the list gives it."""
        label = self.labels.get((video, start), label)
        for folder in self.folders.get(spelling(label), ()):
            names = find_clips(folder, f"{video}_{start:06d}_", f"{video}_{start:06d}_{start + 10:06d}.mp4")
            if names:
                return folder / names[0]
        return None


def vggsound(root: Path, split: str | None) -> Table:
    """annotations/vggsound.csv and clips/<label>/<id>_<start>_<end>.mp4."""
    check_split(split, SPLITS)
    clips, found = _Clips(root), Found()
    classes = sorted({label for _, _, label, _ in clips.list})
    index = {name: i for i, name in enumerate(classes)}
    for video, start, label, part in clips.list:
        if split in (None, part):
            path = clips.find(video, start, label)
            found.add(f"{video}_{start:06d}", path, label, start=start, label=index[label], split=part)
    return found.table("vggsound", root, classes)


# Published lists call two instruments by both of their names, in some places.
ALIASES = {"steel_guitar,_slide_guitar": "steel_guitar", "steel_guitar__slide_guitar": "steel_guitar",
           "violin,_fiddle": "violin", "violin__fiddle": "violin"}  # fmt: skip


def _subset(name: str, published: str, root: Path, split: str | None) -> Table:
    """annotations/<name>_{train,test}.csv, lines "<id>_<start>,<class>"; annotations/<name>_pairs.csv, two to mix.

    Or the lists that the DeepAVFusion release publishes: <published>_train.txt and <published>_eval_ss.csv.
    """
    check_split(split, (*SPLITS, "pairs"))
    clips, found, folder, prefix = _Clips(root), Found(), root / "annotations", name.replace("-", "_")
    files = {
        "train": first_file(folder, f"{prefix}_train.csv", f"{published}_train.txt"),
        "test": first_file(folder, f"{prefix}_test.csv"),
        "pairs": first_file(folder, f"{prefix}_pairs.csv", f"{published}_eval_ss.csv"),
    }

    def read_list(part: str) -> Iterator[tuple[str, str, str]]:
        if files[part].is_file() or part == (split or "train"):
            for where, (key, label) in csv_rows(files[part], "key,class", loose=True):
                yield where, key, ALIASES.get(label, label)

    def read_pairs() -> Iterator[tuple[str, list[str], list[str], str]]:
        columns = "source_1,source_2,class_1,class_2,sep_type"
        if files["pairs"].is_file() or split == "pairs":
            for where, (*keys, label_1, label_2, kind) in csv_rows(files["pairs"], columns, header=True):
                yield where, keys, [ALIASES.get(label, label) for label in (label_1, label_2)], kind

    lists, pairs = {part: list(read_list(part)) for part in SPLITS}, list(read_pairs())
    classes = sorted({label for lines in lists.values() for *_, label in lines}
                     | {label for _, _, labels, _ in pairs for label in labels})  # fmt: skip
    index = {label: i for i, label in enumerate(classes)}

    def clip(key: str, label: str, where: str) -> tuple[str, int, Path | None]:
        video, start = parse_key(key, where)
        return f"{video}_{start:06d}", start, clips.find(video, start, f"playing_{label}")

    for part, lines in lists.items() if split != "pairs" else ():
        for where, key, label in lines if split in (None, part) else ():
            key, start, path = clip(key, label, where)
            found.add(key, path, label, start=start, label=index[label], split=part)
    for where, keys, labels, kind in pairs if split == "pairs" else ():
        (key_1, start, path_1), (key_2, _, path_2) = map(clip, keys, labels, (where, where))
        first, second = (index[label] for label in labels)
        other = {"path_2": path_2, "label_2": second, "sep_type": kind}
        found.add(f"{key_1}+{key_2}", path_1 if path_2 else None, " + ".join(labels), start=start, label=first,
                  labels=(first, second), split=split, extra=other)  # fmt: skip
    return found.table(name, root, classes)


def vggsound_music(root: Path, split: str | None) -> Table:
    return _subset("vggsound-music", "vggmusic", root, split)


def vggsound_instruments(root: Path, split: str | None) -> Table:
    return _subset("vggsound-instruments", "vgginstruments", root, split)


def read_vggss(path: Path) -> list[tuple[str, str, str, tuple]]:
    """What vggss.json says: where an entry is, its file, its class and its boxes, cut to the picture."""
    facts, cut = [], 0
    entries = read_json(path)
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        where = f"{path}: entry {number}"
        try:
            key, label, boxes = str(entry["file"]), str(entry["class"]), list(entry["bbox"])
        except (TypeError, KeyError):
            raise LayoutError(f"{where}: expected an object with file, class and bbox") from None
        boxes = [clipped_box(box, where) for box in boxes]
        cut += sum(changed for _, changed in boxes)
        facts.append((where, key, label, tuple(box for box, _ in boxes)))
    warn_of_boxes(path, cut)
    return facts


def vggss(root: Path, split: str | None) -> Table:
    """annotations/vggss.json, boxes for test clips of VGGSound, which lie as there."""
    check_split(split, ("test",))
    clips, found, facts = _Clips(root), Found(), read_vggss(root / "annotations" / "vggss.json")
    classes = sorted({label for _, _, label, _ in facts})
    index = {label: i for i, label in enumerate(classes)}
    for where, key, label, boxes in facts:
        video, start = parse_key(key, where)
        path = clips.find(video, start, label)
        found.add(f"{video}_{start:06d}", path, label, start=start, label=index[label], split="test",
                  extra={"boxes": boxes})  # fmt: skip
    return found.table("vggss", root, classes)
