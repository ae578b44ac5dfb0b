"""Pair attention in C++ (csrc/pair_*_kernel.cpp): 16 queries in a vector, online softmax, no pair in memory.

And in CUDA C++ (csrc/pair_product.cu), products forward: 16 queries are one tensor-core fragment; Triton's backward.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from avfkernels import native
from avfkernels.ops import pair_triton
from avfkernels.ops.pair_plain import Pairs

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # AvfDtype of csrc/avf.h
INTERACTIONS = {"sum": 0, "product": 1}  # AvfInteraction
CUDA_WIDTHS = (16, 32)
CUDA_MAX_TOKENS = 2**30


def why_not_cpu(a: Pairs) -> str | None:
    if a.q.device.type != "cpu":
        return f"the tensors are on {a.q.device.type}, not on the CPU"
    if a.q.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {a.q.dtype}"
    return native.why_unavailable()


def why_not_cuda(a: Pairs) -> str | None:
    if a.q.device.type != "cuda":
        return f"the tensors are on {a.q.device.type}, not on a CUDA device"
    if a.interaction != "product" or a.dropout_p > 0.0:
        return "it computes products without dropout alone"
    if a.q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes bfloat16 and float16, not {a.q.dtype}"
    if a.q.shape[3] not in CUDA_WIDTHS or a.v1.shape[3] not in CUDA_WIDTHS:
        return f"it takes widths of 16 and 32, not {a.q.shape[3]} and {a.v1.shape[3]}"
    if max(a.k1.shape[2], a.k2.shape[2]) > CUDA_MAX_TOKENS:
        return "a side has more than 2^30 tokens"
    if torch.cuda.get_device_capability(a.q.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    return native.why_cuda_unavailable() or pair_triton.why_not(a)


def _strided(x: Tensor) -> tuple[int, ...]:
    """AvfTensor: the address and the strides of batch, head and token."""
    return x.data_ptr(), *x.stride()[:3]


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _arguments(a: Pairs, saved: Tensor | None, **results) -> native.Pair:
    (B, H, F, dk), N1, N2, dv = a.q.shape, a.k1.shape[2], a.k2.shape[2], a.v1.shape[3]
    return native.Pair(
        _strided(a.q), _strided(a.k1), _strided(a.k2), _strided(a.v1), _strided(a.v2),
        _pointer(a.mask1), _pointer(a.mask2),
        saved=_pointer(saved), B=B, H=H, F=F, N1=N1, N2=N2, dk=dk, dv=dv,
        seed=0 if a.seed is None else int(a.seed) & 0xFFFFFFFFFFFFFFFF, scale=a.scale, dropout_p=a.dropout_p,
        dtype=DTYPES[a.q.dtype], interaction=INTERACTIONS[a.interaction], **results,
    )  # fmt: skip


def forward_cpu(a: Pairs, out: Tensor, lse: Tensor | None, saved: Tensor | None) -> None:
    """Fills out and, unless they are None, lse and saved."""
    arguments = _arguments(a, saved, out=_strided(out), lse=_pointer(lse))
    native.call(native.library(), "avf_pair_forward", arguments)


def backward_cpu(a: Pairs, saved: Tensor, grad_out: Tensor, grad_lse: Tensor | None, grads: tuple[Tensor, ...]) -> None:
    """Fills the gradients of q, k1, v1, k2, v2."""
    names = ("grad_q", "grad_k1", "grad_v1", "grad_k2", "grad_v2")
    results = {name: _strided(grad) for name, grad in zip(names, grads, strict=True)}
    arguments = _arguments(a, saved, grad_out=_strided(grad_out), grad_lse=_pointer(grad_lse), **results)
    native.call(native.library(), "avf_pair_backward", arguments)


def _aligned(x: Tensor) -> Tensor:
    """With rows that begin at multiples of 16 bytes."""
    steps = (stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1)
    aligned = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in steps)
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def forward_cuda(a: Pairs, out: Tensor, lse: Tensor | None, saved: Tensor | None) -> None:
    """The same on a GPU, on torch's current stream."""
    a = replace(a, **{name: _aligned(getattr(a, name)) for name in ("q", "k1", "v1", "k2", "v2")})
    with torch.cuda.device_of(a.q):
        stream = torch.cuda.current_stream(a.q.device).cuda_stream
        arguments = _arguments(a, saved, out=_strided(out), lse=_pointer(lse), stream=stream)
        native.call(native.cuda_library(), "avf_pair_forward", arguments)
