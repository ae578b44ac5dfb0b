"""Loads libavfkernels and libavfkernels_cuda, the C-ABI libraries that setup.py compiles from csrc/."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

ABI_VERSION = 2  # AVF_ABI_VERSION of csrc/avf.h
PATH = Path(__file__).with_name("libavfkernels.so")
ERRORS = {1: "out of memory"}  # AvfError of csrc/avf.h

CUDA_ABI_VERSION = 2  # AVF_CUDA_ABI_VERSION of csrc/avf_cuda.h
CUDA_PATH = Path(__file__).with_name("libavfkernels_cuda.so")


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    library, reason = _open(PATH, "avf_abi_version", ABI_VERSION, "a C++ compiler (g++ or clang++)")
    if library is not None:
        library.avf_isa.restype = ctypes.c_char_p
    return library, reason


@functools.cache
def _load_cuda() -> tuple[ctypes.CDLL | None, str | None]:
    # The CUDA runtime is linked in statically and finds the driver when it is first called: this loads on any machine.
    library, reason = _open(CUDA_PATH, "avf_cuda_abi_version", CUDA_ABI_VERSION, "nvcc (the CUDA toolkit) on PATH")
    if library is not None:
        library.avf_cuda_error.restype = ctypes.c_char_p
    return library, reason


def _open(path: Path, version_of: str, expected: int, needs: str) -> tuple[ctypes.CDLL | None, str | None]:
    if not path.exists():
        return None, (
            f"{path.name} was not built: it needs {needs} and csrc/, which clones and source distributions have; then "
            "run `AVF_REQUIRE_NATIVE=1 pip install -e . -v`, which prints what goes wrong"
        )
    try:
        library = ctypes.CDLL(str(path))
        version = getattr(library, version_of)()
    except (OSError, AttributeError) as error:
        return None, f"{path.name} does not load ({error}); run `pip install -e .` again"
    if version != expected:
        return None, f"{path.name} has ABI version {version}, this package {expected}; run `pip install -e .` again"
    return library, None


def why_unavailable() -> str | None:
    """The reason that the native library cannot be used, with the remedy; None if it is loaded."""
    return _load()[1]


def why_cuda_unavailable() -> str | None:
    """The same for the CUDA library."""
    return _load_cuda()[1]


def library() -> ctypes.CDLL:
    """The loaded library. Raises RuntimeError, with the remedy, if there is none."""
    return _loaded(*_load())


@functools.cache
def isa() -> str:
    """The instruction set that the loaded library has chosen: "avx512", "avx2" or "portable"."""
    return library().avf_isa().decode()


def cuda_library() -> ctypes.CDLL:
    """The loaded CUDA library. Raises RuntimeError, with the remedy, if there is none."""
    return _loaded(*_load_cuda())


def _loaded(library: ctypes.CDLL | None, reason: str | None) -> ctypes.CDLL:
    if library is None:
        raise RuntimeError(reason)
    return library


def check(code: int, function: str) -> None:
    """Raises RuntimeError for a non-zero code that a native function returned."""
    if code:
        raise RuntimeError(f"{function} failed: {ERRORS.get(code, f'error {code}')}")


def check_cuda(code: int, function: str) -> None:
    """Raises RuntimeError for a non-zero code (a cudaError_t) that a function of the CUDA library returned."""
    if code:
        raise RuntimeError(f"{function} failed: {cuda_library().avf_cuda_error(code).decode()} ({code})")
