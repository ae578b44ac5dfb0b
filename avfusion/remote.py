"""Files elsewhere, `s3://bucket/name`, `gs://...`, `hf://...`, by fsspec, which asks each store's own package."""

import os
import re
from typing import BinaryIO

import fsspec

SCHEMES = ("abfs", "az", "gs", "hf", "https", "memory", "s3")


def is_remote(path: str | os.PathLike) -> bool:
    """Whether it is an address. Raises ValueError for one of a scheme that is not among `SCHEMES`."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", os.fspath(path))
    if scheme is None:
        return False
    if scheme[1] not in SCHEMES or "::" in os.fspath(path):
        raise ValueError(f"{path}: expected a local path, or an address that begins with one of "
                         f"{', '.join(f'{name}://' for name in SCHEMES)}")  # fmt: skip
    return True


def filesystem(path: str | os.PathLike) -> tuple[fsspec.AbstractFileSystem, str]:
    """What an address or a local path is read and written through, and its name there.

    Raises ValueError where the package of such a store is not installed.
    """
    if not is_remote(path):
        return fsspec.filesystem("file"), os.path.abspath(path)
    try:
        return fsspec.core.url_to_fs(os.fspath(path))
    except ImportError as error:
        raise ValueError(f"{path}: {error}") from error


def open_remote(path: str | os.PathLike) -> BinaryIO:
    """A file to read, with `seek`."""
    files, name = filesystem(path)
    return files.open(name, "rb")
