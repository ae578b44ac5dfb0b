"""Split and annotation files as their authors publish them, and their traps.

What is copied small here always runs; whole lists lie beside the checkout, and tests of them skip where they do not.
"""

import csv
import json
import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avfusion import data
from avfusion.cli import main
from avfusion.data.table import clipped_box, folder_name

LISTS = Path(__file__).parents[4] / "shared" / "lists"
whole = pytest.mark.skipif(not LISTS.is_dir(), reason="the published lists are not here")
LABELS = ("cattle mooing", "cattle, bovinae cowbell", "police car (siren)", "female speech, woman speaking")


def released(label):
    """A folder as the authors' code spells it."""
    return label.replace(" ", "_").replace("(", "_").replace(")", "_").replace(",", "_")


SPELLINGS = {"plain": lambda label: label, "spaces": lambda label: label.replace(" ", "_"), "released": released}


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def write(root, files):
    for name, text in files.items():
        touch(root, name).joinpath(name).write_text(text)
    return root


def vggsound_list(root, clips, spell):
    """annotations/vggsound.csv of (key, label), and an empty file for each in the folder that `spell` names."""
    (root / "annotations").mkdir()
    with open(root / "annotations" / "vggsound.csv", "w", newline="") as file:
        csv.writer(file).writerows((key[:-7], int(key[-6:]), label, "test") for key, label in clips)
    return touch(root, *(f"clips/{spell(label)}/{key}_{int(key[-6:]) + 10:06d}.mp4" for key, label in clips))


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- VGGSound and VGG-SS ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelled", SPELLINGS)
@pytest.mark.usefixtures("no_warnings")
def test_folders_of_vggsound_are_found_in_every_published_spelling(tmp_path, spelled):
    clips = [(f"aaaaaaaaaa{i}_000030", label) for i, label in enumerate(LABELS)]
    table = data.read("vggsound", vggsound_list(tmp_path, clips, SPELLINGS[spelled]))
    assert len(table.rows) == 4
    assert not table.missing


def test_a_class_whose_folder_is_not_found_is_named(tmp_path, capsys):
    clips = [(f"aaaaaaaaa{i:02d}_000030", LABELS[i % 2]) for i in range(40)]
    root = vggsound_list(tmp_path, clips, lambda label: label.replace("cattle, bovinae", "cow"))
    message = r"20 of 40 clips of vggsound are not there \(50.0%\): 20 of 20 of 'cattle, bovinae cowbell'"
    with pytest.warns(UserWarning, match=message):
        table = data.read("vggsound", root)
    assert len(table.missing) == 20
    assert main(["shard", "vggsound", str(root), str(tmp_path / "out"), "--workers", "0"]) == 1  # they are empty files
    assert re.search(r"^avfusion shard: warning: .*" + message, capsys.readouterr().err, re.MULTILINE)


def test_labels_in_the_order_of_the_releases_folders(tmp_path):
    clips = [(f"aaaaaaaaaa{i}_000030", label) for i, label in enumerate(LABELS)]
    root = vggsound_list(tmp_path, clips, released)
    ours, theirs = (data.read("vggsound", root, label_order=order) for order in ("names", "folders"))
    assert ours.classes[:2] == ("cattle mooing", "cattle, bovinae cowbell")
    assert theirs.classes[:2] == ("cattle, bovinae cowbell", "cattle mooing")
    assert [folder_name(name) for name in theirs.classes] == sorted(map(released, LABELS))
    for table in (ours, theirs):
        assert [table.classes[row.label] for row in table.rows] == list(LABELS)
    assert ours.sha256 != theirs.sha256
    with pytest.raises(ValueError, match="label_order='folder': expected one of names, folders; did you mean folders"):
        data.read("vggsound", root, label_order="folder")
    with pytest.raises(ValueError, match="the classes of avsbench are numbered as the set numbers them"):
        data.read("avsbench", root, label_order="folders")


