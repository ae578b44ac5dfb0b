"""Files: whole or not at all, of one process at a time, with digests; tensors whose bytes tell nothing but the tensors.

What others have made is read within limits, so that a hostile file costs no more than they say.
"""

import hashlib
import json
import os
import platform
import shutil
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

JSON_BYTES = 256 << 20  # of a file of JSON: the index of a shard of 10,000 clips is a tenth of it
XML_BYTES = 1 << 20  # of an annotation of one picture


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when the block ends; after an error nothing has happened."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _named(path):
            part.touch()
            mode = part.stat().st_mode
            yield part
            os.chmod(part, mode)  # what the user's mask makes of it: libraries that write for themselves ask for 0600
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What fails in writing does not name the file, as a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Adds lines to a file; what a process that was killed left as half a line stays one of its own."""
    with _named(path), open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write("".join(f"{line}\n" for line in lines).encode())


def write_text(path: str | os.PathLike, text: str) -> None:
    with writing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any, **options) -> None:
    write_text(path, json.dumps(content, **options) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """What a file of JSON holds. Raises ValueError, naming it, where it is none or has more than `JSON_BYTES`."""
    check_size(path, JSON_BYTES)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: no valid JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: no valid JSON: {error}") from error


def check_size(path: str | os.PathLike, most: int) -> None:
    """Raises ValueError where a file has more than so many bytes."""
    if (size := os.path.getsize(path)) > most:
        raise ValueError(f"{path}: {size:,} bytes, more than the {most:,} that such a file may have")


def sha256(path: str | os.PathLike) -> str:
    """The digest of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file: of the same tensors and metadata, the same bytes."""
    save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata={"format": "pt", **metadata})
    with open(path, "rb+") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = sorted_header(file.read(size))
        file.seek(8)
        file.write(header)


def sorted_header(text: bytes) -> bytes:
    """A header of safetensors with its metadata, which come in any order, in that of their names; as long as before."""
    header = json.loads(text)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    found = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(len(text))
    if len(found) != len(text):
        raise AssertionError(f"a header of {len(text)} bytes has {len(found)} when it is sorted")
    return found


class InUse(RuntimeError):
    """A folder that another process writes to; the message names the process."""


class Held:
    """A folder for one process at a time, until `release`, or the end of the process, whatever that is.

    Half files that a process before has left there, or in the folders of it that are named, are removed. Also a
    context. Raises InUse, naming the holder, where another has it, or this one already.
    """

    folders: ClassVar[set[Path]] = set()  # of this process: to itself, the system would give it twice

    def __init__(self, folder: str | os.PathLike, *inside: str):
        self.folder = Path(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        path, own = self.folder / ".lock", self.folder in self.folders
        self.file = None if own else _locked(path)
        if self.file is None:
            holder = "this process" if own else _text(path) or "another process"
            raise InUse(f"{folder}: in use by {holder}: wait until it ends, or write to another folder")
        self.folders.add(self.folder)
        for part in (part for name in ("", *inside) for part in (self.folder / name).glob(".*.part")):
            shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
        if fcntl is not None:
            self.file.truncate(0)
            print(f"process {os.getpid()} on {platform.node()}", file=self.file, flush=True)

    def release(self) -> None:
        self.folders.discard(self.folder)
        if fcntl is not None:
            self.file.truncate(0)
        self.file.close()

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, *error) -> None:
        self.release()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _locked(path: Path) -> Any:
    """The file, open and locked; None where another process has it."""
    if fcntl is None:
        import filelock

        lock = filelock.FileLock(path)
        lock.close = lock.release
        try:
            return lock.acquire(blocking=False) and lock
        except filelock.Timeout:
            return None
    file = open(path, "a")  # noqa: SIM115  it is closed to give the lock back
    try:
        # Of this process alone: what filelock takes, flock, the workers that it forks would hold after its death.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError as error:  # a file system without locks
        warnings.warn(
            f"{path}: cannot be locked ({error.strerror}): see that no other process writes there", stacklevel=3
        )
    return file
