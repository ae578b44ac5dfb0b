"""Makes the corpus: `python tests/fuzz/seeds.py`. Small files of each kind, which are what they say they are.

Findings are kept beside them, under names that begin with bug-.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).parents[1] / "avfusion"), str(Path(__file__).parents[2])]

from made_clips import write_clip  # noqa: E402
from targets import CORPUS, LAYOUTS  # noqa: E402

from avfusion import DeepAVFusion, EncoderConfig, data, save_encoder  # noqa: E402
from avfusion.embedding.store import write_rows  # noqa: E402


def folder(name: str) -> Path:
    (CORPUS / name).mkdir(parents=True, exist_ok=True)
    return CORPUS / name


def media() -> None:
    short = {"seconds": 0.6, "fps": 5, "rate": 16000, "layout": "mono"}
    for name, options in {
        "a.mp4": {}, "b.mkv": {"audio": "flac"}, "c.webm": {"video": "libvpx", "audio": "libopus", "rate": 48000},
        "d.avi": {"video": "mpeg4", "audio": "mp3"}, "e.ts": {}, "f.flv": {"rate": 44100},
        "g.mov": {"audio": "pcm_s16le"},
    }.items():  # fmt: skip
        write_clip(folder("media") / name, **short | options)


def stills() -> None:
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    for kind in ("png", "jpeg", "gif", "bmp", "webp", "tiff"):
        image.save(folder("stills") / f"a.{kind}")
    sound = np.sin(np.arange(2000) / 9)
    for kind, rate in (("wav", 16000), ("flac", 44100), ("ogg", 22050), ("aiff", 8000)):
        soundfile.write(folder("stills") / f"s.{kind}", sound, rate)


def shards() -> None:
    clips, out = CORPUS / "clips", folder("whole-shard")
    clips.mkdir()
    for number in range(2):
        write_clip(clips / f"{number}.mp4", seconds=0.8, fps=5, rate=16000, layout="mono")
    data.pack(data.read("folder", clips), out, size=16, sound="wav", frame_rate=3.0)
    shutil.rmtree(clips)
    for name in (".lock", "failed.jsonl"):
        (out / name).unlink()
    for target, name in (("shard", "00000.tar"), ("shard_index", "00000.json"), ("set_index", "index.json")):
        shutil.copy(out / name, folder(target) / name)


def annotations() -> None:
    boxes = json.dumps([{"file": "a_1", "class": "cat", "bbox": [[0.1, 0.2, 0.5, 1.2]]}])
    box = "<bbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bbox>"
    texts = {
        "annotations/vggsound.csv": 'a,1,cat,train\nb,2,"dog, barking",test\n',
        "annotations/vggss.json": boxes,
        "vggss.json": boxes,
        "annotations/class_labels_indices.csv": 'index,mid,display_name\n0,/m/1,"cat, meowing"\n',
        "annotations/eval_segments.csv": '# a comment\na, 1.0, 11.0, "/m/1"\n',
        "flickr_test.txt": "1\n2\n",
        "anno/MUSIC_solo_videos.json": '{"videos": {"violin": ["a", "b"]}}',
        "anno/music_solo.csv": "id,class,split\na,violin,train\n",
        "Annotations/1.xml": f"<annotation>{box}</annotation>",
        "label2idx.json": '{"background": 0, "cat": 1}',
        "metadata.csv": "vid,uid,s_min,s_sec,a_obj,split,label\na,a_1,0,1,cat,train,v1s\n",
        "tags.csv": "video_id,label,modality,background_music\na,cat,AV,False\n",
    }
    for number, (_, name, _) in enumerate(LAYOUTS):
        (folder("annotations") / f"{number:02d}").write_bytes(bytes([number]) + texts[name].encode())


def checkpoint() -> None:
    torch.manual_seed(0)
    for kind in ("factorized", "token", "none"):
        config = EncoderConfig(dim=8, depth=1, num_heads=1, image_size=(32, 32), audio_size=(128, 16), patch_size=16,
                               fusion=kind, fusion_tokens=2, image_agg_tokens=1, audio_agg_tokens=1, mlp_ratio=1.0,
                               fusion_mlp_ratio=1.0)  # fmt: skip
        model = DeepAVFusion(config)
        save_encoder(model, folder("checkpoint") / f"{kind}.safetensors")
        if kind == "factorized":
            with open(folder("checkpoint") / "a.pth", "wb") as file:
                torch.save({"state_dict": {f"encoder.{k}": v for k, v in model.state_dict().items()}}, file)


def features() -> None:
    rows = {"file": np.array(["a", "b"], object), "window": np.array([0, 0]), "windows": np.array([1, 1]),
            "start": np.zeros(2), "end": np.ones(2), "frame_time": np.zeros(2)}  # fmt: skip
    rows |= {name: np.ones((2, 4), np.float32) for name in ("image", "audio", "fusion")}
    for kind in ("parquet", "safetensors"):
        write_rows(str(folder("features") / f"a.{kind}"), rows, {"stored": "fp32", "format": "avfusion-features-1"})


def run() -> None:
    log = [
        {"state": "running", "step": 0, "total": 9, "pid": 1, "host": "a", "time": 1.0},
        {"step": 2, "time": 2, "left": 4, "loss": {"image": 0.5}},
        {"state": "failed", "why": "x"},
    ]
    for name, text in {
        "run": json.dumps({"task": "pretrain", "settings": {}, "data": {"clips": 1}}),
        "log": "".join(json.dumps(line) + "\n" for line in log),
        "manifest": json.dumps({"made": {"format": "avfusion-features-1"}, "rows": 3, "done": ["a"]}),
        "checkpoint": json.dumps({"sha256": {"model.safetensors": "00"}}),
    }.items():
        (folder("run") / name).write_text(text)


def kernels() -> None:
    generator = np.random.default_rng(0)
    for number in range(24):
        (folder("kernels") / f"{number:02d}").write_bytes(generator.bytes(40))


if __name__ == "__main__":
    for make in (media, stills, shards, annotations, checkpoint, features, run, kernels):
        make()
    print(sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()), "bytes in", CORPUS)