@pytest.mark.parametrize(
    ("corners", "expected"),
    [
        ((0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3, 0.4)),
        ((0.534375, 0.3375, -2.8823037615171176e16, 0.909375), (0.534375, 0.3375, 0.534375, 0.909375)),
        ((-0.5, 0, 1.5, 1), (0, 0, 1, 1)),
    ],
)
def test_boxes_are_cut_to_the_picture(corners, expected):
    assert clipped_box(corners, "here") == (expected, corners != expected)


def test_corrupt_boxes_of_vggss_are_cut_and_counted(tmp_path):
    corrupt = [0.384375, 0.859375, 0.696875, -2.8823037615171176e16]
    root = vggsound_list(tmp_path, [("aaaaaaaaaaa_000030", LABELS[0])], released)
    entry = {"file": "aaaaaaaaaaa_000030", "class": LABELS[0], "bbox": [corrupt, [0, 0, 0.5, 1]]}
    write(root, {"annotations/vggss.json": json.dumps([entry])})
    with pytest.warns(UserWarning, match=r"vggss\.json: 1 box reaches out of the picture, cut to it"):
        table = data.read("vggss", root)
    assert table.rows[0].extra["boxes"] == ((0.384375, 0.859375, 0.696875, 0.859375), (0, 0, 0.5, 1))


@whole
def test_vggss_whole(tmp_path):
    """5,158 clips, 12 corrupt boxes; 24 classes of VGGSound, and 496 of these clips, are in folders with odd names."""
    entries = json.loads((LISTS / "vggss.json").read_text())
    clips = [(entry["file"], entry["class"]) for entry in entries]
    root = vggsound_list(tmp_path, clips, released)
    (root / "annotations" / "vggss.json").write_text(json.dumps(entries))
    with pytest.warns(UserWarning, match="12 boxes reach out of the picture") as caught:
        table = data.read("vggss", root)
    assert len(caught) == 1
    assert (len(table.rows), len(table.classes), table.missing) == (5158, 221, ())
    assert sum(len(row.extra["boxes"]) for row in table.rows) == 5941
    odd = [label for label in table.classes if released(label) != label.replace(" ", "_")]
    assert len(odd) == 20
    assert sum(label in odd for _, label in clips) == 496
    ordered = table.in_order_of_folders()
    swapped = [name for i, name in enumerate(table.classes) if ordered.classes[i] != name]
    assert swapped == ["cattle mooing", "cattle, bovinae cowbell"]


# --- VGGSound-Music and -Instruments ----------------------------------------------------------------------------------


def test_pairs_of_vggsound_music_name_instruments_by_both_names(tmp_path):
    clips = [("aaaaaaaaaaa_000030", "playing violin, fiddle"), ("bbbbbbbbbbb_000030", "playing cello")]
    root = vggsound_list(tmp_path, clips, released)
    write(root, {
        "annotations/vggmusic_train.txt": "aaaaaaaaaaa_000030,violin\nbbbbbbbbbbb_000030,cello\n",
        "annotations/vggmusic_eval_ss.csv": "source_1,source_2,class_1,class_2,sep_type\n"
        'aaaaaaaaaaa_000030,bbbbbbbbbbb_000030,"violin,_fiddle",cello,Easy\n',
    })  # fmt: skip
    train, pairs = (data.read("vggsound-music", root, split) for split in ("train", "pairs"))
    assert train.classes == pairs.classes == ("cello", "violin")
    assert pairs.rows[0].labels == (1, 0)
    assert pairs.rows[0].extra["path_2"] == train.rows[1].path
    ordered = data.read("vggsound-music", root, "pairs", label_order="folders")
    assert (ordered.rows[0].labels, ordered.rows[0].extra["label_2"]) == ((1, 0), 0)
    with pytest.raises(data.LayoutError, match=r"vggsound_music_test\.csv: no such file"):
        data.read("vggsound-music", root, "test")


def test_classes_with_commas_stand_without_quotes_in_a_published_list(tmp_path):
    root = vggsound_list(tmp_path, [("aaaaaaaaaaa_000030", "playing violin, fiddle")], released)
    write(root, {"annotations/vgginstruments_train.txt": "aaaaaaaaaaa_000030,violin,_fiddle\n"})
    assert data.read("vggsound-instruments", root, "train").classes == ("violin",)


