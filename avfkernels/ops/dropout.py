"""The dropout mask of pair attention as a tensor of all pairs: what the kernels regenerate from a counter.

Philox4x32-10 (Salmon et al., SC 2011) with the counter (j // 8, i, query, b * H + h) and the seed as its key gives 128
bits: eight 16-bit numbers, one for each of the pairs j = 8 * (j // 8) .. + 7, low halves first (csrc/philox.h).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def threshold(dropout_p: float) -> int:
    """A pair is kept if its 16-bit number is at least this."""
    return math.floor(dropout_p * 65536 + 0.5)  # halves up, as in C


def keep_factor(dropout_p: float) -> float:
    """What kept weights are scaled by: the exact inverse of the probability of being kept."""
    return 65536 / (65536 - threshold(dropout_p)) if threshold(dropout_p) < 65536 else 0.0


def _multiply(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of x * m, for 32-bit numbers held in int64."""
    low, high = x * (m & 0xFFFF), x * (m >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _WORD


def philox(counter: list[Tensor], seed: Tensor) -> list[Tensor]:
    """Philox4x32-10: four words of counter (int64 tensors of 32-bit values) and a 64-bit seed to four random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply(c0, 0xD2511F53), _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def pair_dropout(seed: Tensor, dropout_p: float, B: int, H: int, F: int, N1: int, N2: int) -> Tensor:
    """[B, H, F, N1, N2] float32: 0 for a dropped pair, `keep_factor` for a kept one."""
    device, groups = seed.device, (N2 + 7) // 8
    sizes = (B * H, F, N1, groups)
    head, query, i, group = torch.meshgrid(*(torch.arange(n, device=device) for n in sizes), indexing="ij")
    words = philox([group, i, query, head], seed)
    numbers = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    keep = numbers.flatten(3)[..., :N2] >= threshold(dropout_p)
    return (keep * keep_factor(dropout_p)).to(torch.float32).view(B, H, F, N1, N2)
