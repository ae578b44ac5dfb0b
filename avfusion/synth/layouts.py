"""Scenes in the files of the public data sets: where a clip goes, and what the annotation files say.

`clip_files` gives all files of a clip, `annotations` those of the whole set, both as {path below the root: bytes}.
Beside what the public sets have, every clip gets `truth/<id>/`:

    truth.json      labels, objects with their boxes and loudness at each of `times`, split, where the clip lies
    masks.npz       `masks` [T, H, W] uint8: which object is seen, 0 for none
    sources/<k>.wav one waveform for each thing that sounds; they add up to the clip's sound before the codec
"""

import csv
import io
import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from avfusion.synth import render
from avfusion.synth.looks import LOOKS
from avfusion.synth.scene import Scene, Settings, draw_scene
from avfusion.synth.timbres import RATE, TIMBRES

Files = dict[str, bytes]
TAGS = "video_id,label,modality,background_music,static_image,voice_over"  # of VGGSounder's files
jpeg = partial(render.picture, kind="JPEG", quality=92)


class Plan(NamedTuple):
    """How a layout wants one of its clips."""

    split: str
    sources: int = 1  # things that sound, on screen
    seconds: float | None = None  # None: as the settings say
    times: np.ndarray | None = None  # of the frames; None: a video
    variant: str = ""
    close: bool = False  # a close-up: large objects
    alone: bool = False  # nothing else is seen or heard


class Layout(NamedTuple):
    plan: Callable[[Settings, int], Plan]
    media: Callable[["Clip"], tuple[str, Files]]  # where the clip lies (a file or a folder), and its files
    annotate: Callable[[Settings, list[dict]], Files]  # from the truth.json of all clips


class Clip(NamedTuple):
    """A rendered scene."""

    settings: Settings
    index: int
    plan: Plan
    scene: Scene
    frames: np.ndarray  # [T, H, W, 3] uint8
    masks: np.ndarray  # [T, H, W] uint8
    sources: np.ndarray  # [S, samples] int16

    @property
    def sound(self) -> np.ndarray:
        return self.sources.sum(0, dtype=np.int16)


def scene(settings: Settings, index: int) -> Scene:
    """The scene of a clip, without rendering it."""
    plan = LAYOUTS[settings.layout].plan(settings, index)
    return draw_scene(settings, index, sources=plan.sources, seconds=plan.seconds, close=plan.close, alone=plan.alone)


def clip_files(settings: Settings, index: int) -> Files:
    """Render clip `index` of the set: its media and its truth, truth.json last."""
    layout = LAYOUTS[settings.layout]
    plan, drawn = layout.plan(settings, index), scene(settings, index)
    times = np.arange(round(drawn.seconds * settings.fps)) / settings.fps if plan.times is None else plan.times
    frames, masks = render.render_frames(drawn, settings.size, times)
    clip = Clip(settings, index, plan, drawn, frames, masks, render.render_sources(drawn))
    path, files = layout.media(clip)

    truth, archive = f"truth/{drawn.id}", io.BytesIO()
    np.savez_compressed(archive, masks=masks)
    files[f"{truth}/masks.npz"] = archive.getvalue()
    for number, waveform in enumerate(clip.sources):
        files[f"{truth}/sources/{number}.wav"] = render.wav(waveform)
    files[f"{truth}/truth.json"] = _json(_truth(clip, path, times))
    return files


def annotations(settings: Settings, truths: list[dict]) -> Files:
    """The annotation files of a whole set, from what its truth.json files hold, in order of the clips."""
    return LAYOUTS[settings.layout].annotate(settings, truths)


