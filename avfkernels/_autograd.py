"""What the autograd functions of this package share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def recorded_gradients(
    function: Callable, tensors: Sequence[Tensor | None], needed: Sequence[bool], grads: Tensor | Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of `function(*tensors)` that can be differentiated again, None where none is needed.

    A backward pass written by hand calls it while autograd records, which is when second derivatives are asked for.
    """
    outputs = function(*tensors)
    wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]
