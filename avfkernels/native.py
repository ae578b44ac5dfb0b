"""Loads libavfkernels and libavfkernels_cuda, the C-ABI libraries that setup.py compiles from csrc/."""

from __future__ import annotations

import ctypes
from pathlib import Path

PATH = Path(__file__).with_name("libavfkernels.so")
CUDA_PATH = Path(__file__).with_name("libavfkernels_cuda.so")
ABI_VERSION = 3  # AVF_ABI_VERSION of csrc/avf.h


class Tensor(ctypes.Structure):
    """AvfTensor: the address and the strides of batch, head and token."""

    _fields_ = [("data", ctypes.c_void_p), *((f"stride_{dim}", ctypes.c_int64) for dim in "bhn")]


class Pair(ctypes.Structure):
    """AvfPair: the arguments of pair attention; what is left out is null or 0."""

    _fields_ = [
        *((name, Tensor) for name in ("q", "k1", "k2", "v1", "v2")),
        *((name, ctypes.c_void_p) for name in ("mask1", "mask2")),
        ("out", Tensor),
        ("lse", ctypes.c_void_p),
        ("saved", ctypes.c_void_p),
        ("grad_out", Tensor),
        ("grad_lse", ctypes.c_void_p),
        *((f"grad_{name}", Tensor) for name in ("q", "k1", "k2", "v1", "v2")),
        *((name, ctypes.c_int64) for name in ("B", "H", "F", "N1", "N2", "dk", "dv")),
        ("seed", ctypes.c_uint64),
        ("stream", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("dropout_p", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("interaction", ctypes.c_int32),
    ]


def _open(path: Path, needs: str) -> tuple[ctypes.CDLL | None, str | None]:
    if not path.exists():
        return None, (
            f"{path.name} was not built: it needs {needs} and csrc/, which clones and source distributions have; then "
            "run `AVF_REQUIRE_NATIVE=1 pip install -e . -v`, which prints what goes wrong"
        )
    try:
        library = ctypes.CDLL(str(path))
        version, size = library.avf_abi_version(), library.avf_pair_bytes()
    except (OSError, AttributeError) as error:
        return None, f"{path.name} does not load ({error}); run `pip install -e .` again"
    if (version, size) != (ABI_VERSION, ctypes.sizeof(Pair)):
        return None, f"{path.name} has ABI version {version}, this package {ABI_VERSION}; run `pip install -e .` again"
    library.avf_error.restype = library.avf_isa.restype = ctypes.c_char_p
    return library, None


# Opened here and now, so that torch.compile finds the reasons as constants. The CUDA runtime is linked in statically
# and finds the driver when it is first called: both load on any machine.
_library, _reason = _open(PATH, "a C++ compiler (g++ or clang++)")
_cuda_library, _cuda_reason = _open(CUDA_PATH, "nvcc (the CUDA toolkit) on PATH")


def why_unavailable() -> str | None:
    """The reason that the native library cannot be used, with the remedy; None if it is loaded."""
    return _reason


def why_cuda_unavailable() -> str | None:
    """The same for the CUDA library."""
    return _cuda_reason


def library() -> ctypes.CDLL:
    """The loaded library. Raises RuntimeError, with the remedy, if there is none."""
    return _loaded(_library, _reason)


def cuda_library() -> ctypes.CDLL:
    """The same for CUDA."""
    return _loaded(_cuda_library, _cuda_reason)


def isa() -> str:
    """The instruction set that the loaded library has chosen: "avx512", "avx2" or "portable"."""
    return library().avf_isa().decode()


def _loaded(library: ctypes.CDLL | None, reason: str | None) -> ctypes.CDLL:
    if library is None:
        raise RuntimeError(reason)
    return library


def call(library: ctypes.CDLL, function: str, arguments: Pair) -> None:
    """Calls a function of a library. Raises RuntimeError for the code of an error."""
    if code := getattr(library, function)(ctypes.byref(arguments)):
        raise RuntimeError(f"{function} failed: {library.avf_error(code).decode()} ({code})")
