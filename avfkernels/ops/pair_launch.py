"""How the Triton kernels of pair attention are launched, and what they take for the two sides of a pair."""

from __future__ import annotations

import torch
from torch import Tensor

from avfkernels.ops.pair_plain import Pairs

_compiled: dict[tuple, object] = {}


def launch(kernel, device: torch.device, programs: int, pointers: tuple, sizes: tuple, blocks: dict) -> None:
    """kernel[(programs,)](*pointers, *sizes, **blocks), in a fraction of the host's time from the second call on.

    Triton looks at every argument of every call to find what it has compiled for such. The key here has all that it
    looks at: dtypes, alignment, strides, what is None; sizes it does not specialise on (`do_not_specialize`).
    """
    key = (kernel.fn, device, _kind(pointers), tuple(blocks.values()))
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*pointers, *sizes, *(value for name, value in blocks.items() if name.isupper()))
    elif compiled := kernel[(programs,)](*pointers, *sizes, **blocks):  # interpreted, there is nothing to keep
        _compiled[key] = compiled


def _kind(pointers: tuple) -> tuple:
    kind = []
    for x in pointers:
        if isinstance(x, Tensor):
            kind += (x.dtype, x.data_ptr() % 16)
        else:  # a side, or what is no pointer: strides, None, a number
            kind.append(_kind(x) if isinstance(x, tuple) and isinstance(x[0], Tensor) else x)
    return tuple(kind)


def side(k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple:
    """What the kernels take for one (tiles.py)."""
    return k, v, k.stride()[:3], v.stride()[:3], None if mask is None else mask.view(torch.uint8)


def sides(a: Pairs) -> tuple[tuple, tuple]:
    return side(a.k1, a.v1, a.mask1), side(a.k2, a.v2, a.mask2)


def widths(a: Pairs) -> tuple[int, int, int, int]:
    """Of keys and of values, and of their tiles."""
    dk, dv = a.q.shape[3], a.v1.shape[3]
    return dk, dv, padded(dk), padded(dv)


def padded(width: int) -> int:
    """The width of a tile: a power of two, and at least what a matrix instruction takes."""
    return max(16, 1 << max(width - 1, 0).bit_length())
