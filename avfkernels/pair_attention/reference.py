"""Pair attention as the paper writes it: every pair exists. Slow and large on purpose; the oracle of the tests."""

import torch

from avfkernels._math import combine_masks, masked_softmax
from avfkernels.pair_attention.dropout import pair_dropout


def forward(q, k1, v1, k2, v2, *, scale, interaction, mask1, mask2, dropout_p, seed, return_lse):
    """Softmax attention over all N1 * N2 pairs, laid out (i, j) with j fastest; see `avfkernels.pair_attention`."""
    (B, H, F, _), N1, N2 = q.shape, k1.shape[2], k2.shape[2]
    join = torch.add if interaction == "sum" else torch.mul
    k = join(k1.unsqueeze(3), k2.unsqueeze(2)).flatten(2, 3)  # [B, H, N1 * N2, dk]
    v = join(v1.unsqueeze(3), v2.unsqueeze(2)).flatten(2, 3)  # [B, H, N1 * N2, dv]
    weights, lse = masked_softmax(q @ k.transpose(-2, -1) * scale, combine_masks(mask1, mask2, N1, N2), return_lse)
    if dropout_p > 0.0:
        weights = weights * pair_dropout(seed, dropout_p, B, H, F, N1, N2).flatten(3).to(weights.dtype)
    return weights @ v, lse


def why_not(**_) -> None:
    return None
