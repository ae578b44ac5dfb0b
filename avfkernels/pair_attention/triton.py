"""Pair attention in Triton: sums as two attentions in one launch (triton_sum.py), products and dropped pairs by tiles
of pairs (triton_pairs.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from avfkernels import _triton
from avfkernels._triton import like
from avfkernels.pair_attention import eager

SCHEMA = (
    "pair_attention_triton(Tensor q, Tensor k1, Tensor v1, Tensor k2, Tensor v2, float scale, str interaction, "
    "Tensor? mask1, Tensor? mask2, float dropout_p, Tensor? seed, bool return_lse, bool save) "
    "-> (Tensor out, Tensor lse, Tensor saved_softmax)"
)
BACKWARD_SCHEMA = (
    "pair_attention_triton_backward(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k1, Tensor v1, Tensor k2, "
    "Tensor v2, Tensor saved_softmax, float scale, str interaction, Tensor? mask1, Tensor? mask2, float dropout_p, "
    "Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
WIDEST = 128  # dk and dv


def forward(q, k1, v1, k2, v2, *, scale, interaction, mask1, mask2, dropout_p, seed, return_lse):
    """See `avfkernels.pair_attention`."""
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k1, v1, k2, v2))
    return torch.ops.avfkernels.pair_attention_triton(
        q, k1, v1, k2, v2, scale, interaction, mask1, mask2, dropout_p, seed, return_lse, save
    )[:2]


def why_not(*, q, k1, v1, k2, v2, **_) -> str | None:
    return _triton.why_not(WIDEST, q=q, k1=k1, v1=v1, k2=k2, v2=v2)


def is_faster(**_) -> bool:
    return False  # on an H200 the kernel is faster, but its call costs the host more (bench/results/nvidia-h200-gpu.md)


def _separates(interaction: str, dropout_p: float) -> bool:
    """Whether rewrite R1 holds, so that no pair is visited."""
    return interaction == "sum" and dropout_p == 0.0


def _outputs(q: Tensor, v1: Tensor, separate: bool, return_lse: bool, save: bool) -> tuple[Tensor, ...]:
    B, H, F, _ = q.shape
    lse = q.new_empty((B, H, F) if return_lse else 0, dtype=torch.float32)
    saved_softmax = q.new_empty((2 if separate else 1, 2, B, H, F) if save else 0, dtype=torch.float32)
    return like(q, v1.shape[3]), lse, saved_softmax


def kernel(q, k1, v1, k2, v2, scale, interaction, mask1, mask2, dropout_p, seed, return_lse, save):
    separate = _separates(interaction, dropout_p)
    outputs = _outputs(q, v1, separate, return_lse, save)
    out, lse, saved_softmax = (t if t.numel() or t is outputs[0] else None for t in outputs)
    if 0 in q.shape[:3]:
        return outputs
    if separate:
        from avfkernels.pair_attention import triton_sum

        triton_sum.forward(q, k1, v1, k2, v2, scale, mask1, mask2, out, lse, saved_softmax, joint=False)
    else:
        from avfkernels.pair_attention import triton_pairs

        options = (scale, interaction, mask1, mask2, dropout_p, seed)
        triton_pairs.forward(q, k1, v1, k2, v2, *options, out, lse, saved_softmax)
    return outputs


def fake(q, k1, v1, k2, v2, scale, interaction, mask1, mask2, dropout_p, seed, return_lse, save):
    return _outputs(q, v1, _separates(interaction, dropout_p), return_lse, save)


def backward_kernel(
    grad_out, grad_lse, q, k1, v1, k2, v2, saved_softmax, scale, interaction, mask1, mask2, dropout_p, seed,
):  # fmt: skip
    if _separates(interaction, dropout_p):
        from avfkernels.pair_attention import triton_sum

        return triton_sum.backward(
            grad_out, grad_lse, q, k1, v1, k2, v2, saved_softmax, scale, mask1, mask2, joint=False
        )
    from avfkernels.pair_attention import triton_pairs

    options = (scale, interaction, mask1, mask2, dropout_p, seed)
    return triton_pairs.backward(grad_out, grad_lse, q, k1, v1, k2, v2, saved_softmax, *options)


def backward_fake(grad_out, grad_lse, q, k1, v1, k2, v2, *_):
    return tuple(like(tensor) for tensor in (q, k1, v1, k2, v2))


def setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.interaction, mask1, mask2, ctx.dropout_p, seed, _, _ = inputs
    ctx.save_for_backward(*tensors, output[2], mask1, mask2, seed)
    ctx.set_materialize_grads(False)


def backward(ctx, grad_out, grad_lse, *_):
    *tensors, mask1, mask2, seed = ctx.saved_tensors
    options = (ctx.scale, ctx.interaction, mask1, mask2, ctx.dropout_p, seed)
    grads = torch.ops.avfkernels.pair_attention_triton_backward(grad_out, grad_lse, *tensors, *options)
    return *grads, *[None] * 8


def formula(ctx):
    *tensors, _, mask1, mask2, seed = ctx.saved_tensors
    return eager.formula(tensors, ctx.scale, ctx.interaction, mask1, mask2, ctx.dropout_p, seed)
