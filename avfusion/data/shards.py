"""Data sets packed into WebDataset shards: tar files of JPEG frames, 16 kHz sound and labels, and an index of them.

Any WebDataset reader can stream the tars. The index makes every clip accessible by its number, so that the sampler,
the failures and the resuming are those of video files: see `avfusion.data.loader`.
"""

import hashlib
import io
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock

from avfusion.common import why
from avfusion.data.table import LayoutError, Row, check_split
from avfusion.files import JSON_BYTES, read_json, sha256
from avfusion.media.clip import Clip, ClipError
from avfusion.media.stills import still_clip

FORMAT = "avfusion-shards-1"
MEMBERS = 1_000_000  # files of a shard, at most
NAMED = 8  # shards that an error message names


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
        LayoutError: a shard is missing, short or of another set, or an index is none; the message names them.
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
        self.sha256 = sha256(path)
        index, splits = _load(path), set()
        try:
            self.layout, self.classes = str(index["layout"]), tuple(map(str, index["classes"]))
            listed = [(str(entry["name"]), str(entry["index_sha256"])) for entry in index["shards"]]
        except (KeyError, TypeError) as error:
            raise LayoutError(f"{path}: not the index of a set of shards ({why(error)})") from error
        self.shards, self.rows, files, times, broken = [], [], [], [], []
        for name, digest in listed:
            if not re.fullmatch(r"\d{5,}", name):
                raise LayoutError(f"{path}: the shard's name {name!r} is not a number")
            own, tar = self.folder / f"{name}.json", self.folder / f"{name}.tar"
            if self.remote:
                self._fetch(own.name, digest, JSON_BYTES)
            elif not own.exists() or sha256(own) != digest:
                broken.append(f"{own.name} is {'not the one that index.json names' if own.exists() else 'missing'}")
                continue
            shard, count = _load(own), len(self.rows)
            for sample, row, members, moments in _samples(own, shard, tar.name, self.classes):
                splits.add(sample["split"])
                if split in (None, sample["split"]):
                    self.rows.append(row), files.append(members), times.append(moments)
            size, there = shard["bytes"], tar.stat().st_size if tar.exists() else None
            if self.remote and there not in (None, size):
                tar.unlink()  # it is fetched again
            elif not self.remote and there != size:
                broken.append(f"{tar.name} " + ("is missing" if there is None else f"has {there:,} of {size:,} bytes"))
            self.shards.append((tar.name, shard["sha256"], size, len(self.rows) - count))
        if broken:
            some = "; ".join(broken[:NAMED]) + (f"; ... ({len(broken)} in all)" if len(broken) > NAMED else "")
            raise LayoutError(f"{self.folder}: not all of its {len(listed)} shards are whole: {some}. Copy them again, "
                              "or delete these and pack the set again")  # fmt: skip
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
            digest, size = next((digest, size) for shard, digest, size, _ in self.shards if shard == tar.name)
            self._fetch(tar.name, digest, size)
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
            for name, digest, *_ in self.shards
            if not (self.folder / name).is_file() or sha256(self.folder / name) != digest
        ]

    def _fetch_index(self) -> None:
        """Get the index, anew each time; its hash names the folder of the cache that everything goes to."""
        with FileLock(self.folder / ".index.lock"):
            part = self.folder / ".index.json.part"
            _download(f"{self.location.rstrip('/')}/index.json", part, self.schemes, JSON_BYTES)
            self.folder /= sha256(part)[:16]
            self.folder.mkdir(exist_ok=True)
            os.replace(part, self.folder / "index.json")

    def _fetch(self, name: str, digest: str, most: int) -> None:
        """Get a file, of so many bytes at most, into the cache, whole and checked."""
        path = self.folder / name
        if path.exists():
            return
        with FileLock(self.folder / f".{name}.lock"):  # the workers of a loader need the same shard at the same time
            if path.exists():
                return
            part = path.with_name(f".{name}.part")
            _download(f"{self.location.rstrip('/')}/{name}", part, self.schemes, most)
            if sha256(part) != digest:
                part.unlink()
                raise LayoutError(f"{self.location}/{name}: not the file that index.json names (sha256 {digest})")
            os.replace(part, path)


class _SameSchemes(urllib.request.HTTPRedirectHandler):
    def __init__(self, schemes: tuple[str, ...]):
        self.schemes = schemes

    def redirect_request(self, request, file, code, message, headers, url):
        if urllib.parse.urlsplit(url).scheme not in self.schemes:
            raise LayoutError(f"{request.full_url}: redirects to {url}, expected {' or '.join(self.schemes)}")
        return super().redirect_request(request, file, code, message, headers, url)


def _download(url: str, path: Path, schemes: tuple[str, ...], most: int, attempts: int = 3) -> None:
    opener = urllib.request.build_opener(_SameSchemes(schemes))
    for attempt in range(attempts):
        try:
            with opener.open(url, timeout=60) as response, open(path, "wb") as file:
                while block := response.read(1 << 20):
                    if file.tell() + len(block) > most:
                        raise LayoutError(f"{url}: more than the {most:,} bytes that it may have")
                    file.write(block)
            return
        except OSError as error:
            final = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if final or attempt == attempts - 1:
                raise RuntimeError(f"{url}: {error}") from error  # no fault of a clip: it ends the run
            time.sleep(2**attempt)


def _load(path: Path) -> dict:
    try:
        content = read_json(path)
        form = content.get("format", content.get("made", {}).get("format"))
    except (OSError, ValueError) as error:
        raise LayoutError(str(error)) from error
    except AttributeError:
        raise LayoutError(f"{path}: not an index of shards, which is a JSON object") from None
    if form != FORMAT:
        raise LayoutError(f"{path}: its format is {form!r}, expected {FORMAT!r}")
    return content


def _samples(path: Path, shard: dict, tar: str, classes: tuple) -> Iterator[tuple[dict, Row, np.ndarray, np.ndarray]]:
    """Facts, row, members [n, 3] (offset, size, CRC) and times [n - 1] of each clip of a shard.

    Raises LayoutError for what `pack` does not write.
    """
    try:
        size, count = int(shard["bytes"]), 0
        str(shard["sha256"])
        for sample in shard["samples"]:
            files, times = np.array(sample["files"], np.int64), np.array(sample["times"], np.float32)
            labels = tuple(sample["labels"])
            count += len(files)
            if count > MEMBERS:
                raise ValueError(f"more than the {MEMBERS:,} files that a shard may have")
            if files.ndim != 2 or files.shape[1] != 3 or times.shape != (len(files) - 1,) or not len(times):
                raise ValueError("frames, their times and the sound do not belong together")
            if (files[:, :2] < 0).any() or (files[:, 0] > size - files[:, 1]).any() or not np.isfinite(times).all():
                raise ValueError("a file outside of the shard, or a time that is none")
            if not all(label in range(len(classes)) for label in (*labels, *filter(None, [sample["label"]]))):
                raise ValueError(f"a label that is none of the {len(classes)} classes")
            if not isinstance(sample["id"], str) or not isinstance(sample["extra"], dict):
                raise TypeError("an id or extra facts that are none")
            facts = {name: sample[name] for name in ("id", "start", "label", "split", "extra")}
            yield sample, Row(path=Path(tar), labels=labels, **facts), files, times
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise LayoutError(f"{path}: not the index of a shard ({why(error)})") from error
