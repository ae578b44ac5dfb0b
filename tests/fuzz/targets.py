"""What reads files of strangers, and the kernels: each takes bytes, and may only refuse them.

tests/fuzz/fuzz.py changes them. What is refused otherwise than it should be is a finding.
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

import avfkernels
from avfusion import data
from avfusion.data.tags import read_tags
from avfusion.embedding.store import StoreError, read_manifest, read_rows
from avfusion.files import sha256
from avfusion.media.clip import ClipError
from avfusion.media.reader import length_of, read_clip, read_whole, read_windows
from avfusion.media.stills import read_picture, read_sound
from avfusion.media.windows import Plan
from avfusion.models.checkpoint import CheckpointError, load_encoder
from avfusion.training.run_folder import damage
from avfusion.training.runs import RunStatus

# In memory: a disk would be what is measured.
PLACE = Path(tempfile.mkdtemp(prefix="avf-fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
RATE = 16000


def written(name: str, content: bytes) -> Path:
    path = PLACE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def media(content: bytes) -> None:
    """A video file: a window in its middle, several, all of it."""
    path = written("clip", content)
    with suppress(ClipError):
        clip = read_clip(path, duration=0.5, sample_rate=RATE)
        assert clip.waveform.shape == (1, RATE // 2)
        assert clip.waveform.isfinite().all()
        assert clip.frame.mode == "RGB"
    with suppress(ClipError):
        for excerpt in read_windows(path, Plan(count=3), duration=0.3, sample_rate=RATE, frames=2):
            assert excerpt.waveform.shape == (1, round(0.3 * RATE))
    with suppress(ClipError):
        read_whole(path, frame_rate=2.0, max_duration=60.0)
    length_of(path)


def stills(content: bytes) -> None:
    """A picture, and a sound file."""
    path = written("still", content)
    with suppress(ClipError):
        assert read_picture("a", path).mode == "RGB"
    with suppress(ClipError):
        assert read_sound(path, duration=0.5)[0].shape == (1, 8000)


def _set_of_shards(name: str, content: bytes) -> None:
    """A packed set of one shard, a file of which is this."""
    folder = PLACE / "shards"
    folder.mkdir(exist_ok=True)
    for file in CORPUS.glob("whole-shard/*"):
        (folder / file.name).write_bytes(content if file.name == name else file.read_bytes())
    if name != "index.json":  # it names what is there
        index = json.loads((folder / "index.json").read_bytes())
        index["shards"][0]["index_sha256"] = sha256(folder / "00000.json")
        (folder / "index.json").write_text(json.dumps(index))
    with suppress(data.LayoutError):
        shards = data.Shards(folder)
        for index in range(min(len(shards), 4)):
            with suppress(ClipError):
                shards.read(index, duration=0.5)


def shard(content: bytes) -> None:
    size = (CORPUS / "whole-shard/00000.tar").stat().st_size
    _set_of_shards("00000.tar", content[:size].ljust(size, b"\0"))


def shard_index(content: bytes) -> None:
    _set_of_shards("00000.json", content)


def set_index(content: bytes) -> None:
    _set_of_shards("index.json", content)


VGGSOUND = {"annotations/vggsound.csv": "a,1,cat,test\n"}
AUDIOSET = {"annotations/class_labels_indices.csv": "index,mid,display_name\n0,/m/1,cat\n"}
AUDIOSET |= {
    f"annotations/{part}_segments.csv": "a, 1, 11, /m/1\n" for part in ("balanced_train", "unbalanced_train", "eval")
}
AVSBENCH = {"label2idx.json": '{"background": 0, "cat": 1}'}
STILLS = {"frames/1.jpg": "", "audio/1.wav": "", "flickr_test.txt": "1\n", "vgg_test.csv": "1,cat\n"}
# Layout, the file that is fuzzed, and what has to lie beside it.
LAYOUTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("vggsound", "annotations/vggsound.csv", {}), ("vggss", "annotations/vggss.json", VGGSOUND),
    ("audioset", "annotations/class_labels_indices.csv", AUDIOSET),
    ("audioset", "annotations/eval_segments.csv", AUDIOSET),
    ("music", "anno/MUSIC_solo_videos.json", {"anno/MUSIC_duet_videos.json": '{"videos": {}}'}),
    ("music", "anno/music_solo.csv", {"anno/MUSIC_duet_videos.json": '{"videos": {}}'}),
    ("flickr-soundnet", "Annotations/1.xml", STILLS), ("flickr-soundnet", "flickr_test.txt", STILLS),
    ("stills", "vggss.json", STILLS), ("avsbench", "label2idx.json", {}), ("avsbench", "metadata.csv", AVSBENCH),
    ("tags", "tags.csv", {}),
)  # fmt: skip


def annotations(content: bytes) -> None:
    """A file that lists a data set; the first byte says which."""
    if not content:
        return
    layout, name, beside = LAYOUTS[content[0] % len(LAYOUTS)]
    root = PLACE / "set"
    shutil.rmtree(root, ignore_errors=True)
    for other, text in beside.items():
        written(f"set/{other}", text.encode())
    path = written(f"set/{name}", content[1:])
    with suppress(data.LayoutError), warnings.catch_warnings(action="ignore"):
        if layout == "tags":
            read_tags(str(path))
        else:
            data.read(layout, root)


def checkpoint(content: bytes) -> None:
    """Weights: safetensors, or, where it does not begin as these do, a torch file."""
    path = written("w.safetensors" if content[7:9] == b"\0{" else "w.pth", content)
    with suppress(CheckpointError), warnings.catch_warnings(action="ignore"):
        load_encoder(path)


def features(content: bytes) -> None:
    path = written("f.parquet" if content[:4] == b"PAR1" else "f.safetensors", content)
    with suppress(StoreError):
        read_rows(str(path))


def run(content: bytes) -> None:
    """What a folder of a run or of features tells of itself."""
    for name in ("run/run.json", "run/log.jsonl", "run/_manifest.json", "run/checkpoints/step-00000001/manifest.json"):
        written(name, content)
    for name in ("model.safetensors", "state.pt"):
        written(f"run/checkpoints/step-00000001/{name}", b"")
    with suppress(ValueError):
        RunStatus.of(PLACE / "run").cells()
    with suppress(StoreError):
        read_manifest(PLACE / "run")
    damage(PLACE / "run/checkpoints/step-00000001")


SIZES = (0, 1, 2, 3, 5, 8, 16, 17, 33)


def kernels(content: bytes) -> None:
    """Arguments of pair attention, of any shape, stride and type: refused, or the reference's result."""
    bytes_ = iter(content)

    def pick(options):
        return options[next(bytes_, 0) % len(options)]

    def tensor(*shape, dtype):
        layout = pick(range(6))
        if layout == 1:  # [B, N, H, d], as projections are
            shape = [shape[0], shape[2], shape[1], *shape[3:]] if len(shape) == 4 else shape
        x = torch.randn(*shape, generator=generator).to(dtype)
        x = x.transpose(1, 2) if layout == 1 and x.ndim == 4 else x
        if layout == 2 and x.ndim:  # every second
            x = torch.stack([x, x * float("nan")], -1)[..., 0]
        if layout == 3 and x.ndim > 1:
            x = x[:1].expand(x.shape) if x.shape[0] else x
        if layout == 4 and x.ndim > 1:  # a mistake
            x = x[..., : pick((1, 2, 3))]
        return x

    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(content).digest()[:4], "big"))
    dtype = pick((torch.float32, torch.bfloat16, torch.float64, torch.float16))
    B, H, F, N1, N2 = pick((1, 2, 0, 3)), pick((1, 3)), pick(SIZES), pick(SIZES), pick(SIZES)
    dk, dv = pick((16, 8, 1, 5)), pick((16, 4, 23))
    shapes = ((B, H, F, dk), (B, H, N1, dk), (B, H, N1, dv), (B, H, N2, dk), (B, H, N2, dv))
    tensors = [tensor(*shape, dtype=dtype) for shape in shapes]
    masks = {
        name: torch.rand(B, n, generator=generator) > pick((0.3, 0.9, 1.0))
        for name, n in (("mask1", N1), ("mask2", N2)) if pick((False, True))
    }  # fmt: skip
    options = {
        "scale": pick((0.25, 1.0, 0.0, -3.0)),
        "interaction": pick(("sum", "product")),
        "return_lse": True,
    } | masks
    options |= pick(({}, {}, {"dropout_p": 0.5, "seed": 3}))
    gradient = pick((False, True))
    exact = attended("reference", [x.double() for x in tensors], options, gradient)
    plain, found = (attended(backend, tensors, options, gradient) for backend in ("reference", None))
    if isinstance(plain, type) or isinstance(found, type):
        assert plain == found, (plain, found)
        return
    eps = torch.finfo(dtype).eps
    for number, (x, y, z) in enumerate(zip(exact, plain, found, strict=True)):
        assert x.shape == z.shape
        x, y, z = (torch.nan_to_num(each.double(), neginf=-1e4) for each in (x, y, z))
        allowed = 10 * (y - x).norm() + 64 * eps * (x.norm() + max(x.numel(), 1) ** 0.5)
        assert (z - x).norm() <= allowed, (number, (z - x).norm(), allowed, shapes, dtype, options)


def attended(backend: str | None, tensors: list, options: dict, gradient: bool) -> list | type:
    """Output, lse and gradients of pair attention, or the error that refuses the arguments."""
    own = [x.detach().requires_grad_(gradient) for x in tensors]
    try:
        with avfkernels.backend(backend):
            out, lse = avfkernels.pair_attention(*own, **options)
    except (ValueError, TypeError) as error:
        return type(error)
    if gradient:
        (out.double().sum() + lse.masked_fill(lse.isinf(), 0).double().sum()).backward()
    return [x.detach() for x in (out, lse, *(each.grad for each in own)) if x is not None]


CORPUS = Path(__file__).with_name("corpus")
TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (media, stills, shard, shard_index, set_index, annotations, checkpoint, features, run, kernels)
}
