"""What the autograd functions of this package share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is active: they see PyTorch's operators."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def gradients_by_formula(
    function: Callable,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Tensor | Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of `function(*tensors)` by each tensor alone, which can be differentiated again; None where not needed.

    A backward pass written by hand gives way to it where autograd records, which is when second derivatives are asked
    for. A grad of None is that of an output which nothing reads.
    """
    # Through nodes of their own: one argument may have been computed from another, or be the same tensor.
    tensors = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    outputs = function(*tensors)
    if isinstance(outputs, Tensor):
        outputs, grads = (outputs,), (grads,)
    read = [(y, grad) for y, grad in zip(outputs, grads, strict=True) if grad is not None and y.requires_grad]
    if not read:
        return [None] * len(needed)
    outputs, grads = zip(*read, strict=True)
    wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]
