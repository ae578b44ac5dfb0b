"""Pair attention in C++ (csrc/pair_*_kernel.cpp): 16 queries in a vector, online softmax, no pair in memory."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from avfkernels import _native
from avfkernels.pair_attention import eager

SCHEMA = (
    "pair_attention_cpu(Tensor q, Tensor k1, Tensor v1, Tensor k2, Tensor v2, float scale, str interaction, "
    "Tensor? mask1, Tensor? mask2, float dropout_p, Tensor? seed, bool return_lse) "
    "-> (Tensor out, Tensor lse, Tensor saved_softmax, Tensor saved_out)"
)
# Without gradients: no autograd, which costs more than a small kernel takes.
INFERENCE_SCHEMA = (
    "pair_attention_cpu_inference(Tensor q, Tensor k1, Tensor v1, Tensor k2, Tensor v2, float scale, "
    "str interaction, Tensor? mask1, Tensor? mask2, float dropout_p, Tensor? seed, bool return_lse) "
    "-> (Tensor out, Tensor lse)"
)
BACKWARD_SCHEMA = (
    "pair_attention_cpu_backward(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k1, Tensor v1, Tensor k2, "
    "Tensor v2, Tensor saved_softmax, Tensor saved_out, float scale, str interaction, Tensor? mask1, Tensor? mask2, "
    "float dropout_p, Tensor? seed) -> Tensor[]"
)
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # AvfDtype of csrc/avf.h
INTERACTIONS = {"sum": 0, "product": 1}  # AvfInteraction


# AvfPairAttention of csrc/avf.h: 12 AvfTensors of 4 words, 6 pointers and 7 sizes; the seed; two floats; two enums.
_ARGUMENTS = struct.Struct("61q Q 2f 2i")


def forward(q, k1, v1, k2, v2, *, scale, interaction, mask1, mask2, dropout_p, seed, return_lse):
    """See `avfkernels.pair_attention`."""
    arguments = (q, k1, v1, k2, v2, scale, interaction, mask1, mask2, dropout_p, seed, return_lse)
    if wants_gradients(q, k1, v1, k2, v2):
        return torch.ops.avfkernels.pair_attention_cpu(*arguments)[:2]
    return torch.ops.avfkernels.pair_attention_cpu_inference(*arguments)


def wants_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def why_not(*, q, k1, v1, k2, v2, **_) -> str | None:
    if q.device.type != "cpu":
        return f"the tensors are on {q.device.type}, not on the CPU"
    if q.dtype not in DTYPES:
        return f"it takes float32 and bfloat16, not {q.dtype}"
    for name, tensor in (("q", q), ("k1", k1), ("v1", v1), ("k2", k2), ("v2", v2)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"{name} has a last stride of {tensor.stride(-1)}, not 1"
    return _native.why_unavailable()


def _like(tensor: Tensor, width: int | None = None) -> Tensor:
    """Memory for [B, H, N, width], heads next to each other: a caller's transpose(1, 2).flatten(2) is a view."""
    B, H, N, d = tensor.shape
    return tensor.new_empty(B, N, H, d if width is None else width).transpose(1, 2)


