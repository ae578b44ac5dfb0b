"""Latent attention in Triton (triton_kernels.py): x is read once per block of queries, as keys and as values."""

from __future__ import annotations

from functools import partial

import torch

from avfkernels import _triton
from avfkernels.latent_attention import eager

SCHEMA = (
    "latent_attention_triton(Tensor q, Tensor x, float scale, Tensor? mask, bool return_lse, bool save) "
    "-> (Tensor out, Tensor lse, Tensor saved_softmax)"
)
BACKWARD_SCHEMA = (
    "latent_attention_triton_backward(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor x, Tensor saved_softmax, "
    "float scale, Tensor? mask) -> (Tensor, Tensor)"
)
WIDEST = 1024
# In float32 backward of wider rows needs 200 KiB of shared memory a block (bench.codegen), in 16 bits half of that.
WIDEST_FLOAT32, SHARED_MEMORY = 768, 200 << 10


def forward(q, x, *, scale, mask, return_lse):
    """See `avfkernels.latent_attention`."""
    save = torch.is_grad_enabled() and (q.requires_grad or x.requires_grad)
    return torch.ops.avfkernels.latent_attention_triton(q, x, scale, mask, return_lse, save)[:2]


def why_not(*, q, x, **_) -> str | None:
    if reason := _triton.why_not(WIDEST, q=q, x=x):
        return reason
    if q.dtype == torch.float32 and q.shape[-1] > WIDEST_FLOAT32 and q.is_cuda:
        has = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
        if has < SHARED_MEMORY:
            return f"float32 rows of {q.shape[-1]} need {SHARED_MEMORY >> 10} KiB of shared memory, not {has >> 10}"
    return None


def is_faster(**_) -> bool:
    return False  # not measured on a GPU yet


def fake(q, x, scale, mask, return_lse, save):
    lse = q.new_empty(q.shape[:2] if return_lse else 0, dtype=torch.float32)
    saved_softmax = q.new_empty((2, *q.shape[:2]) if save else 0, dtype=torch.float32)
    return q.new_empty(q.shape), lse, saved_softmax


def kernel(q, x, scale, mask, return_lse, save):
    from avfkernels.latent_attention import triton_kernels

    outputs = fake(q, x, scale, mask, return_lse, save)
    out, lse, saved_softmax = (t if t.numel() else None for t in outputs)
    if out is not None:
        triton_kernels.forward(q, x, scale, mask, out, lse, saved_softmax)
    return outputs


def backward_kernel(grad_out, grad_lse, q, x, saved_softmax, scale, mask):
    from avfkernels.latent_attention import triton_kernels

    return triton_kernels.backward(grad_out, grad_lse, q, x, saved_softmax, scale, mask)


def backward_fake(grad_out, grad_lse, q, x, *_):
    return q.new_empty(q.shape), x.new_empty(x.shape)


def setup_context(ctx, inputs, output):
    q, x, ctx.scale, mask, _, _ = inputs
    ctx.save_for_backward(q, x, output[2], mask)
    ctx.set_materialize_grads(False)


def backward(ctx, grad_out, grad_lse, _):
    q, x, saved_softmax, mask = ctx.saved_tensors
    grads = torch.ops.avfkernels.latent_attention_triton_backward(
        grad_out, grad_lse, q, x, saved_softmax, ctx.scale, mask
    )
    return *grads, None, None, None, None


def formula(ctx):
    q, x, _, mask = ctx.saved_tensors
    return partial(eager.forward, scale=ctx.scale, mask=mask, return_lse=True), (q, x)
