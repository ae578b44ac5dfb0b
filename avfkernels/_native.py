"""Loads libavfkernels, the C-ABI library that setup.py compiles from csrc/."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

ABI_VERSION = 1  # AVF_ABI_VERSION of csrc/avf.h
PATH = Path(__file__).with_name("libavfkernels.so")
ERRORS = {1: "out of memory"}  # AvfError of csrc/avf.h


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    if not PATH.exists():
        return None, (
            f"{PATH.name} was not built: it needs a C++ compiler (g++ or clang++); install one, then run "
            "`AVF_REQUIRE_NATIVE=1 pip install -e . -v`, which prints what goes wrong"
        )
    try:
        library = ctypes.CDLL(str(PATH))
        version = library.avf_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"{PATH.name} does not load ({error}); run `pip install -e .` again"
    if version != ABI_VERSION:
        return None, f"{PATH.name} has ABI version {version}, this package {ABI_VERSION}; run `pip install -e .` again"
    library.avf_isa.restype = ctypes.c_char_p
    return library, None


def why_unavailable() -> str | None:
    """The reason that the native library cannot be used, with the remedy; None if it is loaded."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """The loaded library. Raises RuntimeError, with the remedy, if there is none."""
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


def check(code: int, function: str) -> None:
    """Raises RuntimeError for a non-zero code that a native function returned."""
    if code:
        raise RuntimeError(f"{function} failed: {ERRORS.get(code, f'error {code}')}")
