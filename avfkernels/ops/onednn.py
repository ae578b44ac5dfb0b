"""Linear layers on a CPU by oneDNN, which comes with PyTorch.

PyTorch gives products of float32 to MKL, which on AMD takes its path for AVX2, and calls oneDNN for bfloat16. oneDNN
takes what the processor has, writes the bias, GELU and the residual as it leaves, and reads weights in an order of its
own. The operators are those that torch.compile writes when it freezes weights: private, so that `why_not` tries them.
"""

from __future__ import annotations

import os
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from avfkernels.choice import cpu_flags, multiplies_bf16, untraced
from avfkernels.fold import addresses, versions

EXACT = (Tensor, nn.Parameter)  # subclasses see the operators that they know
ROWS = 256  # a hint: the order of weights that is best for so many rows serves all
Part = tuple[int, int, int]  # of a weight: by rows (0) or columns (1), where it begins, its size


def dtype_of(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype that oneDNN computes a layer in, or None where PyTorch's own operator runs."""
    if not x.is_cpu or type(x) not in EXACT or type(weight) not in EXACT or x.numel() == 0 or not untraced():
        return None
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    if not torch.backends.mkldnn.enabled or not (autocast or weight.dtype == dtype):
        return None
    return dtype if why_not(dtype) is None else None


@cache
def why_not(dtype: torch.dtype) -> str | None:
    """The reason that layers of a dtype run by PyTorch's own operator on this machine, or None."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"{dtype} has no such operators"
    if dtype == torch.float32 and not {"AuthenticAMD", "avx2"} <= cpu_flags():
        return "measured to be faster than MKL on AMD alone"
    if dtype == torch.bfloat16 and not multiplies_bf16():  # elsewhere F.linear is oneDNN's, too
        return "the processor does not multiply bfloat16 faster than float32"
    try:
        right = _right(dtype)
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"this PyTorch does not have oneDNN's operators as they are called: {error}"
    return None if right else "oneDNN's operators, tried on a small layer, are not right"


@torch.inference_mode(False)
@torch.no_grad()
def _right(dtype: torch.dtype) -> bool:
    x, weight, bias, add = (
        torch.linspace(-3, 3, n * m, device="cpu").view(n, m).to(dtype)
        for n, m in ((5, 24), (40, 24), (1, 40), (5, 40))
    )
    y = F.linear(x.double(), weight.double(), bias[0].double())
    weights = weight, weight.t().contiguous().t(), _order(weight)
    pairs = [(product(x, w, bias[0], gelu=True), F.gelu(y)) for w in weights]
    pairs += [(product(x, w, bias[0], add=add), y + add) for w in weights]
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-6
    return all((ours - theirs).norm() <= bound * theirs.norm() for ours, theirs in pairs)


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False, add: Tensor | None = None
) -> Tensor:
    """x W^T + b, and its GELU or the sum with `add`; no gradients.

    The weight [out, in] is as `packed` gives it, contiguous, or the transpose of what is. Any other, as a slice of
    columns, takes a path of oneDNN that is 1000 times slower.
    """
    if add is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, add, weight, bias, "add")
    attr = ("gelu", [], "none") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, *attr)


def takes(weight: Tensor) -> bool:
    """Whether `product` takes the weight as it is."""
    return weight.is_mkldnn or weight.is_contiguous()


def part_of(weight: Tensor, bias: Tensor | None, part: Part | None) -> tuple[Tensor, Tensor | None]:
    """A part of a layer; of columns the bias is the whole one."""
    if part is None:
        return weight, bias
    return weight.narrow(*part), bias if bias is None or part[0] == 1 else bias.narrow(*part)


# weight -> part -> dtype, versions and addresses of weight and bias, the two as `product` takes them, and what holds
# their memory: no other tensor can come to lie at these addresses.
PACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed(weight: Tensor, bias: Tensor | None, part: Part | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a part of a layer for inference, in oneDNN's order: kept until one of them is written to.

    That is one more copy of the linear weights; AVF_PACK=0 refuses it. Then, and for weights that are no parameters or
    do not say when they are written to (those of inference mode), they are as they are.
    """
    sources = [weight] if bias is None else [weight, bias]
    if type(weight) is Tensor or os.environ.get("AVF_PACK") == "0" or any(t.is_inference() for t in sources):
        w, b = part_of(weight, bias, part)
        return w.to(dtype), None if b is None else b.to(dtype)
    state = dtype, versions(sources), addresses(sources)
    by_part = PACKED.get(weight)
    if by_part is None:
        by_part = PACKED[weight] = {}
    kept = by_part.get(part)
    if kept is None or kept[0] != state:
        if part is None or None in by_part:  # one copy
            by_part.clear()
        held = [source.detach() for source in sources]
        kept = by_part[part] = state, _made(weight, bias, part, dtype), held
    return kept[1]


@torch.inference_mode(False)
@torch.no_grad()
def _made(weight: Tensor, bias: Tensor | None, part: Part | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    w, b = part_of(weight, bias, part)
    return _order(w.to(dtype).contiguous()), None if b is None else b.to(dtype)


def _order(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight.default(weight, ROWS)
