"""Cross-attention of a few latents with its projections at the latents (rewrite R2), for `avfkernels.nn`."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from avfkernels import _backends
from avfkernels._autograd import gradients_by_formula, transformed
from avfkernels._checks import autocast_enabled, cast_for_autocast
from avfkernels._math import compute_dtype, masked_softmax
from avfkernels.latent_attention import latent_attention


def absorbed_attention(q: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    r"""Multi-head cross-attention of q over k = W_k x + b_k and v = W_v x + b_v, of which neither k nor v exists.

        out[h, m] = W_v[h] sum_n softmax_n(scale * (W_k[h]^T q[h, m]) . x[n]) x[n]  +  b_v[h]

    q . b_k is the same for every token and leaves the softmax; its weights sum to 1, so W_v and b_v act once, on the
    attended mean of x. What has the width of x and the number of queries is computed again for its gradient: that is
    cheaper than to keep it.

    Args: q [B, H, m, d]; x [B, N, D]; weight [2 * H * d, D] and bias [2 * H * d] (or None), keys before values.
    Returns: [B, H, m, d].
    """
    if not torch.is_grad_enabled() or transformed():
        return _composite(q, x, weight, bias, scale)
    if not torch.compiler.is_compiling():  # a trace takes the composition, autocast and all
        device = x.device.type
        if autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return absorbed_attention(*cast_for_autocast(device, q, x, weight, bias), scale)
        if _on_eager(q, x, weight):
            return _Absorbed.apply(q, x, weight, bias, scale)[0]
    return checkpoint(_composite, q, x, weight, bias, scale, use_reentrant=False, preserve_rng_state=False)


def absorb(q: Tensor, weight: Tensor) -> Tensor:
    """W_k^T q: [B, H, m, d] -> [B, H, m, D], the queries that meet x itself."""
    return torch.einsum("bhmd,hde->bhme", q, _by_heads(weight, q.shape[1])[0])


def _by_heads(packed: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Of keys and of values, each [H, d, ...]. Unbound together: autograd joins their gradients in one copy."""
    return packed.unflatten(0, (2, num_heads, -1)).unbind(0)


def _composite(q, x, weight, bias, scale):
    queries = absorb(q, weight)
    context = latent_attention(queries.flatten(1, 2), x, scale=scale).view_as(queries)
    out = torch.einsum("bhme,hde->bhmd", context, _by_heads(weight, q.shape[1])[1])
    return out if bias is None else out + _by_heads(bias, q.shape[1])[1].unsqueeze(1)


def _on_eager(q: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Whether the attention inside would run on `eager`."""
    from avfkernels import _ops  # which imports the backends beside this file

    table = _ops.BACKENDS["latent_attention"]
    queries = weight[None, :1].expand(len(x), q.shape[1] * q.shape[2], -1)  # of their shape, dtype and device
    arguments = {"q": queries, "x": x, "scale": 1.0, "mask": None, "return_lse": False}
    return _backends.select("latent_attention", table, arguments) is table["eager"]


class _Absorbed(torch.autograd.Function):
    """The whole on `eager`. Keeps q, x and the attention weights [B, H * m, N], which are its second output."""

    @staticmethod
    def forward(q, x, weight, bias, scale):
        w_k, w_v = _by_heads(weight, q.shape[1])
        queries = _to_tokens(torch.bmm(_to_heads(q), w_k), q)
        scores = torch.baddbmm(q.new_zeros(1), queries, x.transpose(1, 2), beta=0, alpha=scale)
        attn, _ = masked_softmax(scores, None, False)
        context = _to_heads((attn @ x).view(*q.shape[:3], x.shape[2]))
        out = torch.bmm(context, w_v.transpose(1, 2)).unflatten(1, (len(q), q.shape[2])).transpose(0, 1)
        return out if bias is None else out + _by_heads(bias, q.shape[1])[1].unsqueeze(1), attn

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        q, x, weight, bias, attn = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias, _ = needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            composite = partial(_composite, scale=ctx.scale)
            return *gradients_by_formula(composite, (q, x, weight, bias), needs[:4], grad), None

        w_k, w_v = _by_heads(weight, q.shape[1])
        q_heads, grad_heads = _to_heads(q), _to_heads(grad)
        d_context = _to_tokens(torch.bmm(grad_heads, w_v), q)
        d_attn = (d_context @ x.transpose(1, 2)).to(compute_dtype(q.dtype))
        d_scores = (attn * (d_attn - (d_attn * attn).sum(-1, keepdim=True)) * ctx.scale).to(q.dtype)
        d_queries = _to_heads((d_scores @ x).view(*q.shape[:3], x.shape[2]))
        d_q = torch.bmm(d_queries, w_k.transpose(1, 2)).unflatten(1, (len(q), q.shape[2])).transpose(0, 1)

        d_x = d_weight = d_bias = None
        if needs_x:
            queries = _to_tokens(torch.bmm(q_heads, w_k), q)
            d_x = torch.baddbmm(attn.transpose(1, 2) @ d_context, d_scores.transpose(1, 2), queries)
        if needs_weight:
            d_weight = torch.empty_like(weight)
            d_w_k, d_w_v = _by_heads(d_weight, q.shape[1])
            context = _to_heads((attn @ x).view(*q.shape[:3], x.shape[2]))
            torch.bmm(q_heads.transpose(1, 2), d_queries, out=d_w_k)
            torch.bmm(grad_heads.transpose(1, 2), context, out=d_w_v)
        if needs_bias:
            d_bias = torch.zeros_like(bias)  # that of the keys moves nothing
            torch.sum(grad, (0, 2), out=_by_heads(d_bias, q.shape[1])[1])
        return d_q, d_x, d_weight, d_bias, None


def _to_heads(x: Tensor) -> Tensor:
    """[B, H, m, d] -> [H, B * m, d], as products with the weights of each head take it."""
    return x.transpose(0, 1).flatten(1, 2)


def _to_tokens(x: Tensor, q: Tensor) -> Tensor:
    """[H, B * m, D] -> [B, H * m, D], as products with tokens take it; q is [B, H, m, d]."""
    return x.unflatten(1, (len(q), q.shape[2])).transpose(0, 1).flatten(1, 2)