@whole
@pytest.mark.usefixtures("no_warnings")
def test_lists_of_vggsound_music_whole(tmp_path):
    """400 clips to train on, 1,201 pairs: 109 of these name an instrument by both of its names."""
    with open(LISTS / "vggmusic_eval_ss.csv", newline="") as file:
        pairs = list(csv.reader(file))[1:]
    train = [line.split(",", 1) for line in (LISTS / "vggmusic_train_first400.txt").read_text().splitlines()]
    clips = {key: label for one, two, *labels, _ in pairs for key, label in zip((one, two), labels, strict=True)}
    clips |= dict(train)
    spelled = {"violin": "violin, fiddle", "steel_guitar": "steel guitar, slide guitar"}
    names = {key: f"playing {spelled.get(label.split(',')[0], label.replace('_', ' '))}"
             for key, label in clips.items()}  # fmt: skip
    root = vggsound_list(tmp_path, list(names.items()), released)
    for name, published in (("vggmusic_train.txt", "vggmusic_train_first400.txt"),
                            ("vggmusic_eval_ss.csv", "vggmusic_eval_ss.csv")):  # fmt: skip
        (root / "annotations" / name).write_bytes((LISTS / published).read_bytes())
    assert len(data.read("vggsound-music", root, "train").rows) == 400
    table = data.read("vggsound-music", root, "pairs")
    assert (len(table.rows), table.missing) == (1201, ())
    assert Counter(row.extra["sep_type"] for row in table.rows) == {"Easy": 910, "Hard": 291}
    assert sum(any("," in label for label in labels) for _, _, *labels, _ in pairs) == 109
    assert len(table.classes) == 49
    assert not any("," in name for name in table.classes)


# --- MUSIC ------------------------------------------------------------------------------------------------------------


def test_published_lists_of_music(tmp_path):
    solo = {"videos": {"cello": [f"aaaaaaaa{i:03d}" for i in range(300)], "erhu": ["bbbbbbbbbbb"]}}
    duet = {"videos": {"cello erhu": ["ccccccccccc", "ddddddddddd"]}}
    files = {"MUSIC_solo": solo, "MUSIC_duet": duet, "MUSIC21_solo": solo}
    root = write(tmp_path, {f"anno/{name}_videos.json": json.dumps(content) for name, content in files.items()})
    touch(root, *(f"clips/cello/{video}.{part:06d}.mp4" for video in solo["videos"]["cello"] for part in range(2)),
          "clips/erhu/bbbbbbbbbbb.000000.mp4", "clips/cello_erhu/ccccccccccc.000000.mp4")  # fmt: skip
    table = data.read("music", root)
    assert (len(table.rows), table.classes, table.missing) == (602, ("cello", "erhu"), ("ddddddddddd",))
    assert table.rows[-1].labels == (0, 1)
    test = data.read("music-solo", root, "test")  # the release: every 301 // 130th of the sorted videos
    assert [row.id for row in test.rows[:4]] == [f"aaaaaaaa{i:03d}.{part:06d}" for i in (0, 2) for part in range(2)]
    assert len({row.id.split(".")[0] for row in test.rows}) == 151
    train = data.read("music-solo", root, "train")
    assert len(train.rows) + len(test.rows) == 601
    assert len(data.read("music21", root).rows) == 601
    assert {row.split for row in table.rows if row.extra["kind"] == "duet"} == {"test"}


# --- pictures and sound files -----------------------------------------------------------------------------------------


def flickr(root, boxes):
    touch(root, "frames/1.jpg", "audio/1.wav")
    corners = ("xmin", "ymin", "xmax", "ymax")
    text = "".join(
        "<bbox>" + "".join(f"<{k}>{v}</{k}>" for k, v in zip(corners, box, strict=True)) + "</bbox>" for box in boxes
    )
    return write(root, {"Annotations/1.xml": f"<annotation>{text}</annotation>"})


