"""Pair attention as the paper writes it: every pair exists. Slow and large on purpose; the oracle of the tests."""

import torch
import torch.nn.functional as F

from avfkernels._math import combine_masks, masked_softmax


def forward(q, k1, v1, k2, v2, *, scale, interaction, mask1, mask2, return_lse, dropout_p=0.0):
    """Softmax attention over all N1 * N2 pairs, laid out (i, j) with j fastest; see `avfkernels.pair_attention`.

    `dropout_p` drops pair weights after the softmax, as the release does in training.
    """
    join = torch.add if interaction == "sum" else torch.mul
    k = join(k1.unsqueeze(3), k2.unsqueeze(2)).flatten(2, 3)  # [B, H, N1 * N2, dk]
    v = join(v1.unsqueeze(3), v2.unsqueeze(2)).flatten(2, 3)  # [B, H, N1 * N2, dv]
    mask = combine_masks(mask1, mask2, k1.shape[2], k2.shape[2])
    weights, lse = masked_softmax(q @ k.transpose(-2, -1) * scale, mask, return_lse)
    return F.dropout(weights, dropout_p) @ v, lse


def why_not(**_) -> None:
    return None
