"""Public data sets as they lie on disk: what is found, what is missing, and which line is at fault."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from made_clips import noise, number, picture, write_clip
from PIL import Image

from avfusion import ClipError, data

pytestmark = pytest.mark.filterwarnings("ignore:.* are not there")  # in sets of two clips
A, B, C = "aaaaaaaaaa1", "-b_bbbbbbb2", "ccccccccc_3"


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return Path(
        write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", seconds=1.5, fps=10, rate=16000, layout="mono")
    )


@pytest.fixture
def write(tmp_path, clip):
    """write({name: text or bytes or None for a clip}): files of a data set under tmp_path."""

    def files(contents):
        for name, content in contents.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                shutil.copy(clip, path)
            elif isinstance(content, np.ndarray):
                Image.fromarray(content).save(path)
            else:
                path.write_text(content)
        return tmp_path

    return files


def sound(path, seconds, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(rate, seconds), rate, subtype="FLOAT")


VGGSOUND = {
    "annotations/vggsound.csv": f'{A},30,"railroad car, train",train\n{B},0,cat meowing,test\n'
    f"{C},7,cat meowing,train\n",
    f"clips/railroad_car,_train/{A}_000030_000040.mp4": None,
    f"clips/cat_meowing/{B}_000000_000009.mp4": None,  # not the usual ten seconds
    f"clips/cat_meowing/{C}_000070_000080.mp4": None,  # of another time in the video
}


def facts(table):
    return [(row.id, row.path.relative_to(table.root).as_posix(), row.label, row.split) for row in table.rows]


# --- what is found ----------------------------------------------------------------------------------------------------


def test_vggsound(write):
    table = data.read("vggsound", write(VGGSOUND))
    assert table.classes == ("cat meowing", "railroad car, train")
    assert facts(table) == [
        (f"{A}_000030", f"clips/railroad_car,_train/{A}_000030_000040.mp4", 1, "train"),
        (f"{B}_000000", f"clips/cat_meowing/{B}_000000_000009.mp4", 0, "test"),
    ]
    assert [row.start for row in table.rows] == [30, 0]
    assert table.missing == (f"{C}_000007",)
    assert "2 of 3 clips found" in str(table)
    assert table.sha256 in str(table)
    test = data.read("vggsound", table.root, split="test")
    assert (facts(test), test.classes, test.missing) == (facts(table)[1:], table.classes, ())


def test_hash_is_of_what_was_found_and_not_of_where(write, tmp_path):
    table = data.read("vggsound", write(VGGSOUND))
    shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns("copy"))
    copy = data.read("vggsound", tmp_path / "copy")
    assert copy.sha256 == table.sha256
    (tmp_path / "copy" / facts(table)[0][1]).unlink()
    assert data.read("vggsound", tmp_path / "copy").sha256 != table.sha256
    assert table.where(lambda row: row.split == "test").sha256 == data.read("vggsound", tmp_path, "test").sha256


@pytest.mark.parametrize("layout", ["vggsound-music", "vggsound-instruments"])
def test_vggsound_lists_and_pairs(write, layout):
    prefix = f"annotations/{layout.replace('-', '_')}"
    lists = {
        f"{prefix}_train.csv": f"{A}_000030,train\n{C}_000007,cat\n",
        f"{prefix}_test.csv": f"{B}_0,cat\n",
        f"{prefix}_pairs.csv": "source_1,source_2,class_1,class_2,sep_type\n"
        f"{B}_000000,{A}_000030,cat,train,hetero\n{B}_000000,{C}_000007,cat,cat,homo\n",
    }
    root = write(VGGSOUND | lists)
    train, test, pairs = (data.read(layout, root, split) for split in ("train", "test", "pairs"))
    assert train.classes == test.classes == pairs.classes == ("cat", "train")
    assert facts(train) == [(f"{A}_000030", f"clips/railroad_car,_train/{A}_000030_000040.mp4", 1, "train")]
    assert train.missing == (f"{C}_000007",)
    assert facts(test) == [(f"{B}_000000", f"clips/cat_meowing/{B}_000000_000009.mp4", 0, "test")]
    (pair,) = pairs.rows
    assert (pair.path, pair.labels) == (test.rows[0].path, (0, 1))
    assert pair.extra == {"path_2": train.rows[0].path, "label_2": 1, "sep_type": "hetero"}
    assert pairs.missing == (f"{B}_000000+{C}_000007",)


AUDIOSET = {
    "annotations/class_labels_indices.csv": 'index,mid,display_name\n0,/m/09x0r,"Speech"\n'
    '1,/m/05zppz,"Male speech, man"\n',
    "annotations/balanced_train_segments.csv": "# Segments csv created\n# num_ytids=2\n# YTID, start_seconds, ...\n"
    f'{A}, 30.000, 40.000, "/m/05zppz,/m/09x0r"\n{B}, 0.000, 8.000, "/m/09x0r"\n',
    "annotations/unbalanced_train_segments.csv": "# a\n# b\n# c\n",
    "annotations/eval_segments.csv": f'# a\n# b\n# c\n{C}, 10.000, 20.000, "/m/09x0r"\n',
    f"clips/aa/{A}_000030_000040.mp4": None,
    f"clips/cc/{C}_000010_000020.mp4": None,
}


def test_audioset(write):
    table = data.read("audioset", write(AUDIOSET))
    assert table.classes == ("Speech", "Male speech, man")
    assert [(row.id, row.label, row.labels, row.split) for row in table.rows] == [
        (f"{A}_000030", None, (1, 0), "balanced_train"),
        (f"{C}_000010", None, (0,), "eval"),
    ]
    assert table.missing == (f"{B}_000000",)
    assert facts(data.read("audioset", table.root, "eval")) == facts(table)[1:]


def test_music(write):
    table = data.read(
        "music",
        write(
            {
                "anno/music_solo.csv": f"id,class,split\n{A},tuba,train\n{B},flute,test\n{C},flute,train\n",
                "anno/music_duet.csv": f"id,class,split\n{C},flute+tuba,train\n",
                f"clips/tuba/{A}.000000.mp4": None,
                f"clips/tuba/{A}.000001.mp4": None,
                f"clips/tuba/{A}x.000000.mp4": None,
                f"clips/flute/{B}.000000.mp4": None,
                f"clips/flute+tuba/{C}.000000.mp4": None,
            }
        ),
    )
    assert table.classes == ("flute", "tuba")
    assert [(row.id, row.label, row.labels, row.split, row.extra["kind"]) for row in table.rows] == [
        (f"{A}.000000", 1, (1,), "train", "solo"),
        (f"{A}.000001", 1, (1,), "train", "solo"),
        (f"{B}.000000", 0, (0,), "test", "solo"),
        (f"{C}.000000", None, (0, 1), "train", "duet"),
    ]
    assert table.missing == (C,)


@pytest.fixture
def avsbench(write, tmp_path):
    header = "vid,uid,s_min,s_sec,a_obj,split,label\n"
    uids = {"v1s": f"{A}_0", "v2": f"{B}_65"}
    rows = f"{A},{A}_0,0,0,cat,train,v1s\n{B},{B}_65,1,5,cat_dog,test,v2\n{C},{C}_0,0,0,dog,val,v1m\n"
    files = {"metadata.csv": header + rows, "label2idx.json": json.dumps({"background": 0, "dog": 2, "cat": 1})}
    for subset, uid in uids.items():
        frames = {"v1s": 5, "v2": 10}[subset]
        files |= {f"{subset}/{uid}/frames/{i}.jpg": picture(i) for i in range(frames)}
        masks = {i: np.full((6, 8), i % 3, "u1") for i in range(1 if subset == "v1s" else frames)}
        files |= {f"{subset}/{uid}/labels_semantic/{i}.png": mask for i, mask in masks.items()}
        sound(tmp_path / subset / uid / "audio.wav", frames)
    return write(files)


def test_avsbench(avsbench):
    table = data.read("avsbench", avsbench)
    assert table.classes == ("background", "cat", "dog")
    assert [(row.id, row.start, row.label, row.split, row.extra) for row in table.rows] == [
        (f"v1s/{A}_0", 0, 1, "train", {"subset": "v1s", "a_obj": "cat", "listed": [1]}),
        (f"v2/{B}_65", 65, None, "test", {"subset": "v2", "a_obj": "cat_dog", "listed": [1, 2]}),
    ]
    assert table.missing == (f"v1m/{C}_0",)
    first, second = map(data.semantic_masks, table.rows)
    assert first.keys() == {0}  # in training only the first frame is annotated
    assert {i: mask.tolist() for i, mask in second.items()} == {i: [[i % 3] * 8] * 6 for i in range(10)}
    clip = table.read(1, start=4.2, duration=1.0)  # the middle, 4.7 s, belongs to the fifth picture
    assert (number(clip.frame), clip.frame_time, clip.start) == (4, 4.5, 4.2)
    np.testing.assert_allclose(clip.waveform[0], noise(16000, 10)[67200:83200], atol=1e-6)


def test_avsbench_mask_in_colours_is_refused(avsbench, write):
    write({f"v1s/{A}_0/labels_semantic/0.png": picture(0)})
    with pytest.raises(data.LayoutError, match=r"labels_semantic/0\.png: a picture in colours"):
        data.semantic_masks(data.read("avsbench", avsbench).rows[0])


def test_flickr_soundnet(write, tmp_path):
    boxes = "".join(
        f"<bbox><xmin>{x}</xmin><ymin>0</ymin><xmax>{x + 64}</xmax><ymax>256</ymax></bbox>" for x in (0, 128)
    )
    sound(tmp_path / "audio" / "12.wav", 4, rate=44100)
    sound(tmp_path / "audio" / "34.wav", 4)
    root = write(
        {
            "frames/12.jpg": picture(12),
            "frames/34.jpg": picture(34),
            "Annotations/12.xml": f"<annotation>{boxes}</annotation>",
            "flickr_test.txt": "12\n56\n",
            "flickr_train.txt": "34\n",
        }
    )
    table = data.read("flickr-soundnet", root, "test")
    assert facts(table) == [("12", "frames/12.jpg", None, "test")]
    assert table.rows[0].extra == {"boxes": ((0, 0, 0.25, 1), (0.5, 0, 0.75, 1))}
    assert table.missing == ("56",)
    clip = table.read(0)
    assert (number(clip.frame), clip.start, clip.waveform.shape) == (12, 0.5, (1, 48000))
    for path in root.glob("*.txt"):
        path.unlink()
    everything = data.read("flickr-soundnet", root)
    assert [row.id for row in everything.rows] == ["12", "34"]


def test_vggss(write):
    boxes = [{"file": f"{B}_000000", "class": "cat meowing", "bbox": [[0, 0.25, 0.5, 1], [0.1, 0.1, 0.2, 0.2]]}]
    gone = [{"file": f"{C}_000007", "class": "cat meowing", "bbox": []}]
    table = data.read("vggss", write(VGGSOUND | {"annotations/vggss.json": json.dumps(boxes + gone)}))
    assert facts(table) == [(f"{B}_000000", f"clips/cat_meowing/{B}_000000_000009.mp4", 0, "test")]
    assert table.rows[0].extra == {"boxes": ((0, 0.25, 0.5, 1), (0.1, 0.1, 0.2, 0.2))}
    assert table.missing == (f"{C}_000007",)


def test_folder_of_videos_without_labels(write):
    table = data.read("folder", write({"b/ü #1.mp4": None, "a.MP4": None, "notes.txt": "no video"}))
    assert facts(table) == [("a.MP4", "a.MP4", None, None), ("b/ü #1.mp4", "b/ü #1.mp4", None, None)]
    assert table.read(1, duration=1.0).waveform.shape == (1, 16000)


# --- what goes wrong --------------------------------------------------------------------------------------------------

LIST = "annotations/vggsound.csv"
LABELS = "annotations/class_labels_indices.csv"
SEGMENTS = "annotations/eval_segments.csv"
AVS = "vid,uid,s_min,s_sec,a_obj,split,label\n"
BAD = {
    "no list": ("vggsound", {}, "vggsound.csv: no such file; expected the columns id,start,label,split"),
    "three fields": ("vggsound", {LIST: f"{A},1,cat,train\n{B},2,cat\n"}, "vggsound.csv:2: 3 fields"),
    "no time": ("vggsound", {LIST: f"{A},one,cat,train\n"}, "vggsound.csv:1: 'one' is no time"),
    "not a number": ("vggsound", {LIST: f"{A},nan,cat,train\n"}, "vggsound.csv:1: 'nan' is no time"),
    "split": ("vggsound", {LIST: f"{A},1,cat,dev\n"}, "vggsound.csv:1: split 'dev', expected one of test, train"),
    "quotes": ("vggsound", {LIST: f'{A},1,"cat"s,train\n'}, "vggsound.csv:1: "),
    "header": ("audioset", AUDIOSET | {LABELS: "mid,index,display_name\n"}, "indices.csv:1: the header is mid,"),
    "unknown label": ("audioset", AUDIOSET | {SEGMENTS: f'#\n{A}, 0, 9, "/m/x"\n'}, "segments.csv:2: label '/m/x'"),
    "json": ("vggss", VGGSOUND | {"annotations/vggss.json": "[{"}, "vggss.json: no valid JSON"),
    "entry": ("vggss", VGGSOUND | {"annotations/vggss.json": '[{"file": "a_1"}]'}, "vggss.json: entry 0: expected"),
    "box": (
        "vggss",
        VGGSOUND | {"annotations/vggss.json": '[{"file": "a_1", "class": "c", "bbox": [[0, 0, NaN, 1]]}]'},
        "vggss.json: entry 0: .* is no box of four numbers",
    ),
    "index": ("avsbench", {"metadata.csv": AVS, "label2idx.json": '{"cat": 2}'}, "label2idx.json: expected"),
    "two lists": ("stills", {"a_test.csv": "1\n", "b_test.txt": "1\n"}, "a_test.csv, b_test.txt: two lists of the"),
    "music": ("music", {"anno/MUSIC_solo_videos.json": "[]"}, "MUSIC_solo_videos.json: expected an object"),
    "none there": ("vggsound", {LIST: f"{A},1,cat,train\n"}, f"none of the 1 clips of vggsound is there.*{A}_000001"),
    "empty folder": ("folder", {}, "none of the 0 clips"),
    # Paths that lead out of the data set.
    "id": ("vggsound", {LIST: "../../etc/pas,1,cat,train\n"}, "vggsound.csv:1: '../../etc/pas' is not the plain name"),
    "label": ("vggsound", {LIST: f"{A},1,..,train\n"}, "vggsound.csv:1: '..' is not the plain name"),
    "absolute": ("vggsound", {LIST: f"{A},1,/etc,train\n"}, "vggsound.csv:1: '/etc' is not the plain name"),
    "short id": ("audioset", AUDIOSET | {SEGMENTS: '..x, 0, 9, "/m/09x0r"\n'}, "segments.csv:1: '..' is not the plain"),
    "key": ("vggss", VGGSOUND | {"annotations/vggss.json": '[{"file": "../a_1", "class": "c", "bbox": []}]'}, "'../a'"),
    "class": ("music", {"anno/music_solo.csv": f"id,class,split\n{A},a/../../b,train\n",
                        "anno/music_duet.csv": "id,class,split\n"}, "music_solo.csv:2: 'a/../../b'"),
    "uid": ("avsbench", {"metadata.csv": AVS + f"{A},../x,0,0,cat,train,v1s\n", "label2idx.json": '{"cat": 0}'},
            "metadata.csv:2: '../x'"),
    "picture": ("flickr-soundnet", {"flickr_test.txt": "../12\n"}, "flickr_test.txt:1: '../12'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_row_is_refused_with_file_and_line(write, tmp_path, case):
    layout, files, message = BAD[case]
    with pytest.raises(data.LayoutError, match=message) as caught:
        data.read(layout, write(files))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("<annotation><bbox>", "no well-formed annotation"),
        ("<annotation><bbox><xmin>1</xmin></bbox></annotation>", "a bbox without the whole numbers"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "no well-formed annotation"),
    ],
)
def test_bad_flickr_annotation_names_its_file(write, tmp_path, xml, message):
    sound(tmp_path / "audio" / "1.wav", 1)
    root = write({"frames/1.jpg": picture(1), "Annotations/1.xml": xml})
    with pytest.raises(data.LayoutError, match=rf"Annotations/1\.xml: {message}"):
        data.read("flickr-soundnet", root)


def test_unknown_layouts_splits_and_folders(write, tmp_path):
    with pytest.raises(ValueError, match="layout='vgg': expected one of vggsound, "):
        data.read("vgg", tmp_path)
    with pytest.raises(ValueError, match="split='val': expected one of train, test, all"):
        data.read("vggsound", write(VGGSOUND), split="val")
    with pytest.raises(ValueError, match="split='train': expected all"):
        data.read("folder", tmp_path, split="train")
    with pytest.raises(data.LayoutError, match="no such directory"):
        data.read("folder", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("damage", "stream", "reason"),
    [
        (lambda root: (root / "audio/1.wav").write_bytes(b""), "audio", "cannot be decoded"),
        (lambda root: (root / "audio/1.wav").write_text("a dark and stormy night"), "audio", "cannot be decoded"),
        (lambda root: (root / "frames/1.jpg").write_bytes(b"\xff\xd8\xff"), "video", "cannot be decoded"),
        (lambda root: sound(root / "audio/1.wav", 0.25), "file", "too short: 0.25 s"),
        (lambda root: (root / "frames/1.jpg").unlink(), "video", "cannot be decoded"),
    ],
)
def test_damaged_pictures_and_sounds_are_clip_errors(write, tmp_path, damage, stream, reason):
    sound(tmp_path / "audio" / "1.wav", 1)
    table = data.read("flickr-soundnet", write({"frames/1.jpg": picture(1)}))
    damage(tmp_path)
    with pytest.raises(ClipError, match=reason) as caught:
        table.read(0, min_duration=0.5)
    assert (caught.value.path, caught.value.stream) == (str(tmp_path / "frames/1.jpg"), stream)
