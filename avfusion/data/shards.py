"""Data sets packed into WebDataset shards: tar files of JPEG frames, 16 kHz sound and labels, and an index of them.

Any WebDataset reader can stream the tars. The index makes every clip accessible by its number, so that the sampler,
the failures and the resuming are those of video files: see `avfusion.data.loader`.
"""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
from filelock import FileLock
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from webdataset import TarWriter

from avfusion.common import Progress, write_json, write_text, writing
from avfusion.data.loader import check_failures
from avfusion.data.sampler import order
from avfusion.data.table import LayoutError, Row, Table, check_split, read_whole_row
from avfusion.media.clip import Clip, ClipError
from avfusion.media.stills import still_clip

FORMAT = "avfusion-shards-1"
SAMPLE_RATE = 16000
SOUND = {"flac": "FLAC", "wav": "WAV"}


class _Encoder(Dataset):
    """A clip of a table -> its files by extension and the times of its frames in seconds, or its `ClipError`."""

    def __init__(self, table: Table, *, frame_rate: float, size: int, quality: int, sound: str):
        self.table, self.frame_rate, self.size, self.quality, self.sound = table, frame_rate, size, quality, sound

    def __getitem__(self, index: int) -> tuple[dict[str, bytes], list[float]] | ClipError:
        row = self.table.rows[index]
        try:
            frames, waveform = read_whole_row(
                row, frame_rate=self.frame_rate, sample_rate=SAMPLE_RATE, transform=self._jpeg
            )
        except ClipError as error:
            return error
        except Exception as error:  # a bug, or a library's: it ends the run, and says at which clip
            raise RuntimeError(f"{row.path}: {type(error).__name__} while reading this clip") from error
        files = {f"{number:05d}.jpg": image for number, (_, image) in enumerate(frames)}
        buffer = io.BytesIO()
        samples = (waveform[0] * 32767).round().short().numpy()
        soundfile.write(buffer, samples, SAMPLE_RATE, format=SOUND[self.sound], subtype="PCM_16")
        return files | {self.sound: buffer.getvalue()}, [round(time, 3) for time, _ in frames]

    def _jpeg(self, image: Image.Image) -> bytes:
        scale = self.size / min(image.size)
        if scale < 1:
            image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue()