def _truth(clip: Clip, path: str, times: np.ndarray) -> dict:
    settings, drawn, objects = clip.settings, clip.scene, []
    for number, actor in enumerate(clip.scene.actors, 1):
        objects.append({
            "class": None if actor.label is None else settings.names[actor.label],
            "label": actor.label,
            "look": LOOKS[actor.look].name if actor.onscreen else None,
            "timbre": TIMBRES[actor.timbre].name if actor.sounding else None,
            "sounding": actor.sounding,
            "onscreen": actor.onscreen,
            "source": sum(other.sounding for other in drawn.actors[: number - 1]) if actor.sounding else None,
            "mask": number if actor.onscreen else None,
            "boxes": render.boxes(clip.masks, number) if actor.onscreen else None,
            "loudness": [round(v, 4) for v in (actor.envelope(times) * actor.sounding).tolist()],
        })  # fmt: skip
    return {
        "id": drawn.id, "path": path, "split": clip.plan.split, "variant": clip.plan.variant,
        "start": drawn.start, "seconds": drawn.seconds,
        "frame_rate": settings.fps if clip.plan.times is None else None, "sample_rate": RATE, "size": settings.size,
        "task": settings.task, "label": drawn.label, "class": settings.names[drawn.label], "labels": drawn.labels,
        "tasks": {
            "classes": drawn.timbre,
            "conjunction": (drawn.look + drawn.timbre) % settings.classes,
            "synchrony": drawn.side,
        },
        "times": times.tolist(), "objects": objects,
    }  # fmt: skip


def _json(value) -> bytes:
    return (json.dumps(value) + "\n").encode()


def _csv(rows: Iterable[Iterable], header: str | None = None) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header.split(","), *rows] if header else rows)
    return text.getvalue().encode()


def _split(index: int) -> str:
    return "test" if index % 5 == 4 else "train"


def _key(truth: dict) -> str:
    return f"{truth['id']}_{truth['start']:06d}"


def _in_split(truths: list[dict], split: str) -> list[dict]:
    return [truth for truth in truths if truth["split"] == split]


def video(name: Callable[[Clip], str]) -> Callable[[Clip], tuple[str, Files]]:
    """Clips are videos under clips/, named so, without the suffix."""

    def media(clip: Clip) -> tuple[str, Files]:
        path = f"clips/{name(clip)}.mp4"
        return path, {path: render.mp4(clip.frames, clip.settings.fps, clip.sound)}

    return media


def _cut(clip: Clip) -> str:
    """<id>_<start>_<end>."""
    return f"{clip.scene.id}_{clip.scene.start:06d}_{clip.scene.start + 10:06d}"


def _of_class(clip: Clip) -> str:
    return f"{clip.settings.names[clip.scene.label].replace(' ', '_')}/{_cut(clip)}"


def _of_players(clip: Clip) -> str:
    heard = [actor.label for actor in clip.scene.actors if actor.sounding and actor.onscreen]
    return "+".join(clip.settings.names[label].replace(" ", "_") for label in heard) + f"/{clip.scene.id}.000000"


def vggsound(settings: Settings, truths: list[dict]) -> Files:
    rows = [(truth["id"], truth["start"], truth["class"], truth["split"]) for truth in truths]
    tags = [
        (_key(truth), thing["class"], "A" * thing["sounding"] + "V" * thing["onscreen"], False, False, False)
        for truth in truths for thing in truth["objects"] if thing["class"]
    ]  # fmt: skip
    return {"annotations/vggsound.csv": _csv(rows), "annotations/vggsounder.csv": _csv(tags, TAGS)}


def vggsound_subset(name: str) -> Callable[[Settings, list[dict]], Files]:
    """VGGSound-Music and -Instruments: lists of clips a split, and pairs of test clips to mix and separate again."""

    def annotate(settings: Settings, truths: list[dict]) -> Files:
        def row(truth: dict) -> tuple[str, str]:
            return _key(truth), truth["class"].replace(" ", "_")

        files = vggsound(settings, truths)
        for split in ("train", "test"):
            files[f"annotations/{name}_{split}.csv"] = _csv(map(row, _in_split(truths, split)))
        test = [row(truth) for truth in _in_split(truths, "test")]
        others = np.random.default_rng([settings.seed, 2]).permutation(len(test))
        pairs = [
            (first[0], test[other][0], first[1], test[other][1], "Hard" if first[1] == test[other][1] else "Easy")
            for first, other in zip(test, others, strict=True)
            if first is not test[other]
        ]
        files[f"annotations/{name}_pairs.csv"] = _csv(pairs, "source_1,source_2,class_1,class_2,sep_type")
        return files

    return annotate