def test_flickr_list_has_two_columns_and_boxes_beyond_the_picture_are_cut(tmp_path):
    root = write(flickr(tmp_path, [(0, 0, 257, 128)]), {"flickr_test.csv": "1,202\n"})
    with pytest.warns(UserWarning, match="1 box reaches out of the picture"):
        table = data.read("flickr-soundnet", root, "test")
    assert (table.rows[0].start, table.rows[0].label, table.classes) == (202, None, ())
    assert table.rows[0].extra["boxes"] == ((0, 0, 1, 0.5),)


@whole
@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize(
    ("name", "layout", "count", "classes"),
    [
        ("flickr_test", "flickr-soundnet", 250, 0),
        ("vgginstruments_test", "stills", 446, 0),
        ("music_duet_test", "stills", 1020, 0),
        ("avsbench_test", "stills", 3700, 23),
        ("vggsound_test", "stills", 15446, 309),
    ],
)
def test_lists_of_pictures_whole(tmp_path, name, layout, count, classes):
    path = LISTS / f"{name}.csv"
    keys = [line.split(",")[0] for line in path.read_text().splitlines()]
    root = touch(tmp_path, *(f"{kind}" for key in keys for kind in (f"frames/{key}.jpg", f"audio/{key}.wav")))
    (root / path.name).write_bytes(path.read_bytes())
    table = data.read(layout, root, "test")
    assert (len(table.rows), table.missing, len(table.classes)) == (count, (), classes)
    assert len(set(keys)) == count


def test_a_list_of_pictures_may_name_classes(tmp_path):
    root = touch(tmp_path, "frames/a_1.jpg", "audio/a_1.wav", "frames/b_2.jpg", "audio/b_2.wav")
    box = {"file": "b_2", "class": "dog", "bbox": [[0, 0, 0.5, 1]]}
    write(root, {"vggss_test.csv": "a_1,female_speech,_woman_speaking\nb_2,dog\n", "vggss.json": json.dumps([box])})
    table = data.read("stills", root)
    assert table.classes == ("dog", "female_speech,_woman_speaking")
    assert [(row.id, row.label, row.split, row.extra) for row in table.rows] == [
        ("a_1", 1, "test", {}), ("b_2", 0, "test", {"boxes": ((0, 0, 0.5, 1),)}),
    ]  # fmt: skip


def test_one_list_of_pictures_may_name_classes_and_another_none(tmp_path):
    """As those of VGG-Instruments: classes to train on, and none of the test clips."""
    root = touch(tmp_path, "frames/a_1.jpg", "audio/a_1.wav", "frames/sample0000.jpg", "audio/sample0000.wav")
    write(root, {"vgginstruments_train.txt": "a_1,violin,_fiddle\n", "vgginstruments_test.csv": "sample0000\n"})
    assert [(row.id, row.label, row.split) for row in data.read("stills", root).rows] == [
        ("a_1", 0, "train"), ("sample0000", None, "test"),
    ]  # fmt: skip


AVS = "vid,uid,s_min,s_sec,a_obj,split,label\n"


def avsbench(root, first):
    """A clip with a man (2) who sounds and, in one frame, a dog (1) that the list does not name."""
    write(root, {
        "metadata.csv": AVS + "v,u,0,0,man_off-the-screen,test,v2\n",
        "label2idx.json": json.dumps({"background": first, "dog": first + 1, "man": first + 2}),
    })  # fmt: skip
    touch(root, "v2/u/audio.wav", "v2/u/frames/0.jpg", "v2/u/labels_semantic/0.png")
    Image.fromarray(np.array([[0, 1, 2]], np.uint8)).save(root / "v2/u/labels_semantic/0.png")
    return root


@pytest.mark.parametrize("first", [0, 1])
def test_published_numbers_of_avsbench_begin_with_one_and_those_of_masks_with_zero(tmp_path, first):
    table = data.read("avsbench", avsbench(tmp_path, first))
    assert table.classes == ("background", "dog", "man")
    assert table.rows[0].extra["listed"] == [2, 0]
    assert data.semantic_masks(table.rows[0])[0].tolist() == [[0, 1, 2]]