def pack(
    table: Table,
    out: str | os.PathLike,
    *,
    frame_rate: float = 4.0,
    size: int = 256,
    quality: int = 90,
    sound: str = "flac",
    clips_per_shard: int = 256,
    num_workers: int = 0,
    max_failed: float = 0.05,
    progress: bool = False,
) -> list[ClipError]:
    """Pack a table into `out`: 00000.tar, 00000.json, ... and at last index.json. Returns the clips that failed.

    They are also listed in failed.jsonl, and left out.

    The clips are shuffled first, so that every shard is a fair sample of the set. A call that was interrupted goes on
    with the next shard when it is repeated; a shard appears complete or not at all.

    Args:
        frame_rate: JPEG frames a second.
        size: of the frames' short side, in pixels; smaller frames are kept as they are.
        quality: of the JPEG files, to 95.
        sound: "flac" or, larger and faster to read, "wav"; mono, 16 bit, 16 kHz.
        num_workers: processes that decode and encode.
        max_failed: the share of clips that may fail, as in `ClipLoader`.

    Raises:
        ValueError: an argument is out of range; `out` holds shards of another list of clips or with other settings.
        RuntimeError: too many clips failed.
    """
    if sound not in SOUND:
        raise ValueError(f"sound={sound!r}: expected one of {', '.join(SOUND)}")
    for name, value, least in (("size", size, 16), ("quality", quality, 1), ("clips_per_shard", clips_per_shard, 1)):
        if value < least:
            raise ValueError(f"{name}={value}: expected at least {least}")
    if not 0 < frame_rate <= 60:
        raise ValueError(f"frame_rate={frame_rate}: expected frames a second, to 60")
    if any("path_2" in row.extra for row in table.rows):
        raise ValueError("these are pairs of clips: pack the clips themselves, which lie in the other splits")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    encoder = {"frame_rate": frame_rate, "size": size, "quality": quality, "sound": sound}
    made = {"format": FORMAT, "source": table.sha256, "clips_per_shard": clips_per_shard, **encoder}
    clips = order(len(table), 0, 0).tolist()
    parts = [clips[at : at + clips_per_shard] for at in range(0, len(clips), clips_per_shard)]
    for part in out.glob(".*.part"):
        part.unlink()
    done = [_finished(out / f"{number:05d}.json", made) for number in range(len(parts))]
    todo = [index for part, shard in zip(parts, done, strict=True) if not shard for index in part]
    encoded = iter(
        DataLoader(_Encoder(table, **encoder), batch_size=None, sampler=todo, num_workers=num_workers)
    )  # batch_size None: one clip after the other, in the order of the sampler

    tried, errors = 0, []
    with Progress(len(clips), "clip", initial=len(clips) - len(todo), show=progress) as shown:
        for number, part in enumerate(parts):
            if done[number]:
                failed = [ClipError(*args) for args in done[number]["failed"]]
            else:
                failed = []
                samples = _encoded(table, part, islice(encoded, len(part)), failed, shown)
                _write(out / f"{number:05d}.tar", samples, made, failed)
            tried, errors = tried + len(part), errors + failed
            lines = (json.dumps({"path": e.path, "stream": e.stream, "reason": e.reason}) + "\n" for e in errors)
            write_text(out / "failed.jsonl", "".join(lines))
            where = f"all are in {out / 'failed.jsonl'}"
            check_failures(len(errors), tried, len(clips), max_failed, errors[-1:], where)
    shards = [_finished(out / f"{number:05d}.json", made) for number in range(len(parts))]
    index = made | {
        "layout": table.layout,
        "classes": table.classes,
        "missing": table.missing,
        "shards": [
            {
                "name": f"{number:05d}",
                "samples": len(shard["samples"]),
                "index_sha256": _sha256(out / f"{number:05d}.json"),
            }
            for number, shard in enumerate(shards)
        ],
    }
    write_json(out / "index.json", index, separators=(",", ":"))
    return errors


def _encoded(
    table: Table, part: list[int], encoded: Iterator, failed: list[ClipError], shown: Progress
) -> Iterator[dict]:
    """WebDataset samples of one shard; failures are appended to `failed`."""
    for index, result in zip(part, encoded, strict=True):
        shown.update(shown.done + 1)
        if isinstance(result, ClipError):
            failed.append(result)
            continue
        row, (files, times) = table.rows[index], result
        labels = row.labels if row.label is None else (row.label,)
        facts = {"id": row.id, "start": row.start, "label": row.label, "labels": row.labels, "split": row.split}
        facts |= {"names": [table.classes[label] for label in labels], "extra": row.extra, "times": times}
        yield {"__key__": f"{index:08d}", **files, "json": json.dumps(facts).encode()}