def vggss(settings: Settings, truths: list[dict]) -> Files:
    """VGG-SS: boxes of what sounds in the frame in the middle."""
    rows = []
    for truth in truths:
        bbox = [[round(v / truth["size"], 6) for v in box] for box in _middle_boxes(truth)]
        rows.append({"file": _key(truth), "class": truth["class"], "bbox": bbox})
    return vggsound(settings, truths) | {"annotations/vggss.json": _json(rows)}


def _middle_boxes(truth: dict) -> list[list[int]]:
    middle = len(truth["times"]) // 2
    seen = [item["boxes"][middle] for item in truth["objects"] if item["sounding"] and item["onscreen"]]
    return [box for box in seen if box]


def audioset_plan(settings: Settings, index: int) -> Plan:
    split = "eval" if index % 5 == 4 else "balanced_train" if index % 5 == 0 else "unbalanced_train"
    sources = int(np.random.default_rng([settings.seed, index, 3]).choice([1, 2, 3], p=[0.5, 0.35, 0.15]))
    return Plan(split, sources=sources)


def audioset(settings: Settings, truths: list[dict]) -> Files:
    mids = [f"/m/synth{label:02d}" for label in range(len(settings.names))]
    rows = [(label, mids[label], name) for label, name in enumerate(settings.names)]
    files = {"annotations/class_labels_indices.csv": _csv(rows, "index,mid,display_name")}
    for split in ("balanced_train", "unbalanced_train", "eval"):
        chosen = _in_split(truths, split)
        labels = sum(len(truth["labels"]) for truth in chosen)
        lines = [
            "# Segments csv of a synthetic set",
            f"# num_ytids={len(chosen)}, num_segs={len(chosen)}, num_unique_labels={len(mids)}, "
            f"num_positive_labels={labels}",
            "# YTID, start_seconds, end_seconds, positive_labels",
        ]
        for truth in chosen:
            found = ",".join(mids[label] for label in truth["labels"])
            lines.append(f'{truth["id"]}, {truth["start"]:.3f}, {truth["start"] + 10:.3f}, "{found}"')
        files[f"annotations/{split}_segments.csv"] = ("\n".join(lines) + "\n").encode()
    return files


def music_plan(settings: Settings, index: int) -> Plan:
    duet = index % 4 == 3 and settings.task != "synchrony"
    variant = "duet" if duet else "solo"
    return Plan(_split(index), sources=2 if duet else 1, variant=variant, close=True, alone=True)


def music(settings: Settings, truths: list[dict]) -> Files:
    return {
        f"anno/music_{kind}.csv": _csv(
            [(t["id"], t["path"].split("/")[1], t["split"]) for t in truths if t["variant"] == kind], "id,class,split"
        )
        for kind in ("solo", "duet")
    }


def avsbench_plan(settings: Settings, index: int) -> Plan:
    variant = ("v1s", "v1m", "v2")[index % 3]
    split = {3: "val", 4: "test"}.get(index % 5, "train")
    count = 10 if variant == "v2" else 5
    sources = {"v1s": 1, "v1m": 2 + index % 2, "v2": 1 + index % 2}[variant]
    return Plan(split, sources, seconds=float(count), times=np.arange(count) + 0.5, variant=variant)


def avsbench_media(clip: Clip) -> tuple[str, Files]:
    """The frame in the middle of each second; semantic masks of what sounds, as indices and in colour."""
    folder = f"{clip.plan.variant}/{clip.scene.id}"
    index = np.zeros(len(clip.scene.actors) + 1, np.uint8)
    for number, actor in enumerate(clip.scene.actors, 1):
        index[number] = actor.label + 1 if actor.sounding and actor.onscreen else 0
    annotated = 1 if clip.plan.variant == "v1s" and clip.plan.split == "train" else len(clip.frames)
    files = {f"{folder}/audio.wav": render.wav(clip.sound)}
    for number, (frame, mask) in enumerate(zip(clip.frames, index[clip.masks], strict=True)):
        files[f"{folder}/frames/{number}.jpg"] = jpeg(Image.fromarray(frame))
        if number < annotated:
            files[f"{folder}/labels_semantic/{number}.png"] = render.picture(Image.fromarray(mask), "PNG")
            files[f"{folder}/labels_rgb/{number}.png"] = render.picture(Image.fromarray(COLOURS[mask]), "PNG")
    return folder, files


