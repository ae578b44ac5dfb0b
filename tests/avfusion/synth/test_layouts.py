"""The layouts of the public data sets: every annotation file against the ground truth of the clips that it names."""

import csv
import json
from collections import Counter
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from synthetic import SMALL, frames_of, masks_of, samples_of, sources_of, truths_of

from avfusion.data import LAYOUTS, read
from avfusion.data.tags import read_tags
from avfusion.synth import layouts
from avfusion.synth.looks import LOOKS
from avfusion.synth.make import synthesize
from avfusion.synth.timbres import TIMBRES


def rows_of(path, header=None):
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    if header:
        assert rows.pop(0) == header.split(",")
    return rows


@pytest.fixture
def make(tmp_path):
    def make(layout, **options):
        synthesize(tmp_path / layout, replace(SMALL, layout=layout, **options))
        return tmp_path / layout, {truth["id"]: truth for truth in truths_of(tmp_path / layout)}

    return make


def test_every_layout_is_offered(make):
    others = {"music-solo": "music", "stills": "flickr-soundnet"}  # read the files of another
    assert set(layouts.LAYOUTS) == set(LAYOUTS) - others.keys() - {"music21"}
    assert all(read(other, make(layout)[0]).rows for other, layout in others.items())
    assert len(LOOKS) == len(TIMBRES)


@pytest.mark.parametrize("task", ["classes", "conjunction", "synchrony"])
def test_vggsound(make, task):
    root, truths = make("vggsound", task=task)
    tags = read_tags(str(root / "annotations/vggsounder.csv"))
    rows = rows_of(root / "annotations/vggsound.csv")
    assert Counter(row[3] for row in rows) == {"train": 8, "test": 2}
    for name, start, label, split in rows:
        truth = truths.pop(name)
        assert (label, split, int(start)) == (truth["class"], truth["split"], truth["start"])
        clip = root / f"clips/{label.replace(' ', '_')}/{name}_{int(start):06d}_{int(start) + 10:06d}.mp4"
        assert frames_of(clip).shape == (16, 64, 64, 3)
        heard = {thing["class"] for thing in truth["objects"] if thing["sounding"]}
        seen = {thing["class"] for thing in truth["objects"] if thing["onscreen"] and thing["class"]}
        marks = {label: "A" * (label in heard) + "V" * (label in seen) for label in heard | seen}
        assert tags.pop(f"{name}_{int(start):06d}") == marks
    assert not truths
    assert not tags


@pytest.mark.parametrize("layout", ["vggsound-music", "vggsound-instruments"])
def test_vggsound_subsets(make, layout):
    root, truths = make(layout, clips=40, classes=3)
    name = layout.replace("-", "_")
    classes = {}
    for split in ("train", "test"):
        for key, label in rows_of(root / f"annotations/{name}_{split}.csv"):
            truth = truths[key[:11]]
            assert key == f"{truth['id']}_{truth['start']:06d}"
            assert (truth["split"], truth["class"].replace(" ", "_")) == (split, label)
            assert len(list(root.glob(f"clips/{label}/{key}_*.mp4"))) == 1
            classes[key] = label
    assert len(classes) == 40
    pairs = rows_of(root / f"annotations/{name}_pairs.csv", "source_1,source_2,class_1,class_2,sep_type")
    for first, second, class_1, class_2, kind in pairs:
        assert first != second
        assert (classes[first], classes[second]) == (class_1, class_2)
        assert kind == ("Hard" if class_1 == class_2 else "Easy")
        assert truths[first[:11]]["split"] == truths[second[:11]]["split"] == "test"
    assert {kind for *_, kind in pairs} == {"Easy", "Hard"}


def test_vggss(make):
    root, truths = make("vggss")
    listed = json.loads((root / "annotations/vggss.json").read_bytes())
    assert {row[3] for row in rows_of(root / "annotations/vggsound.csv")} == {"test"}
    assert len(listed) == 10
    for entry in listed:
        truth = truths[entry["file"][:11]]
        assert entry["file"][11:] == f"_{truth['start']:06d}"
        assert entry["class"] == truth["class"]
        (sounding,) = (item for item in truth["objects"] if item["sounding"] and item["onscreen"])
        rows, columns = np.nonzero(masks_of(root, truth)[8] == sounding["mask"])
        expected = [columns.min() / 64, rows.min() / 64, (columns.max() + 1) / 64, (rows.max() + 1) / 64]
        assert entry["bbox"] == [pytest.approx(expected)]


