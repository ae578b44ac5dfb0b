"""What the Triton backends share and what needs no triton: it is imported when the first kernel is built."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INSTALLED = find_spec("triton") is not None


def why_not(widest: int, **tensors: Tensor) -> str | None:
    """The reason that a kernel for rows up to `widest` cannot run with these tensors."""
    for name, tensor in tensors.items():
        if tensor.device.type != "cuda":
            return f"the tensors are on {tensor.device.type}, not on a CUDA device"
        if tensor.dtype not in DTYPES:
            return f"it takes float32, float16 and bfloat16, not {tensor.dtype}"
        if tensor.shape[-1] > widest:
            return f"{name} is {tensor.shape[-1]} wide, more than {widest}"
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"{name} has a last stride of {tensor.stride(-1)}, not 1"
    return None if _INSTALLED else "triton is not installed"


def like(tensor: Tensor, width: int | None = None) -> Tensor:
    """Memory for [B, H, N, width], heads next to each other: a caller's transpose(1, 2).flatten(2) is a view."""
    B, H, N, d = tensor.shape
    return tensor.new_empty(B, N, H, d if width is None else width).transpose(1, 2)


def upstream(grad_out: Tensor | None, shape: tuple[int, ...], q: Tensor) -> Tensor:
    """The gradient of an output as kernels read it: zeros if there is none, unit last stride."""
    if grad_out is None:
        return q.new_zeros(1).expand(shape).contiguous()
    return grad_out if grad_out.stride(-1) == 1 or shape[-1] == 1 else grad_out.contiguous()


def bytes_of(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def padded(width: int) -> int:
    """The width of a tile: a power of two, and at least what a matrix instruction takes."""
    return max(16, 1 << max(width - 1, 0).bit_length())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
