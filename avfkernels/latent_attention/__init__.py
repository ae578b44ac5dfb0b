"""Attention of a few wide queries over tokens that are their own keys and values."""

from __future__ import annotations

from torch import Tensor

from avfkernels._checks import check_mask, check_tensors


def latent_attention(
    q: Tensor, x: Tensor, *, scale: float, mask: Tensor | None = None, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention in which x is both keys and values:

        out[m] = sum_n softmax_n(scale * q[m] . x[n]) x[n],     lse[m] = log sum_n exp(scale * q[m] . x[n])

    It is what is left of multi-head cross-attention when the key and value projections move to the query side (rewrite
    R2): with few queries, no K and no V of the N tokens exist, forward or backward. `avfkernels.FactorizedFusion`
    aggregates each modality with it (Eqs. 7-8 of DeepAVFusion).

    Args:
        q: [B, M, D] queries; M counts latents x heads. x: [B, N, D]. fp32, fp16, bf16 or float64, one dtype and device.
        scale: factor on the logits.
        mask: bool [B, N], True for tokens that count.
        return_lse: also return the log-sum-exp.

    Returns:
        out [B, M, D] and, if asked for, lse [B, M] in fp32 (float64 for float64 inputs). Without any token, out is 0
        and lse is -inf.

    Raises:
        ValueError, TypeError: naming the argument, its shape or dtype, and what was expected.
    """
    from avfkernels import _ops  # which imports the backends beside this file

    check_tensors("latent_attention", q, {"q": (q, "B M D"), "x": (x, "B N D")})
    check_mask("latent_attention", "mask", mask, x.shape[0], x.shape[1], q)
    out, lse = _ops.call("latent_attention", q=q, x=x, scale=scale, mask=mask, return_lse=return_lse)
    return (out, lse) if return_lse else out
