"""A folder of features: shards of rows, which appear as a whole or not at all, and a manifest.

DIR/000-000000.parquet      rows: file, window, windows, start, end, frame_time; image, audio, fusion [D]; with all
                            tokens also x_image, x_audio, x_fusion [tokens, D]: fixed-size lists
DIR/_manifest.json          the model, the settings, the files that are done, and those that failed and why

What is done is read off the shards: a run that was stopped or killed goes on after the last of them.
"""

import io
import json
import os
import re
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch

from avfusion.common import why
from avfusion.files import Held, InUse, sorted_header, write_json, writing
from avfusion.media.clip import ClipError
from avfusion.remote import filesystem, is_remote

Rows = dict[str, np.ndarray]

PLACE = ("file", "window", "windows")
STORED = (*PLACE, "start", "end", "frame_time")
FACTS = (*STORED, "stream", "reason")
POOLED, TOKENS = ("image", "audio", "fusion"), ("x_image", "x_audio", "x_fusion")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMAT = "avfusion-features-1"
MANIFEST = "_manifest.json"  # readers of folders of Parquet pass over names with an underscore
SHARD = 64 << 20  # bytes
HEADER = 100 << 20  # bytes, the most that safetensors allows
MINUTES = 5  # after so many a shard is written, full or not


class StoreError(RuntimeError):
    """Features that cannot be written, or read; the message names the folder or the file, and the remedy."""


def write_rows(path: str, rows: Rows, made: dict[str, Any]) -> None:
    """Write rows to one file, in the format of its suffix; it appears as a whole or not at all. Raises StoreError.

    `made` is what they were made with; `made["stored"]` is the type of the features, one of `DTYPES`.
    """
    write = _parquet if path.endswith(".parquet") else _safetensors
    try:
        if is_remote(path):  # stores show an object when all of it has arrived; of half of one, they would show that
            write(data := io.BytesIO(), rows, made)
            files, name = filesystem(path)
            files.pipe_file(name, data.getvalue())
            return
        with writing(path) as part, open(part, "wb") as file:
            write(file, rows, made)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror or error}): make room, or make it writable, and "
                         "run the same command again") from error  # fmt: skip


def _parquet(file: BinaryIO, rows: Rows, made: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = {"fp32": np.float32, "fp16": np.float16}[made["stored"]]
    columns = {}
    for name, x in rows.items():
        column = pa.array(x.tolist(), pa.string()) if x.dtype == object else pa.array(x.reshape(-1).astype(
            x.dtype if x.ndim == 1 else kind, copy=False))  # fmt: skip
        for size in reversed(x.shape[1:]):
            column = pa.FixedSizeListArray.from_arrays(column, size)
        columns[name] = column
    table = pa.table(columns).replace_schema_metadata({"avfusion": json.dumps(made)})
    pq.write_table(table, file, use_dictionary=["file"], compression="zstd", write_page_checksum=True)


def _safetensors(file: BinaryIO, rows: Rows, made: dict[str, Any]) -> None:
    facts = {name: x.tolist() for name, x in rows.items() if x.ndim == 1}
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(x)).to(DTYPES[made["stored"]])
        for name, x in rows.items() if x.ndim > 1
    }  # fmt: skip
    content = safetensors.torch.save(tensors, {"avfusion": json.dumps(made), "rows": json.dumps(facts)})
    (size,) = struct.unpack("<Q", content[:8])
    file.write(content[:8] + sorted_header(content[8 : 8 + size]) + content[8 + size :])


def read_rows(path: str, columns: Sequence[str] | None = None) -> tuple[Rows, dict[str, Any]]:
    """The columns of a file that `write_rows` wrote (None: all), features as float32, and what they were made with.

    Raises StoreError where it is none.
    """
    try:
        files, name = filesystem(path)
        with files.open(name, "rb") as file:
            return (_read_parquet if path.endswith(".parquet") else _read_safetensors)(file, columns)
    except Exception as error:  # whatever readers make of a file that is none
        raise StoreError(f"{path}: not features that avfusion wrote ({why(error)})") from error


