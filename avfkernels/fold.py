"""Affines of norms, folded into the projections behind them, and kept in inference until a weight has changed.

    W (g * x^ + b) = (W g) x^ + W b

See layer.py for what is read by one projection.
"""

from __future__ import annotations

from operator import is_
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from avfkernels.ops.common import autocast_enabled, compute_dtype


class Folded(NamedTuple):
    """Of one modality: W g [3D + R, D] and W b [3D + R] of all that reads it; R is 0 where R2 reads the tokens bare."""

    weight: Tensor
    bias: Tensor
    agg_weight: Tensor | None  # of R2: keys and values of the aggregation, [2D, D] and [2D]
    agg_bias: Tensor | None


def _fold(block: nn.Module, norm: nn.Module, read: tuple[Tensor, Tensor | None], absorbs: bool) -> Folded:
    """The affine of norms, folded into the projections behind them, in at least float32."""
    qkv = _affine(block.attn.qkv.weight, block.attn.qkv.bias, block.norm1)
    fusion = _affine(*read, norm)
    if absorbs:
        return Folded(*qkv, *fusion)
    return Folded(torch.cat((qkv[0], fusion[0])), torch.cat((qkv[1], fusion[1])), None, None)


def _affine(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(weight.dtype)
    wide = weight.to(dtype)
    constant = (wide * norm.bias.to(dtype)).sum(-1)  # no matrix product: autocast would round it
    constant = constant if bias is None else constant + bias.to(dtype)
    return (wide * norm.weight.to(dtype)).to(weight.dtype), constant.to(weight.dtype)


def folds(image_block, audio_block, fusion_block, absorbs: bool) -> tuple[Folded, Folded]:
    blocks = zip((image_block, audio_block), fusion_block.norms(), fusion_block.attn.reads(), strict=True)
    return tuple(_fold(block, norm, read, absorbs) for block, norm, read in blocks)


_written = 0


def weights_changed(*_) -> None:
    """Says that weights may have been written to where PyTorch does not see it, as through `Tensor.data`.

    What is kept of weights for inference is made anew. Steps of optimizers say so themselves (the fused ones write past
    the counters of their parameters), and writes in place are seen.
    """
    global _written
    _written += 1


register_optimizer_step_post_hook(weights_changed)


class _Kept:
    """The folds of one layer, and what they were made of."""

    def __init__(self, sources: list[Tensor], folded: tuple[Folded, Folded]):
        # Detached: the memory stays where it is, even if a parameter is given another; addresses tell them apart.
        self.sources, self.aliases = sources, [source.detach() for source in sources]
        self.addresses, self.versions, self.folded = addresses(sources), versions(sources), folded


def addresses(tensors: list[Tensor]) -> list[int]:
    """Changes whenever one of the tensors lies elsewhere; an address is told apart while its memory is held."""
    return [tensor.data_ptr() for tensor in tensors]


def versions(tensors: list[Tensor]) -> list[int]:
    """Changes whenever one of the tensors is written to."""
    return [_written, *(tensor._version for tensor in tensors)]


# fusion block -> (dtype, by R2 or not) -> what is kept of its layer. Weak, and no part of any module: copies of a model
# share nothing.
KEPT: WeakKeyDictionary[nn.Module, dict[tuple[torch.dtype, bool], _Kept]] = WeakKeyDictionary()


@torch.inference_mode(False)
@torch.no_grad()
def kept_folds(
    image_block, audio_block, fusion_block, x: Tensor, absorbs: bool = False
) -> tuple[Folded, Folded] | None:
    """The folds of a layer for inference: kept until a parameter is another one, or has been written to.

    A parameter that has been written to is folded into the same memory, which CUDA graphs have recorded. None for
    parameters of inference mode, which do not say that they have been written to.
    """
    blocks = image_block, audio_block, fusion_block
    sources = _sources(*blocks)
    if any(source.is_inference() for source in sources):
        return None
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if autocast_enabled(device) else sources[0].dtype
    kept = KEPT.setdefault(fusion_block, {}).get((dtype, absorbs))
    same = kept and all(map(is_, kept.sources, sources)) and kept.addresses == addresses(sources)
    if same and kept.versions == versions(sources):
        return kept.folded
    made = tuple(Folded(*(t if t is None else t.to(dtype) for t in part)) for part in folds(*blocks, absorbs))
    if same:
        for old, new in zip(kept.folded, made, strict=True):
            for a, b in zip(old, new, strict=True):
                if a is not None:
                    a.copy_(b)
        kept.versions = versions(sources)
    else:
        kept = KEPT[fusion_block][dtype, absorbs] = _Kept(sources, made)
    return kept.folded


def _sources(image_block, audio_block, fusion_block) -> list[Tensor]:
    found = []
    for block in (image_block, audio_block):
        found += [block.norm1.weight, block.norm1.bias, block.attn.qkv.weight, block.attn.qkv.bias]
    for norm in fusion_block.norms():
        found += [norm.weight, norm.bias]
    for reader in fusion_block.attn.readers().values():
        found += [reader.weight, reader.bias]
    return [tensor for tensor in found if tensor is not None]
