"""Prefix attention in Triton: one softmax over two sets of tokens, not joined (pair_attention/triton_sum.py)."""

from __future__ import annotations

from functools import partial

import torch

from avfkernels import _triton
from avfkernels._triton import like
from avfkernels.prefix_attention import reference

SCHEMA = (
    "prefix_attention_triton(Tensor q, Tensor k, Tensor v, Tensor k_prefix, Tensor v_prefix, float scale, "
    "bool return_lse, bool save) -> (Tensor out, Tensor lse, Tensor saved_softmax)"
)
BACKWARD_SCHEMA = (
    "prefix_attention_triton_backward(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
    "Tensor k_prefix, Tensor v_prefix, Tensor saved_softmax, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
WIDEST = 128


def forward(q, k, v, k_prefix, v_prefix, *, scale, return_lse):
    """See `avfkernels.prefix_attention`."""
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v, k_prefix, v_prefix))
    return torch.ops.avfkernels.prefix_attention_triton(q, k, v, k_prefix, v_prefix, scale, return_lse, save)[:2]


def why_not(*, q, k, v, k_prefix, v_prefix, **_) -> str | None:
    return _triton.why_not(WIDEST, q=q, k=k, v=v, k_prefix=k_prefix, v_prefix=v_prefix)


def is_faster(**_) -> bool:
    return False  # forward it is faster on an H200 (bench/results/nvidia-h200-gpu.md); backward is not measured


def fake(q, k, v, k_prefix, v_prefix, scale, return_lse, save):
    lse = q.new_empty(q.shape[:3] if return_lse else 0, dtype=torch.float32)
    saved_softmax = q.new_empty((2, *q.shape[:3]) if save else 0, dtype=torch.float32)
    return like(q, v.shape[3]), lse, saved_softmax


def kernel(q, k, v, k_prefix, v_prefix, scale, return_lse, save):
    from avfkernels.pair_attention import triton_sum

    outputs = fake(q, k, v, k_prefix, v_prefix, scale, return_lse, save)
    out, lse, saved_softmax = (t if t.numel() or t is outputs[0] else None for t in outputs)
    if 0 not in q.shape[:3]:
        triton_sum.forward(q, k_prefix, v_prefix, k, v, scale, None, None, out, lse, saved_softmax, joint=True)
    return outputs


def backward_kernel(grad_out, grad_lse, q, k, v, k_prefix, v_prefix, saved_softmax, scale):
    from avfkernels.pair_attention import triton_sum

    grad_q, grad_k_prefix, grad_v_prefix, grad_k, grad_v = triton_sum.backward(
        grad_out, grad_lse, q, k_prefix, v_prefix, k, v, saved_softmax, scale, None, None, joint=True
    )
    return grad_q, grad_k, grad_v, grad_k_prefix, grad_v_prefix


def backward_fake(grad_out, grad_lse, q, k, v, k_prefix, v_prefix, *_):
    return tuple(like(tensor) for tensor in (q, k, v, k_prefix, v_prefix))


def setup_context(ctx, inputs, output):
    *tensors, ctx.scale, _, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def backward(ctx, grad_out, grad_lse, _):
    grads = torch.ops.avfkernels.prefix_attention_triton_backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.scale)
    return *grads, None, None, None


def formula(ctx):
    *tensors, _ = ctx.saved_tensors
    return partial(reference.forward, scale=ctx.scale, return_lse=True), tensors
