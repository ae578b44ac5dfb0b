"""Attention of a few wide queries over tokens that are their own keys and values, and what it comes from: cross-
attention with its projections at the queries (rewrite R2). Plain PyTorch everywhere: matrix products as they come."""

from __future__ import annotations

import torch
from torch import Tensor

from avfkernels.choice import materialises, transformed
from avfkernels.ops.common import (
    attend,
    casts_for_autocast,
    check_mask,
    check_tensors,
    compute_dtype,
    hide,
    masked_softmax,
    refuse_second_derivatives,
)


@casts_for_autocast
def latent_attention(
    q: Tensor, x: Tensor, *, scale: float, mask: Tensor | None = None, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention in which x is both keys and values:

        out[m] = sum_n softmax_n(scale * q[m] . x[n]) x[n],     lse[m] = log sum_n exp(scale * q[m] . x[n])

    It is what is left of multi-head cross-attention when the key and value projections move to the query side (rewrite
    R2): with few queries, no K and no V of the N tokens exist, forward or backward. `avfkernels.FactorizedFusion`
    aggregates each modality with it (Eqs. 7-8 of DeepAVFusion).

    Args:
        q: [B, M, D] queries; M counts latents x heads. x: [B, N, D]. fp32, fp16, bf16 or float64, one dtype and device.
        scale: factor on the logits.
        mask: bool [B, N], True for tokens that count.
        return_lse: also return the log-sum-exp.

    Returns:
        out [B, M, D] and, if asked for, lse [B, M] in fp32 (float64 for float64 inputs). Without any token, out is 0
        and lse is -inf.

    Raises:
        ValueError, TypeError: naming the argument, its shape or dtype, and what was expected.
    """
    check_tensors("latent_attention", {"q": ["B", "M", "D"], "x": ["B", "N", "D"]}, q, x)
    check_mask("latent_attention", "mask", mask, x.shape[0], x.shape[1], x.device)
    if materialises():
        out, lse = attend(q, x, x, scale, mask, return_lse)
    else:
        x = hide(x, mask)
        weights, lse = masked_softmax(_scores(q, x, scale), mask, return_lse)
        out = weights @ x
    return (out, lse) if return_lse else out


def _scores(q: Tensor, x: Tensor, scale: float) -> Tensor:
    # The scale rides along with the product; beta=0 ignores the first argument.
    return torch.baddbmm(q.new_zeros(1), q, x.transpose(1, 2), beta=0, alpha=scale)


@casts_for_autocast
def absorbed_attention(
    q: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, mask: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:  # fmt: skip
    r"""Multi-head cross-attention of q over k = W_k x + b_k and v = W_v x + b_v, of which neither k nor v exists.

        out[h, m] = W_v[h] sum_n softmax_n(scale * (W_k[h]^T q[h, m]) . x[n]) x[n]  +  b_v[h]

    q . b_k is the same for every token and leaves the softmax; its weights sum to 1, so W_v and b_v act once, on the
    attended mean of x. What has the width of x and the number of queries is computed again for its gradient: that is
    cheaper than to keep it. Its backward pass is of first order.

    Args: q [B, H, m, d]; x [B, N, D]; weight [2 * H * d, D] and bias [2 * H * d] (or None), keys before values;
        mask bool [B, N]; factor [B, N, 1], of the tokens: attention is over factor * x.
    Returns: [B, H, m, d]; 0 where a batch entry has no token.
    """
    x = hide(x, mask)
    if factor is not None or not torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed():
        queries = absorb(q, weight)
        scores = _scores(queries.flatten(1, 2), x, scale)
        if factor is None:
            attn, _ = masked_softmax(scores, mask)
        else:
            factor = factor.transpose(1, 2)
            attn = (masked_softmax(scores * factor, mask)[0] * factor).to(x.dtype)
        context = (attn @ x).view_as(queries)
        out = torch.einsum("bhme,hde->bhmd", context, _by_heads(weight, q.shape[1])[1])
    else:
        out, _ = _Absorbed.apply(q, x, weight, scale, mask)
    if bias is None:
        return out
    bias = _by_heads(bias, q.shape[1])[1].unsqueeze(1)
    return out + (bias if mask is None else bias * mask.any(-1)[:, None, None, None])


def absorb(q: Tensor, weight: Tensor) -> Tensor:
    """W_k^T q: [B, H, m, d] -> [B, H, m, D], the queries that meet x itself."""
    return torch.einsum("bhmd,hde->bhme", q, _by_heads(weight, q.shape[1])[0])


def _by_heads(packed: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Of keys and of values, each [H, d, ...]. Unbound together: autograd joins their gradients in one copy."""
    return packed.unflatten(0, (2, num_heads, -1)).unbind(0)


class _Absorbed(torch.autograd.Function):
    """All but the bias. Keeps q, x and the attention weights [B, H * m, N], which are its second output."""

    @staticmethod
    def forward(ctx, q, x, weight, scale, mask):
        w_k, w_v = _by_heads(weight, q.shape[1])
        queries = _to_tokens(torch.bmm(_to_heads(q), w_k), q)
        attn, _ = masked_softmax(_scores(queries, x, scale), mask)
        context = _to_heads((attn @ x).view(*q.shape[:3], x.shape[2]))
        out = torch.bmm(context, w_v.transpose(1, 2)).unflatten(1, (len(q), q.shape[2])).transpose(0, 1)
        ctx.scale = scale
        ctx.save_for_backward(q, x, weight, attn)
        ctx.mark_non_differentiable(attn)
        return out, attn

    @staticmethod
    def backward(ctx, grad, _):
        refuse_second_derivatives("absorbed_attention")
        q, x, weight, attn = ctx.saved_tensors
        _, needs_x, needs_weight, _, _ = ctx.needs_input_grad
        w_k, w_v = _by_heads(weight, q.shape[1])
        q_heads, grad_heads = _to_heads(q), _to_heads(grad)
        d_context = _to_tokens(torch.bmm(grad_heads, w_v), q)
        d_attn = (d_context @ x.transpose(1, 2)).to(compute_dtype(q.dtype))
        d_scores = (attn * (d_attn - (d_attn * attn).sum(-1, keepdim=True)) * ctx.scale).to(q.dtype)
        d_queries = _to_heads((d_scores @ x).view(*q.shape[:3], x.shape[2]))
        d_q = torch.bmm(d_queries, w_k.transpose(1, 2)).unflatten(1, (len(q), q.shape[2])).transpose(0, 1)

        d_x = d_weight = None
        if needs_x:
            queries = _to_tokens(torch.bmm(q_heads, w_k), q)
            d_x = torch.baddbmm(attn.transpose(1, 2) @ d_context, d_scores.transpose(1, 2), queries)
        if needs_weight:
            d_weight = torch.empty_like(weight)
            d_w_k, d_w_v = _by_heads(d_weight, q.shape[1])
            context = _to_heads((attn @ x).view(*q.shape[:3], x.shape[2]))
            torch.bmm(q_heads.transpose(1, 2), d_queries, out=d_w_k)
            torch.bmm(grad_heads.transpose(1, 2), context, out=d_w_v)
        return d_q, d_x, d_weight, None, None


def _to_heads(x: Tensor) -> Tensor:
    """[B, H, m, d] -> [H, B * m, d], as products with the weights of each head take it."""
    return x.transpose(0, 1).flatten(1, 2)


def _to_tokens(x: Tensor, q: Tensor) -> Tensor:
    """[H, B * m, D] -> [B, H * m, D], as products with tokens take it; q is [B, H, m, d]."""
    return x.unflatten(1, (len(q), q.shape[2])).transpose(0, 1).flatten(1, 2)