def _colour_map() -> np.ndarray:
    """The colours of PASCAL VOC, black for 0: [256, 3] uint8."""
    index = np.arange(256)[:, None]
    channels = np.arange(3)
    return sum(((index >> (3 * bit + channels) & 1) << (7 - bit)) for bit in range(3)).astype(np.uint8)


COLOURS = _colour_map()


def avsbench(settings: Settings, truths: list[dict]) -> Files:
    rows = []
    for truth in truths:
        heard = "_".join(item["class"] for item in truth["objects"] if item["sounding"] and item["onscreen"])
        start = divmod(truth["start"], 60)
        rows.append((truth["id"], truth["id"], *start, heard, truth["split"], truth["variant"]))
    indices = {"background": 0} | {name: label for label, name in enumerate(settings.names, 1)}
    return {
        "metadata.csv": _csv(rows, "vid,uid,s_min,s_sec,a_obj,split,label"),
        "label2idx.json": _json(indices),
    }


SIDE, ANNOTATORS = 256, 3


def flickr_plan(settings: Settings, index: int) -> Plan:
    return Plan(_split(index), times=np.array([settings.seconds / 2]), close=True)


def flickr_media(clip: Clip) -> tuple[str, Files]:
    """A frame of 256 x 256 pixels, and the boxes of annotators who are a few pixels off."""
    name, settings = clip.scene.id, clip.settings
    frame = Image.fromarray(clip.frames[0]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    rng = np.random.default_rng([settings.seed, clip.index, 4])
    root = ElementTree.Element("annotation")
    sounding = [n for n, actor in enumerate(clip.scene.actors, 1) if actor.sounding and actor.onscreen]
    exact = [box for number in sounding for box in render.boxes(clip.masks, number) if box]
    for _ in range(ANNOTATORS):
        for box in exact:
            sides = np.array(box) * SIDE / settings.size + rng.normal(0, 0.02 * SIDE, 4)
            element = ElementTree.SubElement(root, "bbox")
            for tag, side in zip(("xmin", "ymin", "xmax", "ymax"), sides.round().clip(0, SIDE), strict=True):
                ElementTree.SubElement(element, tag).text = str(int(side))
    ElementTree.indent(root)
    path = f"frames/{name}.jpg"
    return path, {
        path: jpeg(frame),
        f"audio/{name}.wav": render.wav(clip.sound),
        f"Annotations/{name}.xml": ElementTree.tostring(root, encoding="utf-8") + b"\n",
    }


def flickr(settings: Settings, truths: list[dict]) -> Files:
    return {
        f"flickr_{split}.txt": "".join(truth["id"] + "\n" for truth in _in_split(truths, split)).encode()
        for split in ("train", "test")
    }


def _plain(settings: Settings, index: int) -> Plan:
    return Plan(_split(index))


def _performance(settings: Settings, index: int) -> Plan:
    return Plan(_split(index), close=True, alone=True)


LAYOUTS = {
    "vggsound": Layout(_plain, video(_of_class), vggsound),
    "vggsound-music": Layout(_performance, video(_of_class), vggsound_subset("vggsound_music")),
    "vggsound-instruments": Layout(_performance, video(_of_class), vggsound_subset("vggsound_instruments")),
    "vggss": Layout(lambda settings, index: Plan("test", close=True), video(_of_class), vggss),
    "audioset": Layout(audioset_plan, video(lambda clip: f"{clip.scene.id[:2]}/{_cut(clip)}"), audioset),
    "music": Layout(music_plan, video(_of_players), music),
    "avsbench": Layout(avsbench_plan, avsbench_media, avsbench),
    "flickr-soundnet": Layout(flickr_plan, flickr_media, flickr),
    "folder": Layout(_plain, video(lambda clip: clip.scene.id), lambda settings, truths: {}),
}
