"""Attention of a few queries over all pairs of tokens of two sets: the op, its registration and its gradient.

Plain PyTorch (the equation, R1, R4) is in pair_plain.py; kernels are in pair_native.py (C++, CUDA C++) and
pair_triton.py. `avfkernels.choice` says which runs. A kernel, whichever, is behind one registered pair of ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from avfkernels.choice import choose
from avfkernels.ops import pair_native, pair_triton
from avfkernels.ops.common import casts_for_autocast, check_mask, check_tensors, refuse_second_derivatives
from avfkernels.ops.pair_plain import Pairs, eager, reference, why_not_eager

INTERACTIONS = ("sum", "product")
LAYOUTS = {"q": ["B", "H", "F", "dk"], "k1": ["B", "H", "N1", "dk"], "v1": ["B", "H", "N1", "dv"],
           "k2": ["B", "H", "N2", "dk"], "v2": ["B", "H", "N2", "dv"]}  # fmt: skip


@casts_for_autocast
def pair_attention(
    q: Tensor,
    k1: Tensor,
    v1: Tensor,
    k2: Tensor,
    v2: Tensor,
    *,
    scale: float,
    interaction: str = "sum",
    mask1: Tensor | None = None,
    mask2: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention over the N1 x N2 pairwise interactions of two token sets.

    The pair (i, j) has the key k1[i] + k2[j] and the value v1[i] + v2[j] (`interaction="sum"`, the dense interactions
    of DeepAVFusion, Eqs. 4-6) or k1[i] * k2[j] and v1[i] * v2[j] (`"product"`, the low-rank bilinear form):

        out[f] = sum_ij softmax_ij(scale * q[f] . k_ij) v_ij,     lse[f] = log sum_ij exp(scale * q[f] . k_ij)

    For sums the softmax separates exactly (rewrite R1), softmax_ij = softmax_i(q . k1[i]) * softmax_j(q . k2[j]), so

        out = softmax(scale q k1^T) v1 + softmax(scale q k2^T) v2,     lse = lse1 + lse2

    costs O(N1 + N2) in time and memory. A product is attention with more queries (rewrite R4): with the rows
    q[f] * k1[i] over (k2, v2), giving o[f, i] and its log-sum-exp,

        out[f] = sum_i softmax_i(lse[f, i]) v1[i] * o[f, i],     lse[f] = log sum_i exp(lse[f, i])

    Products and dropped pairs cost O(N1 N2) in time. The kernels keep no pair in memory, forward or backward, and
    FlexAttention on a GPU none of R4; elsewhere (float64 or float16 on a CPU, other devices) all pairs are in memory.

    Split into pieces, either set of tokens at a time, and joined by `merge_attention`, the result is the same.

    Args:
        q: [B, H, F, dk] queries; k1 [B, H, N1, dk], v1 [B, H, N1, dv]; k2 [B, H, N2, dk], v2 [B, H, N2, dv]. fp32,
            fp16, bf16 or float64, one dtype and device; any strides (a unit last stride avoids copies). Under autocast,
            cast as torch's own attention does.
        scale: factor on the logits.
        interaction: "sum" or "product".
        mask1, mask2: bool [B, N1], [B, N2], True for tokens that count; a pair counts where both do. What hidden
            tokens hold, NaN too, reaches no result and no gradient.
        dropout_p: probability, in steps of 1 / 65536, that the weight of a pair is dropped after the softmax; what is
            kept is scaled up. Pass 0 in evaluation.
        seed: of the dropout mask, a function of it and of the indices of the pair alone, on every backend: an int or
            an int64 tensor of one element. None draws one from torch's generator of q's device.
        return_lse: also return the log-sum-exp (that before dropout).

    Returns:
        out [B, H, F, dv] and, if asked for, lse [B, H, F] in fp32 (float64 for float64 inputs). Without any pair (an
        empty side, a side masked out whole), out is 0 and lse is -inf. Gradients are of first order.

    Raises:
        ValueError, TypeError: naming the argument, its shape or dtype, and what was expected.
        RuntimeError: a backend was forced that cannot run with these arguments; a second derivative of a kernel.

    Source: Mo & Morgado, CVPR 2024, https://arxiv.org/abs/2312.01017.
    """
    check_tensors("pair_attention", LAYOUTS, q, k1, v1, k2, v2)
    check_mask("pair_attention", "mask1", mask1, q.shape[0], k1.shape[2], q.device)
    check_mask("pair_attention", "mask2", mask2, q.shape[0], k2.shape[2], q.device)
    if interaction not in INTERACTIONS:
        raise ValueError(f"pair_attention: interaction must be one of {INTERACTIONS}, got {interaction!r}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"pair_attention: dropout_p must be in [0, 1], got {dropout_p}")
    seed = _seed(seed, q.device) if dropout_p > 0.0 else None
    arguments = Pairs(q, k1, v1, k2, v2, mask1, mask2, seed, float(scale), interaction, dropout_p)
    out, lse = _run(arguments, return_lse)
    return (out, lse) if return_lse else out


def _seed(seed: Tensor | int | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(2**63 - 1, (), device=device)
    if not isinstance(seed, Tensor):
        return torch.full((), seed, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(f"pair_attention: seed must be one int64, got {list(seed.shape)} {seed.dtype}")
    return seed.to(device)


class Kernel(NamedTuple):
    """One implementation behind the registered ops."""

    forward: Callable  # (Pairs, out, lse | None, saved | None): fills the three
    backward: Callable  # (Pairs, saved, grad_out, grad_lse | None, grads): fills the five grads


KERNELS = {
    "cpu": Kernel(pair_native.forward_cpu, pair_native.backward_cpu),
    "triton": Kernel(pair_triton.forward, pair_triton.backward),
    "cuda": Kernel(pair_native.forward_cuda, pair_triton.backward),
}
WHY_NOT = {
    "reference": lambda a: None,
    "eager": why_not_eager,
    "cpu": pair_native.why_not_cpu,
    "triton": pair_triton.why_not,
    "cuda": pair_native.why_not_cuda,
}
PLAIN = {"reference": reference, "eager": eager}


def _run(a: Pairs, return_lse: bool) -> tuple[Tensor, Any]:
    name = choose("pair_attention", a, WHY_NOT)
    if name in PLAIN:
        return PLAIN[name](a, return_lse)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in a.tensors())
    options = (a.mask1, a.mask2, a.seed, a.scale, a.interaction, a.dropout_p, name, save)
    if _traced(a.q):
        return torch.ops.avfkernels.pair_attention.default(*a.tensors(), *options)[:2]
    # The same without the dispatcher, which costs more than a small kernel takes.
    if save:
        return _Recorded.apply(*a.tensors(), *options)[:2]
    out, lse = _like(a.q, a.v1.shape[3]), _lse_of(a.q) if return_lse else None
    _launch(a, name, out, lse, None)
    return out, lse


def _traced(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or type(x) is not Tensor


def _like(x: Tensor, width: int) -> Tensor:
    """Memory for [B, H, N, width], heads next to each other: a caller's transpose(1, 2).flatten(2) is a view."""
    B, H, N, _ = x.shape
    return x.new_empty(B, N, H, width).transpose(1, 2)


def _lse_of(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def fake(q, k1, v1, k2, v2, mask1, mask2, seed, scale, interaction, dropout_p, implementation, save):
    """out, lse and what backward needs: offsets and factors of one softmax or two, and of a product out in fp32."""
    (B, H, F, _), dv = q.shape, v1.shape[3]
    kept = (2 + dv if interaction == "product" else 4) * B * H * F if save else 0
    return _like(q, dv), _lse_of(q), q.new_empty(kept, dtype=torch.float32)


def _readable(x: Tensor) -> Tensor:
    """With a unit last stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _made_readable(a: Pairs) -> Pairs:
    a.q, a.k1, a.v1, a.k2, a.v2 = map(_readable, a.tensors())
    a.mask1, a.mask2 = (None if mask is None else mask.contiguous() for mask in (a.mask1, a.mask2))
    return a


def _launch(a: Pairs, implementation: str, out: Tensor, lse: Tensor | None, saved: Tensor | None) -> None:
    if 0 not in a.q.shape[:3]:
        KERNELS[implementation].forward(_made_readable(a), out, lse, saved)


def forward(*arguments):
    """(out, lse, saved) by the kernel that is named."""
    out, lse, saved = fake(*arguments)
    *given, implementation, save = arguments
    _launch(Pairs(*given), implementation, out, lse, saved if save else None)
    return out, lse, saved


def allocate_backward(grad_out, grad_lse, saved, q, k1, v1, k2, v2, *_):
    """The gradients in memory order [B, N, H, d], in one piece or in five.

    glibc keeps what is freed up to 32 MiB a block and twice the largest block in all, and gives the rest back to the
    system; page faults would then cost more than the gradients. One block of five tensors stays, five do not, unless
    they are large.
    """
    sizes = [x.numel() for x in (q, k1, v1, k2, v2)]
    together = q.device.type == "cpu" and sum(sizes) * q.element_size() <= 32 * 2**20
    return [q.new_empty(size) for size in ([sum(sizes)] if together else sizes)]


def _gradients(memory: list[Tensor], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if len(memory) == 1:
        memory = memory[0].split([x.numel() for x in tensors])
    return tuple(
        piece.view(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
        for piece, x in zip(memory, tensors, strict=True)
    )


def backward(grad_out, grad_lse, saved, *arguments):
    """The memory of the five gradients, filled."""
    memory = allocate_backward(grad_out, grad_lse, saved, *arguments)
    *given, implementation = arguments
    a = _made_readable(Pairs(*given))
    if 0 in a.q.shape[:3]:  # no query, nothing that a token could owe a gradient to
        return [piece.zero_() for piece in memory]
    shape = (*a.q.shape[:3], a.v1.shape[3])
    grad_out = a.q.new_zeros(1).expand(shape).contiguous() if grad_out is None else _readable(grad_out)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    KERNELS[implementation].backward(a, saved, grad_out, grad_lse, _gradients(memory, a.tensors()))
    return memory


ARGUMENTS = (
    "Tensor q, Tensor k1, Tensor v1, Tensor k2, Tensor v2, Tensor? mask1, Tensor? mask2, Tensor? seed, float scale, "
    "str interaction, float dropout_p, str implementation"
)
_library = torch.library.Library("avfkernels", "DEF")
_library.define(f"pair_attention({ARGUMENTS}, bool save) -> (Tensor out, Tensor lse, Tensor saved)")
_library.define(f"pair_attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor saved, {ARGUMENTS}) -> Tensor[]")
for _key in ("CPU", "CUDA"):
    _library.impl("pair_attention", forward, _key)
    _library.impl("pair_attention_backward", backward, _key)
torch.library.register_fake("avfkernels::pair_attention", fake, lib=_library)
torch.library.register_fake("avfkernels::pair_attention_backward", allocate_backward, lib=_library)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.interaction, ctx.dropout_p, ctx.implementation, _ = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_out, grad_lse, _):
    refuse_second_derivatives("pair_attention")
    saved, *tensors = ctx.saved_tensors
    options = (ctx.scale, ctx.interaction, ctx.dropout_p, ctx.implementation)
    run = torch.ops.avfkernels.pair_attention_backward.default if _traced(tensors[0]) else backward
    memory = run(grad_out, grad_lse, saved, *tensors, *options)
    return *_gradients(memory, tuple(tensors[:5])), *[None] * 8


class _Recorded(torch.autograd.Function):
    forward, setup_context, backward = staticmethod(forward), staticmethod(_setup_context), staticmethod(_autograd)


torch.library.register_autograd("avfkernels::pair_attention", _autograd, setup_context=_setup_context, lib=_library)