def _outputs(q: Tensor, v1: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    B, H, F, _ = q.shape
    return _like(q, v1.shape[3]), q.new_empty((B, H, F) if return_lse else 0, dtype=torch.float32)


def _saved(q: Tensor, v1: Tensor, interaction: str) -> tuple[Tensor, Tensor]:
    """What backward needs: of each softmax an offset and a factor, and of products the output, in float32."""
    (B, H, F, _), product = q.shape, interaction == "product"
    softmax = q.new_empty(1 if product else 2, 2, B, H, F, dtype=torch.float32)
    return softmax, q.new_empty((B, H, F, v1.shape[3]) if product else 0, dtype=torch.float32)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _strided(tensor: Tensor | None) -> tuple[int, ...]:
    """AvfTensor: the address and the strides of batch, head and token."""
    return (0, 0, 0, 0) if tensor is None else (tensor.data_ptr(), *tensor.stride()[:3])


def _call(
    function: str, q, k1, v1, k2, v2, scale, interaction, mask1, mask2, dropout_p, seed, saved_softmax, saved_out,
    out=None, lse=None, grad_out=None, grad_lse=None, grads=(None,) * 5,
):  # fmt: skip
    grad_q, grad_k1, grad_v1, grad_k2, grad_v2 = grads
    arguments = _ARGUMENTS.pack(
        *_strided(q), *_strided(k1), *_strided(k2), *_strided(v1), *_strided(v2), _pointer(mask1), _pointer(mask2),
        *_strided(out), _pointer(lse), _pointer(saved_softmax), _pointer(saved_out), *_strided(grad_out),
        _pointer(grad_lse), *_strided(grad_q), *_strided(grad_k1), *_strided(grad_k2), *_strided(grad_v1),
        *_strided(grad_v2), *q.shape[:3], k1.shape[2], k2.shape[2], q.shape[3], v1.shape[3],
        0 if seed is None else int(seed) & 0xFFFFFFFFFFFFFFFF, scale, dropout_p, DTYPES[q.dtype],
        INTERACTIONS[interaction],
    )  # fmt: skip
    _native.check(getattr(_native.library(), function)(arguments), function)


def _forward(q, k1, v1, k2, v2, scale, interaction, mask1, mask2, dropout_p, seed, return_lse, saved=(None, None)):
    out, lse = _outputs(q, v1, return_lse)
    mask1, mask2 = (None if mask is None else mask.contiguous() for mask in (mask1, mask2))
    _call(
        "avf_pair_attention_forward", q, k1, v1, k2, v2, scale, interaction, mask1, mask2, dropout_p, seed, *saved,
        out, lse if return_lse else None,
    )  # fmt: skip
    return out, lse


def kernel(q, k1, v1, k2, v2, scale, interaction, *options):
    saved = _saved(q, v1, interaction)
    return *_forward(q, k1, v1, k2, v2, scale, interaction, *options, saved), *saved


def fake(q, k1, v1, k2, v2, scale, interaction, mask1, mask2, dropout_p, seed, return_lse):
    return *_outputs(q, v1, return_lse), *_saved(q, v1, interaction)


def inference_kernel(*arguments):
    return _forward(*arguments)


def inference_fake(q, k1, v1, k2, v2, scale, interaction, mask1, mask2, dropout_p, seed, return_lse):
    return _outputs(q, v1, return_lse)


def _gradients(memory: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Gradients of the tensors, with the strides of `_like`, in one piece of memory or in five."""
    if len(memory) == 1:
        memory = memory[0].split([tensor.numel() for tensor in tensors])
    return [
        piece.view(tensor.shape[0], tensor.shape[2], tensor.shape[1], tensor.shape[3]).transpose(1, 2)
        for piece, tensor in zip(memory, tensors, strict=True)
    ]


def backward_kernel(
    grad_out, grad_lse, q, k1, v1, k2, v2, saved_softmax, saved_out,
    scale, interaction, mask1, mask2, dropout_p, seed,
):  # fmt: skip
    memory = backward_fake(grad_out, grad_lse, q, k1, v1, k2, v2)
    if q.shape[2] == 0:  # no query, nothing that a token could owe a gradient to
        return [piece.zero_() for piece in memory]
    if grad_out is None:
        grad_out = q.new_zeros(1, 1, 1, v1.shape[3]).expand(*q.shape[:3], -1)
    elif grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    mask1, mask2, grad_lse = (None if t is None else t.contiguous() for t in (mask1, mask2, grad_lse))
    _call(
        "avf_pair_attention_backward", q, k1, v1, k2, v2, scale, interaction, mask1, mask2, dropout_p, seed,
        saved_softmax, saved_out, grad_out=grad_out, grad_lse=grad_lse, grads=_gradients(memory, [q, k1, v1, k2, v2]),
    )  # fmt: skip
    return memory


def backward_fake(grad_out, grad_lse, q, k1, v1, k2, v2, *_):
    # glibc keeps what is freed up to 32 MiB a block and twice the largest block in all, and gives the rest back to the
    # system; page faults would then cost more than the gradients. One block of five tensors stays, five do not, unless
    # they are large.
    sizes = [tensor.numel() for tensor in (q, k1, v1, k2, v2)]
    together = sum(sizes) * q.element_size() <= 32 * 2**20
    return [q.new_empty(size) for size in ([sum(sizes)] if together else sizes)]


def setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.interaction, mask1, mask2, ctx.dropout_p, seed, _ = inputs
    _, _, saved_softmax, saved_out = output
    ctx.save_for_backward(*tensors, saved_softmax, saved_out, mask1, mask2, seed)
    ctx.set_materialize_grads(False)


def backward(ctx, grad_out, grad_lse, *_):
    *tensors, mask1, mask2, seed = ctx.saved_tensors
    options = (ctx.scale, ctx.interaction, mask1, mask2, ctx.dropout_p, seed)
    memory = torch.ops.avfkernels.pair_attention_cpu_backward(grad_out, grad_lse, *tensors, *options)
    return *_gradients(memory, tensors[:5]), *[None] * 7


def formula(ctx):
    *tensors, _, _, mask1, mask2, seed = ctx.saved_tensors
    return eager.formula(tensors, ctx.scale, ctx.interaction, mask1, mask2, ctx.dropout_p, seed)


def is_faster(*, q, k1, v1, k2, v2, **_) -> bool:
    # Against `eager` on two cores (bench/test_pair_attention.py, bench/test_growth.py and a grid around their shapes).
    # Queries fill vectors of 16; below some work the call itself counts, less so where PyTorch has no fused attention
    # (dk != dv); backward has no more threads than heads.
    (B, H, F, dk), dv = q.shape, v1.shape[3]
    work = B * H * F * (k1.shape[2] + k2.shape[2]) * (dk + dv)
    if wants_gradients(q, k1, v1, k2, v2):
        return F >= 8 and B * H > 1 and work >= (2_000_000 if dk == dv else 1_000_000)
    return F >= 8 and work >= 200_000