def _read_parquet(file, columns: Sequence[str] | None) -> tuple[Rows, dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = pq.ParquetFile(file, page_checksum_verification=True)
    made = json.loads(whole.schema_arrow.metadata[b"avfusion"])
    rows, table = {}, whole.read(None if columns is None else list(columns))
    for name in table.column_names:
        column, shape = table[name].combine_chunks(), []
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks)
        while pa.types.is_fixed_size_list(column.type):
            shape.append(column.type.list_size)
            column = column.flatten()
        x = column.to_numpy(zero_copy_only=False)
        rows[name] = x.astype(np.float32).reshape(-1, *shape) if shape else x
    return rows, made


def _read_safetensors(file, columns: Sequence[str] | None) -> tuple[Rows, dict[str, Any]]:
    (size,) = struct.unpack("<Q", file.read(8))
    if size > HEADER:
        raise ValueError(f"a header of {size} bytes")
    told = json.loads(file.read(size))["__metadata__"]
    if "clips" in told:  # of version 0.1: one window of each clip
        count = len(json.loads(told["clips"]))
        facts = {"file": json.loads(told["clips"]), "start": json.loads(told["starts"]), "window": [0] * count}
        made = {name: json.loads(told[name]) for name in ("config", "checkpoint", "weights", "failed") if name in told}
    else:
        facts, made = json.loads(told["rows"]), json.loads(told["avfusion"])
    rows = {name: np.array(x, object if name == "file" else None) for name, x in facts.items()}
    if columns is None or not set(columns) <= set(STORED):
        file.seek(0)
        tensors = safetensors.torch.load(file.read())
        rows |= {name: x.float().numpy() for name, x in tensors.items()}
        if "pooled" in rows:
            rows |= zip(POOLED, np.moveaxis(rows.pop("pooled"), 1, 0), strict=True)
    return {name: x for name, x in rows.items() if columns is None or name in columns}, made


def shards(path: str | os.PathLike) -> list[str]:
    """The files of features in a folder, or the file itself. Raises StoreError where there are none."""
    path = os.fspath(path).rstrip("/")
    files, name = filesystem(path)
    if not files.isdir(name):
        if not files.exists(name):
            raise StoreError(f"{path}: no such file or folder; avfusion embed writes one")
        return [path]
    found = sorted(os.path.basename(entry) for entry in files.ls(name, detail=False))
    found = [f"{path}/{entry}" for entry in found
             if entry.endswith((".parquet", ".safetensors")) and entry[0] not in "._"]  # fmt: skip
    if not found:
        raise StoreError(f"{path}: no features in this folder; avfusion embed writes them")
    return found


def read_manifest(path: str | os.PathLike) -> dict[str, Any] | None:
    """What a folder was made with, and which files are done and failed; None where it has none."""
    files, name = filesystem(os.fspath(path).rstrip("/"))
    if not files.exists(f"{name}/{MANIFEST}"):
        return None
    try:
        manifest = json.loads(files.cat_file(f"{name}/{MANIFEST}"))
        if manifest["made"]["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['made']['format']!r}, not {FORMAT!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}/{MANIFEST}: cannot be read ({error}): give another folder, or delete it") from error
    return manifest


