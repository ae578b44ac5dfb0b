"""Which classes of a clip are heard, seen or both: files as VGGSounder publishes them, a line a label.

    video_id,label,modality,background_music,static_image,voice_over        modality: A, V or AV

`avfusion synth --layout vggsound` writes such a file of its own clips, annotations/vggsounder.csv.
"""

from collections.abc import Collection, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from avfusion.data.table import LayoutError, Row, csv_rows, one_of

COLUMNS = "video_id,label,modality,background_music,static_image,voice_over"
PUBLISHED = "vggsounder"  # the labels in the package of that name

Tags = dict[str, dict[str, str]]  # of a clip's id, each label's modality


def read_tags(where: str) -> Tags:
    """The labels of the clips of a file, or, by the name vggsounder, of the installed package.

    Raises LayoutError where there is no such file or package, or a line is no label.
    """
    path, tags = Path(where), {}
    if where == PUBLISHED and not path.exists():
        spec = find_spec(PUBLISHED)
        if spec is None:
            raise LayoutError("vggsounder: its labels are in a package of that name: pip install vggsounder")
        path = Path(spec.origin).parent / "data" / "vggsounder+background-music.csv"
    for line, (clip, label, modality, *_) in csv_rows(path, COLUMNS, header=True):
        one_of(modality, ("A", "V", "AV"), "modality", line)
        if tags.setdefault(clip, {}).setdefault(label, modality) != modality:
            raise LayoutError(f"{line}: {label!r} of {clip} is {modality}, and {tags[clip][label]} above")
    return tags


def tag_matrix(tags: Tags, rows: Iterable[Row], classes: Sequence[str], modalities: Collection[str]) -> Tensor:
    """0 or 1, [rows, classes]: the labels whose modality is one of `modalities`.

    Raises LayoutError for a label that is none of the classes.
    """
    number = {name: i for i, name in enumerate(classes)}
    rows = list(rows)
    found = torch.zeros(len(rows), len(classes))
    for at, row in enumerate(rows):
        for label, modality in tags[row.id].items():
            if label not in number:
                raise LayoutError(f"{row.id}: the tag {label!r} is none of the {len(classes)} classes of the data set")
            if modality in modalities:
                found[at, number[label]] = 1
    return found
