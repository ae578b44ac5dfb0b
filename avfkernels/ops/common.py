"""What the ops share: checks that name the argument, what it is and what was expected; autocast; plain attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfkernels.choice import materialises, transformed

Op = TypeVar("Op", bound=Callable[..., Any])


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a kind of device; False for kinds that know no autocast, such as meta."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def untouched(module: nn.Module) -> bool:
    """Whether a call of a module is its class's forward and nothing else: no hooks, no forward of its own."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(module, kind) for kind in hooks) and "forward" not in vars(module)


def casts_for_autocast(op: Op) -> Op:
    """Under autocast, runs an op in autocast's dtype, as torch's own attention does; float64 stays as it is."""

    @wraps(op)
    def run(*args, **kwargs):
        tensors = args if args and isinstance(args[0], Tensor) else (*args, *kwargs.values())
        device = next((x.device.type for x in tensors if isinstance(x, Tensor)), "meta")
        if not autocast_enabled(device):
            return op(*args, **kwargs)
        dtype = torch.get_autocast_dtype(device)

        def narrow(x):
            floating = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
            return x.to(dtype) if floating else x

        with torch.autocast(device, enabled=False):
            return op(*map(narrow, args), **{name: narrow(x) for name, x in kwargs.items()})

    return cast(Op, run)


def check_tensors(op: str, layouts: dict[str, list[str]], *tensors: Tensor) -> None:
    """Every tensor has its layout (B H F dk; a letter is one size everywhere), and the device and dtype of the first.

    Raises TypeError for what is no tensor or not floating point, ValueError for what does not fit.
    """
    sizes: dict[str, int] = {}
    first, q = next(iter(layouts)), tensors[0]
    for (name, layout), tensor in zip(layouts.items(), tensors, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor [{' '.join(layout)}], got {type(tensor).__name__}")
        shape = tensor.shape
        if len(shape) != len(layout):
            raise ValueError(f"{op}: {name} must have shape [{' '.join(layout)}], got {list(shape)}")
        for letter, size in zip(layout, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                owner = next(other for other, letters in layouts.items() if letter in letters)
                raise ValueError(
                    f"{op}: {name} must have shape [{' '.join(layout)}] with {letter} = {sizes[letter]} as in {owner}, "
                    f"got {list(shape)}"
                )
        if tensor.device != q.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first} on {q.device}; move them to one device")
        if tensor.dtype != q.dtype:
            raise ValueError(
                f"{op}: {name} {list(shape)} is {tensor.dtype}, {first} {list(q.shape)} is {q.dtype}; cast them to one "
                "dtype or use autocast"
            )
    if not q.is_floating_point():
        raise TypeError(f"{op}: {first} must be floating point, got {list(q.shape)} {q.dtype}")


def check_mask(op: str, name: str, mask: Tensor | None, batch: int, tokens: int, device: torch.device) -> None:
    """A mask is a bool tensor [B, N], True where a token may be attended to. Raises ValueError."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = f"{list(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{op}: {name} must be a bool tensor [B, N] = [{batch}, {tokens}] (True = attend), got {got}")
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] != tokens:
        raise ValueError(f"{op}: {name} must have shape [B, N] = [{batch}, {tokens}], got {list(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"{op}: {name} is on {mask.device}, the tokens on {device}; move them to one device")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that logits and softmax use: half types are widened to float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def hide(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B, ..., N, d] with zeros where mask [B, N] is False: what is there, a NaN too, meets no weight of 0."""
    if mask is None:
        return x
    return x.masked_fill(~mask.view(mask.shape[0], *[1] * (x.ndim - 3), mask.shape[1], 1), 0.0)


def masked_softmax(scores: Tensor, mask: Tensor | None, return_lse: bool = False) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension, in at least float32, back in the dtype of `scores`.

    mask [B, N] keeps where True. A row without any key has weights 0 and lse -inf. lse is fp32 (float64 for float64
    scores), and empty unless asked for.
    """
    dtype = scores.dtype
    scores = scores.to(compute_dtype(dtype))
    keep = None
    if mask is not None:
        mask = mask.reshape(mask.shape[0], *[1] * (scores.ndim - 2), mask.shape[1])
        keep = mask.any(-1, keepdim=True)
        # Rows without a key are computed as if unmasked and then zeroed: no NaN, forward or backward.
        scores = scores.masked_fill(~mask & keep, float("-inf"))
    weights = scores.softmax(-1)
    lse = torch.logsumexp(scores, -1) if return_lse else scores.new_empty(0)
    if keep is not None:
        weights = weights * keep
        lse = lse.masked_fill(~keep.squeeze(-1), float("-inf")) if return_lse else lse
    return weights.to(dtype), lse


def pair_mask(mask1: Tensor | None, mask2: Tensor | None, n1: int, n2: int) -> Tensor | None:
    """[B, N1], [B, N2] -> [B, N1 * N2]: a pair counts where both of its tokens do."""
    if mask1 is None and mask2 is None:
        return None
    mask1, mask2 = _both(mask1, mask2, n1, n2)
    return (mask1.unsqueeze(2) & mask2.unsqueeze(1)).flatten(1)


def join_masks(mask1: Tensor | None, mask2: Tensor | None, n1: int, n2: int) -> Tensor | None:
    """[B, N1], [B, N2] -> [B, N1 + N2], of one set of tokens behind the other."""
    if mask1 is None and mask2 is None:
        return None
    return torch.cat(_both(mask1, mask2, n1, n2), 1)


def _both(mask1, mask2, n1, n2) -> tuple[Tensor, Tensor]:
    return (
        mask2.new_ones(mask2.shape[0], n1) if mask1 is None else mask1,
        mask1.new_ones(mask1.shape[0], n2) if mask2 is None else mask2,
    )


def refuse_second_derivatives(op: str) -> None:
    """For backward passes written by hand: under create_graph=True autograd would take their results for constants."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: create_graph=True asks for second derivatives, which this backward pass does not have; run forward "
            "inside `with avfkernels.backend('reference'):`, which is plain PyTorch"
        )


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, return_lse: bool = False
) -> tuple[Tensor, Tensor]:
    """Ordinary attention, out [..., F, dv] and lse [..., F]: out 0 and lse -inf for a query without any key.

    PyTorch's fused attention where that will do: it has neither lse nor forward mode, and in float64, where formulas
    are compared, no use. Otherwise by matrix products and a softmax, in at least float32.
    """
    k, v = hide(k, mask), hide(v, mask)
    if return_lse or q.dtype == torch.float64 or materialises() or transformed() or k.shape[-2] == 0:
        dtype = compute_dtype(q.dtype)
        weights, lse = masked_softmax(q.to(dtype) @ k.to(dtype).transpose(-2, -1) * scale, mask, return_lse)
        return (weights @ v.to(dtype)).to(q.dtype), lse
    nothing = q.new_empty(0, dtype=torch.float32)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale), nothing
    keep = mask.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, (mask | ~keep)[:, None, None], scale=scale)
    return out * keep[..., None, None], nothing
