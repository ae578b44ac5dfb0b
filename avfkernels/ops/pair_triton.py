"""Pair attention in Triton: sums as two attentions in one launch (pair_sum_triton.py), products and dropped pairs by
tiles of pairs (pair_rows_triton.py). Neither, nor triton, is imported before the first launch."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from avfkernels.ops.pair_plain import Pairs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 128  # dk and dv
_INSTALLED = find_spec("triton") is not None


def why_not(a: Pairs) -> str | None:
    if a.q.device.type != "cuda":
        return f"the tensors are on {a.q.device.type}, not on a CUDA device"
    if a.q.dtype not in DTYPES:
        return f"it takes float32, float16 and bfloat16, not {a.q.dtype}"
    if max(a.q.shape[-1], a.v1.shape[-1]) > WIDEST:
        return f"it takes widths up to {WIDEST}, not {a.q.shape[-1]} and {a.v1.shape[-1]}"
    return None if _INSTALLED else "triton is not installed"


def _kernels(a: Pairs):
    if a.separates():
        from avfkernels.ops import pair_sum_triton as kernels
    else:
        from avfkernels.ops import pair_rows_triton as kernels
    return kernels


def forward(a: Pairs, out: Tensor, lse: Tensor | None, saved: Tensor | None) -> None:
    """Fills out and, unless they are None, lse and saved."""
    with torch.cuda.device_of(a.q):
        _kernels(a).forward(a, out, lse, saved)


def backward(a: Pairs, saved: Tensor, grad_out: Tensor, grad_lse: Tensor | None, grads: tuple[Tensor, ...]) -> None:
    """Fills the gradients of q, k1, v1, k2, v2."""
    with torch.cuda.device_of(a.q):
        _kernels(a).backward(a, saved, grad_out, grad_lse, grads)