def _write(tar: Path, samples: Iterator[dict], made: dict, failed: list[ClipError]) -> None:
    """A shard, and then its index: facts of every clip, and offset, size and CRC of its frames and, last, its sound."""
    listed = []
    with writing(tar) as part:
        with open(part, "wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
            for sample in samples:
                writer.write(sample)
                checks = {
                    f"{sample['__key__']}.{name}": zlib.crc32(sample[name]) for name in sorted(sample) if name[0] != "_"
                }
                listed.append((json.loads(sample["json"]), checks))
        with tarfile.open(part) as archive:
            members = {member.name: member for member in archive}
    for facts, checks in listed:
        facts["files"] = [
            [members[name].offset_data, members[name].size, crc]
            for name, crc in checks.items()
            if not name.endswith(".json")
        ]
    facts = {"made": made, "bytes": tar.stat().st_size, "sha256": _sha256(tar)}
    facts |= {"samples": [sample for sample, _ in listed], "failed": [e.args for e in failed]}
    write_json(tar.with_suffix(".json"), facts, separators=(",", ":"))


def _finished(index: Path, made: dict) -> dict | None:
    """The index of a shard that is complete, None where there is none."""
    if not index.exists():
        return None
    shard = json.loads(index.read_text(encoding="utf-8"))
    if shard["made"] != made:
        different = ", ".join(name for name in made if shard["made"].get(name) != made[name])
        raise ValueError(f"{index}: a shard made with another {different}: choose another folder, or delete this one")
    tar = index.with_suffix(".tar")
    return shard if tar.exists() and tar.stat().st_size == shard["bytes"] else None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Shards:
    """The clips in packed shards, by number: a source for `ClipLoader`.

    Args:
        location: the folder that `pack` wrote, or the https address that it is served at.
        split: only the clips of this split; None or "all": all of them.
        cache: for an address: a folder to keep what has been fetched, for each index in a folder of its own. A shard is
            fetched when a clip of it is first needed, and checked against the hash in the index.
        allow_http: fetch over plain http too. Other schemes, such as the `pipe:` of WebDataset, which runs a command
            in a shell, are refused.

    Raises:
        LayoutError: there is no complete set of shards, or it is damaged.
        ValueError: an address of another scheme, or one without `cache`; no clip is of that split.
    """

    def __init__(
        self, location: str | os.PathLike, split: str | None = None, *, cache: str | os.PathLike | None = None,
        allow_http: bool = False,
    ):  # fmt: skip
        split = None if split == "all" else split
        self.location, self.schemes = os.fspath(location), ("https", "http") if allow_http else ("https",)
        scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+):", self.location)
        if scheme and scheme[1] not in self.schemes:
            raise ValueError(
                f"{location}: expected a folder or an address that begins with {' or '.join(self.schemes)}:"
            )
        if scheme and cache is None:
            raise ValueError(f"{location}: cache= must name a folder that keeps what is fetched")
        self.remote, self.folder = bool(scheme), Path(cache) if scheme else Path(location)
        if self.remote:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._fetch_index()
        path = self.folder / "index.json"
        if not path.is_file():
            raise LayoutError(f"{path}: no such file; avfusion shard writes it when all shards are complete")
        self.sha256 = _sha256(path)
        index, splits = _load(path), set()
        self.layout, self.classes = index["layout"], tuple(index["classes"])
        self.shards, self.rows, files, times = [], [], [], []
        for entry in index["shards"]:
            if not re.fullmatch(r"\d{5,}", entry["name"]):
                raise LayoutError(f"{path}: the shard's name {entry['name']!r} is not a number")
            name = f"{entry['name']}.json"
            if self.remote:
                self._fetch(name, entry["index_sha256"])
            shard = _load(self.folder / name)
            count = len(self.rows)
            for sample in shard["samples"]:
                splits.add(sample["split"])
                if split not in (None, sample["split"]):
                    continue
                facts = {name: sample[name] for name in ("id", "start", "label", "split", "extra")}
                self.rows.append(Row(path=Path(f"{entry['name']}.tar"), labels=tuple(sample["labels"]), **facts))
                files.append(np.array(sample["files"], np.int64))
                times.append(np.array(sample["times"], np.float32))
            self.shards.append((f"{entry['name']}.tar", shard["sha256"], len(self.rows) - count))
        check_split(split, sorted(splits - {None}))
        if split is not None and splits != {split}:  # another list of clips than all of them
            self.sha256 = hashlib.sha256(f"{self.sha256} {split}".encode()).hexdigest()
        # Flat arrays: workers share them with their parent, which they would not do with lists.
        self.first = np.cumsum([0, *map(len, files)])
        self.files, self.times = np.concatenate([*files, np.empty((0, 3), int)]), np.concatenate([*times, np.empty(0)])

    @property
    def sizes(self) -> list[int]:
        """How many clips of each shard there are."""
        return [count for *_, count in self.shards]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Tar file and id, to show for a clip."""
        return f"{self.folder / self.rows[index].path}: {self.rows[index].id}"

    def read(self, index: int, **window) -> Clip:
        """`avfusion.read_clip` for a packed clip; its frames are those that were packed. Raises `ClipError`."""
        name, tar = self.name(index), self.folder / self.rows[index].path
        if self.remote:
            digest = next(digest for shard, digest, _ in self.shards if shard == tar.name)
            self._fetch(tar.name, digest)
        files = self.files[self.first[index] : self.first[index + 1]].tolist()
        begin = self.first[index] - index  # every clip before this one has one time less than it has files
        times = self.times[begin : begin + len(files) - 1].tolist()
        try:
            with open(tar, "rb") as file:

                def member(number: int, stream: str) -> io.BytesIO:
                    offset, size, crc = files[number]
                    file.seek(offset)
                    content = file.read(size)
                    if zlib.crc32(content) != crc:
                        raise ClipError(name, stream, "the shard is damaged here: pack or fetch it again")
                    return io.BytesIO(content)

                return still_clip(name, member(-1, "audio"), times, lambda i: member(i, "video"), **window)
        except OSError as error:
            raise ClipError(name, "file", f"cannot be read: {error}") from error

    def verify(self) -> list[str]:
        """The tars that are missing or differ from the hash in the index."""
        return [
            name
            for name, digest, _ in self.shards
            if not (self.folder / name).is_file() or _sha256(self.folder / name) != digest
        ]

    def _fetch_index(self) -> None:
        """Get the index, anew each time; its hash names the folder of the cache that everything goes to."""
        with FileLock(self.folder / ".index.lock"):
            part = self.folder / ".index.json.part"
            _download(f"{self.location.rstrip('/')}/index.json", part, self.schemes)
            self.folder /= _sha256(part)[:16]
            self.folder.mkdir(exist_ok=True)
            os.replace(part, self.folder / "index.json")

    def _fetch(self, name: str, sha256: str) -> None:
        """Get a file into the cache, whole and checked."""
        path = self.folder / name
        if path.exists():
            return
        with FileLock(self.folder / f".{name}.lock"):  # the workers of a loader need the same shard at the same time
            if path.exists():
                return
            part = path.with_name(f".{name}.part")
            _download(f"{self.location.rstrip('/')}/{name}", part, self.schemes)
            if _sha256(part) != sha256:
                part.unlink()
                raise LayoutError(f"{self.location}/{name}: not the file that index.json names (sha256 {sha256})")
            os.replace(part, path)


class _SameSchemes(urllib.request.HTTPRedirectHandler):
    def __init__(self, schemes: tuple[str, ...]):
        self.schemes = schemes

    def redirect_request(self, request, file, code, message, headers, url):
        if urllib.parse.urlsplit(url).scheme not in self.schemes:
            raise LayoutError(f"{request.full_url}: redirects to {url}, expected {' or '.join(self.schemes)}")
        return super().redirect_request(request, file, code, message, headers, url)


def _download(url: str, path: Path, schemes: tuple[str, ...], attempts: int = 3) -> None:
    opener = urllib.request.build_opener(_SameSchemes(schemes))
    for attempt in range(attempts):
        try:
            with opener.open(url, timeout=60) as response, open(path, "wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)
            return
        except OSError as error:
            final = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if final or attempt == attempts - 1:
                raise RuntimeError(f"{url}: {error}") from error  # no fault of a clip: it ends the run
            time.sleep(2**attempt)


def _load(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LayoutError(f"{path}: {error}") from error
    form = content.get("format", content.get("made", {}).get("format"))
    if form != FORMAT:
        raise LayoutError(f"{path}: its format is {form!r}, expected {FORMAT!r}")
    return content
