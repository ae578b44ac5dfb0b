"""Pair attention in C++ (csrc/pair_attention_kernel.cpp): 16 queries in a vector, online softmax, any shape."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from avfkernels import _native
from avfkernels.pair_attention import eager

SCHEMA = (
    "pair_attention_cpu(Tensor q, Tensor k1, Tensor v1, Tensor k2, Tensor v2, float scale, "
    "Tensor? mask1, Tensor? mask2) -> (Tensor out, Tensor lse)"
)


def forward(q, k1, v1, k2, v2, *, scale, interaction, mask1, mask2, return_lse):
    """See `avfkernels.pair_attention`."""
    return torch.ops.avfkernels.pair_attention_cpu(q, k1, v1, k2, v2, scale, mask1, mask2)


def why_not(*, q, k1, v1, k2, v2, interaction, **_) -> str | None:
    if q.device.type != "cpu":
        return f"the tensors are on {q.device.type}, not on the CPU"
    if q.dtype != torch.float32:
        return f"it computes in float32, not {q.dtype}"
    if interaction != "sum":
        return f"it has no interaction {interaction!r}"
    for name, tensor in (("q", q), ("k1", k1), ("v1", v1), ("k2", k2), ("v2", v2)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"{name} has a last stride of {tensor.stride(-1)}, not 1"
    return _native.why_unavailable()


def is_faster(*, q, k1, v1, k2, v2, **_) -> bool:
    # Measured against `eager` on two cores with AVX-512 (`pytest bench/test_pair_attention.py --benchmark`): ahead for
    # forward passes with few queries; there is no fused backward yet, and PyTorch's own is faster than the one here.
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k1, v1, k2, v2))
    return not needs_grad and q.shape[2] <= 256 and v1.shape[3] <= 64


def _empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, H, F, _ = q.shape
    # Heads next to their columns in memory, so that the caller's transpose(1, 2).flatten(2) is a view.
    return q.new_empty(B, F, H, v.shape[-1]).transpose(1, 2), q.new_empty(B, H, F)


def kernel(q, k1, v1, k2, v2, scale, mask1, mask2):
    out, lse = _empty_outputs(q, v1)
    (B, H, F, dk), N1, N2, dv = q.shape, k1.shape[2], k2.shape[2], v1.shape[3]
    tensors = (q, k1, v1, k2, v2, out)
    # Named locals: the memory must outlive the call.
    mask1, mask2 = (None if mask is None else mask.contiguous() for mask in (mask1, mask2))
    sizes = (ctypes.c_int64 * 7)(B, H, F, N1, N2, dk, dv)
    strides = (ctypes.c_int64 * 18)(*(stride for tensor in tensors for stride in tensor.stride()[:3]))
    pointers = [
        ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
        for tensor in (q, k1, v1, k2, v2, mask1, mask2, out, lse)
    ]
    function = _native.library().avf_pair_attention_sum_fwd_f32
    _native.check(function(*pointers, sizes, strides, ctypes.c_float(scale)), "avf_pair_attention_sum_fwd_f32")
    return out, lse


def fake(q, k1, v1, k2, v2, scale, mask1, mask2):
    return _empty_outputs(q, v1)


def setup_context(ctx, inputs, output):
    q, k1, v1, k2, v2, ctx.scale, mask1, mask2 = inputs
    ctx.save_for_backward(q, k1, v1, k2, v2, mask1, mask2)
    ctx.set_materialize_grads(True)


def backward(ctx, grad_out, grad_lse):
    *tensors, mask1, mask2 = ctx.saved_tensors
    grads = eager.backward(grad_out, grad_lse, *tensors, mask1, mask2, ctx.scale)
    return *grads, None, None, None
