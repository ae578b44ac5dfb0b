"""Linear layers that share one packed weight, without the copy that autograd makes to join their weight gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from avfkernels.choice import materialises, transformed
from avfkernels.ops.common import casts_for_autocast, refuse_second_derivatives


def split_linear(
    xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, *, sizes: Sequence[int] | None = None
) -> tuple[Tensor, ...]:
    r"""Applies each part of a packed weight to an input of its own.

        sizes given:    y[i] = x[i] W[i]^T + b[i],   W = [W[0]; W[1]; ...] and b by rows, as `sizes` says
        without:        y[i] = x[i] W[i]^T,          W = [W[0], W[1], ...] by columns; the last y takes the whole b

    By rows it is a packed query-key-value projection whose parts see different tokens (rewrite R3), by columns a layer
    over concatenated features that is not to see every pair of them (R1): the sum of all y[i] is W [x[0] ; x[1] ; ...]
    + b. The backward pass, of first order, writes the gradients of the parts into the one of W. torch.compile and
    torch.func see the parts.

    Args:
        xs: tensors [..., in_i]. weight: [out, in]. bias: [out]. One dtype and device for all, autocast aside.
        sizes: rows of each part.

    Raises:
        ValueError: the sizes do not add up to the weight's.
    """
    columns = sizes is None
    sizes = [x.shape[-1] for x in xs] if columns else list(sizes)
    if sum(sizes) != weight.shape[int(columns)] or len(sizes) != len(xs):
        raise ValueError(
            f"split_linear: {len(xs)} inputs by {'columns' if columns else 'rows'} {sizes} do not make up a weight "
            f"of shape {list(weight.shape)}"
        )
    recorded = torch.is_grad_enabled() and weight.requires_grad and not torch.compiler.is_compiling()
    if not recorded or transformed() or materialises():
        return _parts_applied(columns, sizes, weight, bias, *xs)
    return casts_for_autocast(_SplitLinear.apply)(columns, sizes, weight, bias, *xs)


def _split(columns: bool, sizes: list[int], weight: Tensor, bias: Tensor | None):
    biases = [None] * len(sizes)
    if bias is not None:
        biases = [*biases[1:], bias] if columns else bias.split(sizes)
    return weight.split(sizes, dim=int(columns)), biases


def _parts_applied(columns, sizes, weight, bias, *xs):
    weights, biases = _split(columns, sizes, weight, bias)
    return tuple(F.linear(x, w, b) for x, w, b in zip(xs, weights, biases, strict=True))


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, columns, sizes, weight, bias, *xs):
        ctx.columns, ctx.sizes = columns, sizes
        ctx.save_for_backward(weight, bias, *xs)
        return _parts_applied(columns, sizes, weight, bias, *xs)

    @staticmethod
    def backward(ctx, *grads):
        refuse_second_derivatives("split_linear")
        weight, bias, *xs = ctx.saved_tensors
        _, _, _, needs_bias, *needs_xs = ctx.needs_input_grad
        d_weight, d_bias = torch.empty_like(weight), torch.empty_like(bias) if needs_bias else None
        (weights, _), (d_weights, d_biases) = (
            _split(ctx.columns, ctx.sizes, w, b) for w, b in ((weight, None), (d_weight, d_bias))
        )
        d_xs = []
        for x, w, grad, d_w, d_b, needs_x in zip(xs, weights, grads, d_weights, d_biases, needs_xs, strict=True):
            d_xs.append(grad @ w if needs_x else None)
            grad = grad.reshape(-1, grad.shape[-1])
            torch.mm(grad.t(), x.reshape(-1, x.shape[-1]), out=d_w)
            if d_b is not None:
                torch.sum(grad, 0, out=d_b)
        return None, None, d_weight, d_bias, *d_xs
