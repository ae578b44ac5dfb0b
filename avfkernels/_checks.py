"""Argument checks that name the argument, what it is and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a kind of device; False for kinds that know no autocast, such as meta."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def cast_for_autocast(device_type: str, *values) -> tuple:
    """What autocast makes of an op's arguments: its dtype for floating point tensors narrower than float64."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() and v.dtype != torch.float64 else v
        for v in values
    )


def check_tensors(op: str, q: Tensor, tensors: dict[str, tuple[Tensor, str]]) -> None:
    """Every tensor has its layout ("B H F dk"; a letter means the same size everywhere), and q's device and dtype.

    Raises TypeError for a non-tensor, a dtype that is not floating point, or mixed dtypes outside autocast, and
    ValueError for a shape or device that does not fit.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, (tensor, layout) in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor [{layout}], got {type(tensor).__name__}")
        letters = layout.split()
        if tensor.ndim != len(letters):
            raise ValueError(f"{op}: {name} must have shape [{layout}], got {list(tensor.shape)}")
        for letter, size in zip(letters, tensor.shape, strict=True):
            known, owner = sizes.setdefault(letter, (size, name))
            if known != size:
                raise ValueError(
                    f"{op}: {name} must have shape [{layout}] with {letter} = {known} as in {owner}, "
                    f"got {list(tensor.shape)}"
                )
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, q on {q.device}; move them to one device")
        if tensor.dtype != q.dtype and not autocast_enabled(q.device.type):
            raise TypeError(f"{op}: {name} is {tensor.dtype}, q is {q.dtype}; cast them to one dtype or use autocast")


def check_mask(op: str, name: str, mask: Tensor | None, batch: int, tokens: int, q: Tensor) -> None:
    """A mask is a bool tensor [B, N], True where a token may be attended to. Raises TypeError or ValueError."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{op}: {name} must be a bool tensor (True = attend), got {got}")
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] != tokens:
        raise ValueError(f"{op}: {name} must have shape [B, N] = [{batch}, {tokens}], got {list(mask.shape)}")
    if mask.device != q.device:
        raise ValueError(f"{op}: {name} is on {mask.device}, q on {q.device}; move them to one device")
