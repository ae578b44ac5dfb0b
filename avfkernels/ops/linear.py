"""Linear layers: one with what comes behind it, and several that share one packed weight.

Where oneDNN is faster (onednn.py) it runs them, in inference with GELU and the residual in the same pass. Everywhere
else, and in traces, they are `F.linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfkernels.choice import materialises, transformed
from avfkernels.ops import onednn
from avfkernels.ops.common import autocast_enabled, casts_for_autocast, untouched

if TYPE_CHECKING:
    from typing import TypeGuard


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False, add: Tensor | None = None
) -> Tensor:
    """y = x W^T + b, or its GELU, or y + add: a linear layer with what comes behind it in a transformer.

    Args: x [..., in], weight [out, in], bias [out], add [..., out] like the result; one dtype, autocast aside.
    """
    return _linear(x, weight, bias, None, gelu, add)


def apply_linear(layer: nn.Module, x: Tensor, *, gelu: bool = False, add: Tensor | None = None) -> Tensor:
    """The same of a module, which is called as one if it has hooks or is more than `torch.nn.Linear`."""
    if x.is_cpu and not torch.compiler.is_compiling() and is_linear(layer) and untouched(layer):
        return linear(x, layer.weight, layer.bias, gelu=gelu, add=add)
    return _behind(layer(x), gelu, add)


def is_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module does what `torch.nn.Linear` does."""
    return type(layer).forward is nn.Linear.forward


def split_linear(
    xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, *, sizes: Sequence[int] | None = None
) -> tuple[Tensor, ...]:
    r"""Applies each part of a packed weight to an input of its own.

        sizes given:    y[i] = x[i] W[i]^T + b[i],   W = [W[0]; W[1]; ...] and b by rows, as `sizes` says
        without:        y[i] = x[i] W[i]^T,          W = [W[0], W[1], ...] by columns; the last y takes the whole b

    By rows it is a packed query-key-value projection whose parts see different tokens (rewrite R3), by columns a layer
    over concatenated features that is not to see every pair of them (R1): the sum of all y[i] is W [x[0] ; x[1] ; ...]
    + b. The backward pass writes the gradients of the parts into the one of W. torch.compile and torch.func see the
    parts.

    Args:
        xs: tensors [..., in_i]. weight: [out, in]. bias: [out]. One dtype and device for all, autocast aside.
        sizes: rows of each part.

    Raises:
        ValueError: the sizes do not add up to the weight's.
    """
    columns = sizes is None
    sizes = [x.shape[-1] for x in xs] if sizes is None else list(sizes)
    if sum(sizes) != weight.shape[int(columns)] or len(sizes) != len(xs):
        raise ValueError(
            f"split_linear: {len(xs)} inputs by {'columns' if columns else 'rows'} {sizes} do not make up a weight "
            f"of shape {list(weight.shape)}"
        )
    recorded = torch.is_grad_enabled() and weight.requires_grad and not torch.compiler.is_compiling()
    if recorded and not transformed() and not materialises():
        return casts_for_autocast(_SplitLinear.apply)(columns, sizes, weight, bias, *xs)
    parts = _parts(columns, sizes)
    biases = [*[None] * (len(xs) - 1), bias] if columns else [bias] * len(xs)
    return tuple(_linear(x, weight, b, part) for x, b, part in zip(xs, biases, parts, strict=True))


def _parts(columns: bool, sizes: list[int]) -> list[onednn.Part]:
    return [(int(columns), sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _linear(x, weight, bias, part, gelu: bool = False, add: Tensor | None = None) -> Tensor:
    dtype = onednn.dtype_of(x, weight)
    if dtype is not None and not (torch.is_grad_enabled() and any(map(_requires_grad, (x, weight, bias)))):
        w, b = onednn.packed(weight, bias, part, dtype)
        if onednn.takes(w) and x.shape[-1] == w.shape[1]:
            fits = add is not None and not gelu and add.dtype == dtype and add.shape[:-1] == x.shape[:-1]
            y = onednn.product(x.to(dtype), w, b, gelu=gelu, add=add if fits else None)
            return y if add is None or fits else add + y
    elif dtype == torch.float32 and part is None and not autocast_enabled("cpu"):
        (y,) = _SplitLinear.apply(False, [len(weight)], weight, bias, x)
        return _behind(y, gelu, add)
    return _behind(F.linear(x, *onednn.part_of(weight, bias, part)), gelu, add)


def _requires_grad(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad


def _behind(y: Tensor, gelu: bool, add: Tensor | None) -> Tensor:
    y = F.gelu(y) if gelu else y
    return y if add is None else add + y


class _SplitLinear(torch.autograd.Function):
    """The parts of a weight, whose gradients are written into one."""

    @staticmethod
    def forward(ctx, columns, sizes, weight, bias, *xs):
        ctx.columns, ctx.sizes = columns, sizes
        ctx.save_for_backward(weight, bias, *xs)
        return tuple(_product(x, w, b) for x, w, b in zip(xs, *_split(columns, sizes, weight, bias), strict=True))

    @staticmethod
    def backward(ctx, *grads):
        weight, bias, *xs = ctx.saved_tensors
        _, _, needs_weight, needs_bias, *needs_xs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # for second derivatives, what autograd makes of the parts
            inputs = [t for t, needs in zip((weight, bias, *xs), ctx.needs_input_grad[2:], strict=True) if needs]
            weights, biases = _split(ctx.columns, ctx.sizes, weight, bias)
            outputs = [F.linear(x, w, b) for x, w, b in zip(xs, weights, biases, strict=True)]
            found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=True))
            return None, None, *(next(found) if needs else None for needs in ctx.needs_input_grad[2:])
        d_weight = torch.empty_like(weight) if needs_weight else None
        d_bias = torch.empty_like(bias) if needs_bias else None
        weights, _ = _split(ctx.columns, ctx.sizes, weight, None)
        d_weights, d_biases = _split(ctx.columns, ctx.sizes, d_weight, d_bias)
        d_xs = []
        for x, w, grad, d_w, d_b, needs_x in zip(xs, weights, grads, d_weights, d_biases, needs_xs, strict=True):
            d_xs.append(_product(grad, w.t()) if needs_x else None)
            grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
            if d_w is not None:  # oneDNN, which would need a copy of grad, is no faster
                torch.mm(grad.t(), x, out=d_w)
            if d_b is not None:
                torch.sum(grad, 0, out=d_b)
        return None, None, d_weight, d_bias, *d_xs


def _split(columns: bool, sizes: list[int], weight: Tensor | None, bias: Tensor | None):
    none: list[Tensor | None] = [None] * len(sizes)
    weights = none if weight is None else list(weight.split(sizes, dim=int(columns)))
    if bias is None:
        return weights, none
    return weights, [*none[1:], bias] if columns else list(bias.split(sizes))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if onednn.dtype_of(x, weight) == torch.float32 and (weight.is_contiguous() or weight.t().is_contiguous()):
        return onednn.product(x, weight, bias)
    return F.linear(x, weight, bias)