def test_audioset(make):
    root, truths = make("audioset")
    names = {mid: int(index) for index, mid, _ in rows_of(
        root / "annotations/class_labels_indices.csv", "index,mid,display_name")}  # fmt: skip
    found = 0
    for split in ("balanced_train", "unbalanced_train", "eval"):
        lines = (root / f"annotations/{split}_segments.csv").read_text().splitlines()
        assert [line[0] for line in lines[:3]] == ["#"] * 3
        for name, start, end, mids in csv.reader(lines[3:], skipinitialspace=True):
            truth = truths[name]
            assert truth["split"] == split
            assert float(end) - float(start) == 10
            assert [names[mid] for mid in mids.split(",")] == truth["labels"]
            assert (root / f"clips/{name[:2]}/{name}_{int(float(start)):06d}_{int(float(end)):06d}.mp4").is_file()
            found += 1
    assert found == 10


def test_music(make):
    root, truths = make("music")
    seen = []
    for kind in ("solo", "duet"):
        for name, label, split in rows_of(root / f"anno/music_{kind}.csv", "id,class,split"):
            heard = [i["class"] for i in truths[name]["objects"] if i["sounding"] and i["onscreen"]]
            assert [part.replace("_", " ") for part in label.split("+")] == heard
            assert len(heard) == {"solo": 1, "duet": 2}[kind]
            assert split == truths[name]["split"]
            assert len(list(root.glob(f"clips/{label}/{name}.*.mp4"))) == 1
            seen.append(name)
    assert sorted(seen) == sorted(truths)


def test_avsbench(make):
    root, truths = make("avsbench", clips=15)
    names = json.loads((root / "label2idx.json").read_bytes())
    assert names.pop("background") == 0
    annotated = Counter()
    for vid, uid, minute, second, heard, split, variant in rows_of(
        root / "metadata.csv", "vid,uid,s_min,s_sec,a_obj,split,label"
    ):
        truth, folder = truths[vid], root / variant / uid
        assert 60 * int(minute) + int(second) == truth["start"]
        assert split == truth["split"]
        seconds = {"v1s": 5, "v1m": 5, "v2": 10}[variant]
        sources, sound = sources_of(root, truth), samples_of(folder / "audio.wav")
        assert len(sound) == seconds * 16000
        np.testing.assert_array_equal(sources.sum(0), sound)
        sounding = [item for item in truth["objects"] if item["sounding"] and item["onscreen"]]
        assert heard.split("_") == [item["class"] for item in sounding]
        assert len(sounding) in {"v1s": [1], "v1m": [2, 3], "v2": [1, 2]}[variant]

        frames = sorted((folder / "frames").iterdir(), key=lambda file: int(file.stem))
        assert [file.name for file in frames] == [f"{number}.jpg" for number in range(seconds)]
        masks, semantic = masks_of(root, truth), sorted((folder / "labels_semantic").iterdir())
        assert sorted(file.name for file in (folder / "labels_rgb").iterdir()) == [file.name for file in semantic]
        annotated[variant, split] = len(semantic)
        for file in semantic:
            with Image.open(file) as image:
                assert image.mode == "L"
                found = np.asarray(image)
            expected = np.zeros_like(found)
            for item in sounding:
                expected[masks[int(file.stem)] == item["mask"]] = names[item["class"]]
            np.testing.assert_array_equal(found, expected)
            colours = np.asarray(Image.open(folder / "labels_rgb" / file.name))
            assert len(np.unique(colours.reshape(-1, 3), axis=0)) == len(np.unique(found))
            np.testing.assert_array_equal((colours > 0).any(-1), found > 0)
    assert annotated["v1s", "train"] == 1
    assert annotated["v1s", "test"] == annotated["v1m", "train"] == 5
    assert annotated["v2", "train"] == 10


def test_flickr_soundnet(make):
    root, truths = make("flickr-soundnet")
    listed = [(root / f"flickr_{split}.txt").read_text().split() for split in ("train", "test")]
    assert sorted(listed[0] + listed[1]) == sorted(truths)
    for name, truth in truths.items():
        assert Image.open(root / f"frames/{name}.jpg").size == (256, 256)
        np.testing.assert_array_equal(sources_of(root, truth).sum(0), samples_of(root / f"audio/{name}.wav"))
        (item,) = (item for item in truth["objects"] if item["sounding"] and item["onscreen"])
        boxes = ElementTree.parse(root / f"Annotations/{name}.xml").getroot().findall("bbox")
        found = np.array([[int(box.find(tag).text) for tag in ("xmin", "ymin", "xmax", "ymax")] for box in boxes])
        assert found.shape == (3, 4)
        assert len(np.unique(found, axis=0)) > 1  # annotators differ a little
        assert np.abs(found - np.array(item["boxes"][0]) * 4).max() < 25


def test_folder_of_videos_without_labels(make):
    root, truths = make("folder", clips=3)
    assert sorted(file.stem for file in root.glob("clips/*.mp4")) == sorted(truths)
    assert {path.name for path in root.iterdir()} == {"clips", "truth", "synth.json"}
