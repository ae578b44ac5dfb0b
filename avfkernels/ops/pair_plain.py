"""Pair attention in plain PyTorch: its arguments, the paper's equation, and the rewrites R1 and R4."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from avfkernels.choice import transformed
from avfkernels.ops.common import attend, hide, masked_softmax, pair_mask
from avfkernels.ops.dropout import pair_dropout


@dataclass
class Pairs:
    """The arguments of `avfkernels.pair_attention`, checked; `seed` is an int64 tensor, None without dropout."""

    q: Tensor
    k1: Tensor
    v1: Tensor
    k2: Tensor
    v2: Tensor
    mask1: Tensor | None
    mask2: Tensor | None
    seed: Tensor | None
    scale: float
    interaction: str
    dropout_p: float

    def tensors(self) -> tuple[Tensor, ...]:
        return self.q, self.k1, self.v1, self.k2, self.v2

    def separates(self) -> bool:
        """Whether rewrite R1 holds, so that no pair need be visited."""
        return self.interaction == "sum" and self.dropout_p == 0.0


def _hidden(a: Pairs) -> Pairs:
    if a.mask1 is None and a.mask2 is None:
        return a
    (k1, v1), (k2, v2) = ((hide(k, m), hide(v, m)) for k, v, m in ((a.k1, a.v1, a.mask1), (a.k2, a.v2, a.mask2)))
    return replace(a, k1=k1, v1=v1, k2=k2, v2=v2)


def reference(a: Pairs, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Softmax attention over all N1 * N2 pairs, each of which exists, laid out (i, j) with j fastest."""
    a = _hidden(a)
    (B, H, F, _), N1, N2 = a.q.shape, a.k1.shape[2], a.k2.shape[2]
    join = torch.add if a.interaction == "sum" else torch.mul
    k = join(a.k1.unsqueeze(3), a.k2.unsqueeze(2)).flatten(2, 3)  # [B, H, N1 * N2, dk]
    v = join(a.v1.unsqueeze(3), a.v2.unsqueeze(2)).flatten(2, 3)  # [B, H, N1 * N2, dv]
    mask = pair_mask(a.mask1, a.mask2, N1, N2)
    weights, lse = masked_softmax(a.q @ k.transpose(-2, -1) * a.scale, mask, return_lse)
    if a.dropout_p > 0.0:
        weights = weights * pair_dropout(a.seed, a.dropout_p, B, H, F, N1, N2).flatten(3).to(weights.dtype)
    return weights @ v, lse


def eager(a: Pairs, return_lse: bool) -> tuple[Tensor, Tensor]:
    """R1 for sums, two attentions added: O(N1 + N2) time and memory. R4 for products."""
    if 0 in (a.k1.shape[2], a.k2.shape[2]):  # no pair to hold
        return reference(a, return_lse)
    if a.interaction == "product":
        out, lse = _product(_hidden(a))
    else:
        sides = ((a.k1, a.v1, a.mask1), (a.k2, a.v2, a.mask2))
        (out1, lse1), (out2, lse2) = (attend(a.q, k, v, a.scale, mask, return_lse) for k, v, mask in sides)
        out, lse = out1 + out2, lse1 + lse2
    for mask in (a.mask1, a.mask2):  # where one side has no token there is no pair, whatever the other has
        if mask is not None:
            out = out * mask.any(-1)[:, None, None, None]
    return out, lse


def why_not_eager(a: Pairs) -> str | None:
    return "R1 and R4 do not hold where pairs are dropped" if a.dropout_p > 0.0 else None


def _product(a: Pairs) -> tuple[Tensor, Tensor]:
    """R4: attention of the rows q_f * a_i over the other side, joined over i by a softmax of their lse.

    The shorter side is the one that becomes rows: O(F min(N1, N2) d) memory where FlexAttention runs.
    """
    if a.k1.shape[2] > a.k2.shape[2]:
        a = replace(a, k1=a.k2, v1=a.v2, mask1=a.mask2, k2=a.k1, v2=a.v1, mask2=a.mask1)
    F, N1, mask2 = a.q.shape[2], a.k1.shape[2], a.mask2
    if mask2 is not None:  # opened where there is no j: `eager` clears what comes of it, and no softmax is over nothing
        mask2 = mask2 | ~mask2.any(-1, keepdim=True)
    flexible = a.q.device.type == "cuda" and a.q.dtype != torch.float64 and not transformed()
    dtype = a.q.dtype if flexible else torch.promote_types(a.q.dtype, torch.float32)
    rows = (a.q.to(dtype).unsqueeze(2) * a.k1.to(dtype).unsqueeze(3)).flatten(2, 3)  # [B, H, N1 * F, dk]
    out, lse = (flex if flexible else _attend)(rows, a.k2.to(dtype), a.v2.to(dtype), a.scale, mask2)
    out, lse = out.unflatten(2, (N1, F)), lse.unflatten(2, (N1, F)).transpose(2, 3)
    weights, joint = masked_softmax(lse, a.mask1, True)  # over i
    if a.mask2 is not None:
        joint = joint.masked_fill(~a.mask2.any(-1)[:, None, None], float("-inf"))
    out = torch.einsum("bhfi,bhifd,bhid->bhfd", weights.to(dtype), out, a.v1.to(dtype))
    return out.to(a.q.dtype), joint


def _attend(q, k, v, scale, mask):
    return attend(q, k, v, scale, mask, return_lse=True)


def flex(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention and its lse, both differentiable, by FlexAttention; mask [B, N] keeps a key of each entry."""
    from torch.nn.attention.flex_attention import AuxRequest

    def keep(score, b, h, i, j):
        return torch.where(mask[b, j], score, float("-inf"))

    options = {"scale": scale, "return_aux": AuxRequest(lse=True)}
    out, aux = _flex_attention()(q, k, v, None if mask is None else keep, **options)
    return out, aux.lse


def _flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()


@cache
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
