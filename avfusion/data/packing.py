"""Packs a data set into the shards that `avfusion.data.shards` reads."""

import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import soundfile
from PIL import Image
from torch.utils.data import Dataset
from webdataset import TarWriter

from avfusion.common import Progress
from avfusion.data.loader import check_failures
from avfusion.data.sampler import order
from avfusion.data.shards import FORMAT
from avfusion.data.table import Table, read_whole_row
from avfusion.data.workers import TIMEOUT, Workers, batches, reading
from avfusion.files import Held, read_json, sha256, write_json, write_text, writing
from avfusion.media.clip import ClipError

SAMPLE_RATE = 16000
SOUND = {"flac": "FLAC", "wav": "WAV"}


class _Encoder(Dataset):
    """A clip of a table -> its files by extension and the times of its frames in seconds, or its `ClipError`."""

    def __init__(self, table: Table, workers: Workers, *, frame_rate: float, size: int, quality: int, sound: str):
        self.table, self.workers, self.frame_rate, self.size, self.quality, self.sound = (
            table,
            workers,
            frame_rate,
            size,
            quality,
            sound,
        )

    def __getitem__(self, index: int) -> tuple[dict[str, bytes], list[float]] | ClipError:
        row = self.table.rows[index]
        self.workers.reads(index)
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
    timeout: float = TIMEOUT,
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
        timeout: seconds without a clip of theirs that end the call.
        max_failed: the share of clips that may fail, as in `ClipLoader`.

    Raises:
        ValueError: an argument is out of range; `out` holds shards of another list of clips or with other settings.
        RuntimeError: too many clips failed; a worker died, or none gave anything; `out` is in use (`InUse`).
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
    encoder = {"frame_rate": frame_rate, "size": size, "quality": quality, "sound": sound}
    made = {"format": FORMAT, "source": table.sha256, "clips_per_shard": clips_per_shard, **encoder}
    clips = order(len(table), 0, 0).tolist()
    parts = [clips[at : at + clips_per_shard] for at in range(0, len(clips), clips_per_shard)]
    workers = Workers(num_workers)
    with Held(out):
        done = [_finished(out / f"{number:05d}.json", made) for number in range(len(parts))]
        todo = [index for part, shard in zip(parts, done, strict=True) if not shard for index in part]
        # batch_size None: one clip after the other, in the order of the sampler
        loader = reading(_Encoder(table, workers, **encoder), workers, batch_size=None, sampler=todo)
        encoded = batches(loader, workers, lambda index: str(table.rows[index].path), timeout)
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
        listed = [{"name": f"{number:05d}", "samples": len(shard["samples"]),
                   "index_sha256": sha256(out / f"{number:05d}.json")}
                  for number, shard in enumerate(shards)]  # fmt: skip
        index = made | {"layout": table.layout, "classes": table.classes, "missing": table.missing, "shards": listed}
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
    facts = {"made": made, "bytes": tar.stat().st_size, "sha256": sha256(tar)}
    facts |= {"samples": [sample for sample, _ in listed], "failed": [e.args for e in failed]}
    write_json(tar.with_suffix(".json"), facts, separators=(",", ":"))


def _finished(index: Path, made: dict) -> dict | None:
    """The index of a shard that is complete, None where there is none."""
    try:
        shard = read_json(index)
        shard["made"], shard["bytes"], shard["samples"], shard["failed"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or a damaged one
        return None
    if shard["made"] != made:
        different = ", ".join(name for name in made if shard["made"].get(name) != made[name])
        raise ValueError(f"{index}: a shard made with another {different}: choose another folder, or delete this one")
    tar = index.with_suffix(".tar")
    return shard if tar.exists() and tar.stat().st_size == shard["bytes"] else None
