"""Self-attention that also reads a prefix of other tokens."""

from __future__ import annotations

from torch import Tensor

from avfkernels._checks import check_tensors


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor, *, scale: float, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention over the keys [prefix ; own]:

        out[i] = sum_j softmax_j(scale * q[i] . [k_prefix ; k][j]) [v_prefix ; v][j]

    Tokens that are read and not updated need only keys and values, never queries (rewrite R3). `TokenFusion` attends to
    both modalities with it.

    Args:
        q, k, v: [B, H, N, d], [B, H, K, d], [B, H, K, dv]; k_prefix, v_prefix: [B, H, P, d], [B, H, P, dv]. fp32, fp16,
            bf16 or float64, one dtype and device.
        scale: factor on the logits.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        out [B, H, N, dv] and, if asked for, lse [B, H, N] in fp32 (float64 for float64 inputs). Without any key, out is
        0 and lse is -inf.

    Raises:
        ValueError, TypeError: naming the argument, its shape or dtype, and what was expected.
    """
    from avfkernels import _ops  # which imports the backends beside this file

    check_tensors(
        "prefix_attention",
        q,
        {
            "q": (q, "B H N d"),
            "k": (k, "B H K d"),
            "v": (v, "B H K dv"),
            "k_prefix": (k_prefix, "B H P d"),
            "v_prefix": (v_prefix, "B H P dv"),
        },
    )
    out, lse = _ops.call(
        "prefix_attention", q=q, k=k, v=v, k_prefix=k_prefix, v_prefix=v_prefix, scale=scale, return_lse=return_lse
    )
    return (out, lse) if return_lse else out
