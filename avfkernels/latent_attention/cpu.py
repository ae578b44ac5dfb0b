"""Latent attention in C++: pair attention (csrc/pair_sum_kernel.cpp) whose second set is one token of zeros.

That token has weight 1, value 0 and logit 0: it changes neither output nor log-sum-exp, and costs 1 / N of the work.
Keys and values of the first set are both x, so autograd adds their gradients.
"""

from __future__ import annotations

import torch

from avfkernels import _native
from avfkernels.pair_attention import cpu as pair_cpu


def forward(q, x, *, scale, mask, return_lse):
    """See `avfkernels.latent_attention`."""
    x = x.unsqueeze(1)
    zeros = x.new_zeros(x.shape[3]).expand(x.shape[0], 1, 1, -1)
    out, lse = pair_cpu.forward(
        q.unsqueeze(1), x, x, zeros, zeros, scale=scale, interaction="sum", mask1=mask, mask2=None,
        dropout_p=0.0, seed=None, return_lse=return_lse,
    )  # fmt: skip
    return out.squeeze(1), lse.squeeze(1) if return_lse else lse


def why_not(*, q, x, **_) -> str | None:
    q, x = q.unsqueeze(1), x.unsqueeze(1)
    return pair_cpu.why_not(q=q, k1=x, v1=x, k2=x, v2=x)


def is_faster(*, q, x, **_) -> bool:
    # Against `eager` on two cores (bench/test_latent_attention.py): with AVX-512 alone; with AVX2 matrix products take
    # half to two thirds of the kernel's time. They use all threads at any batch size; here a task is 16 queries or,
    # backward, an entry of the batch.
    if _native.isa() != "avx512":
        return False
    (B, M, D), threads = q.shape, torch.get_num_threads()
    tasks = B if pair_cpu.wants_gradients(q, x) else B * (M // 16)
    return M >= 16 and B * M * x.shape[1] * D >= 1_000_000 and tasks >= threads