class Store:
    """Writes rows into a folder, or an address of `avfusion.remote`, and goes on where a run before ended.

    Args:
        out: the folder.
        made: what the rows are made with, as JSON can hold it: of another, the folder is refused. The `checkpoint`'s
            name does not count, its `weights` do.
        suffix: the format of the shards, "parquet" or "safetensors".
        shard_rows: rows a shard; None: 64 MiB. One is also written each five minutes.
        rank: of this process; each writes its own shards, and the first holds the folder's lock.

    `whole` are files whose windows are all there, `begun` the windows of others, `rows` how many there are in all.
    Raises StoreError where the folder is another run's, in use, or cannot be written.
    """

    def __init__(
        self, out: str | os.PathLike, made: dict[str, Any], *, suffix: str = "parquet", shard_rows: int | None = None,
        rank: int = 0,
    ):  # fmt: skip
        self.out, self.suffix, self.rank = os.fspath(out).rstrip("/"), suffix, rank
        self.made = {"format": FORMAT, "shards": suffix} | json.loads(json.dumps(made))
        self.shard_rows, self.written = shard_rows, time.monotonic()
        self.waiting: Rows = {}  # columns, of which so many rows are filled
        self.filled = 0
        self.whole: set[str] = set()
        self.begun: dict[str, set[int]] = {}
        self.rows, self.number, self.lock = 0, 0, None
        try:
            self._begin()
        except BaseException:
            self.release()
            raise

    def _begin(self) -> None:
        rank = self.rank
        if not is_remote(self.out) and rank == 0:
            try:
                self.lock = Held(self.out)
            except InUse as error:
                raise StoreError(str(error)) from None
        if (found := read_manifest(self.out)) is not None:
            self._compare(found["made"])
        elif rank == 0:
            self._write_manifest({})
        self._look()

    def _compare(self, other: dict[str, Any]) -> None:
        told = "; ".join(
            f"{name} {_short(other.get(name))}, now {_short(self.made.get(name))}"
            for name in sorted(self.made.keys() | other.keys()) if name != "checkpoint"
            and other.get(name) != self.made.get(name)
        )  # fmt: skip
        if told:
            raise StoreError(f"{self.out}: holds features made otherwise ({told}): give another folder, or delete it")

    def _look(self) -> None:
        """Finds out what is there."""
        try:
            found = shards(self.out)
        except StoreError:
            return
        windows: dict[str, set[int]] = {}
        for path in found:
            place = re.fullmatch(r"(\d+)-(\d+)\.\w+", os.path.basename(path))
            if place is None:
                raise StoreError(f"{path}: no file of avfusion embed: give a folder of its own")
            if int(place[1]) == self.rank:
                self.number = int(place[2]) + 1
            rows, _ = read_rows(path, PLACE)
            self.rows += len(rows["file"])
            for file, window, count in zip(*(rows[name].tolist() for name in PLACE), strict=True):
                windows.setdefault(file, set()).add(window)
                if len(windows[file]) == count:
                    self.whole.add(file)
        self.begun = {file: windows for file, windows in windows.items() if file not in self.whole}

    def add(self, rows: Rows) -> None:
        """Rows of whole windows; they are written when a shard is full."""
        count = len(rows["file"])
        if not count:
            return
        if self.shard_rows is None:
            size = sum(x[0].size for x in rows.values() if x.ndim > 1) * DTYPES[self.made["stored"]].itemsize
            self.shard_rows = max(SHARD // size, 1)
        if self.waiting and self.filled + count > len(self.waiting["file"]):
            self.flush()
        if not self.waiting:
            # One block a column, and no array a batch: what is kept between large arrays that come and go splits the
            # heap, which then grows by half a megabyte a row.
            size = self.shard_rows + count
            self.waiting = {name: np.empty((size, *rows[name].shape[1:]), rows[name].dtype)
                            for name in rows if name not in ("stream", "reason")}  # fmt: skip
        for name, column in self.waiting.items():
            column[self.filled : self.filled + count] = rows[name]
        self.filled += count
        if self.filled >= self.shard_rows or time.monotonic() - self.written > 60 * MINUTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a shard. Raises StoreError."""
        if not self.filled:
            return
        rows = {name: column[: self.filled] for name, column in self.waiting.items()}
        write_rows(f"{self.out}/{self.rank:03d}-{self.number:06d}.{self.suffix}", rows, self.made)
        self.number, self.rows, self.written = self.number + 1, self.rows + self.filled, time.monotonic()
        self.waiting, self.filled = {}, 0

    def close(self, failed: Sequence[ClipError] = (), *, stopped: bool = False) -> None:
        """Write what waits, and the manifest: what is done, which files failed, and whether the run has ended."""
        self.flush()
        if self.rank == 0:
            self.whole, self.begun, self.rows = set(), {}, 0
            self._look()
            self._write_manifest({
                "rows": self.rows, "stopped": stopped, "done": sorted(self.whole),
                "partly": {file: len(windows) for file, windows in sorted(self.begun.items())},
                "failed": [error.args for error in failed],
            })  # fmt: skip
        self.release()

    def release(self) -> None:
        """Leaves the folder to others."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    def _write_manifest(self, found: dict[str, Any]) -> None:
        content, path = {"made": self.made} | found, f"{self.out}/{MANIFEST}"
        if is_remote(path):
            files, name = filesystem(path)
            files.pipe_file(name, json.dumps(content, indent=1).encode())
        else:
            write_json(path, content, indent=1)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def parts(path: str | os.PathLike, columns: Sequence[str]) -> Iterator[Rows]:
    """Some columns of the rows in a folder or a file, shard by shard. Raises StoreError."""
    for shard in shards(path):
        yield read_rows(shard, columns)[0]
