"""Pair attention in CUDA C++ (csrc/pair_*.cu): 16 queries are one tensor-core fragment, softmax in registers."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from avfkernels import _native
from avfkernels.pair_attention import eager

SCHEMA = (
    "pair_attention_cuda(Tensor q, Tensor k1, Tensor v1, Tensor k2, Tensor v2, float scale, str interaction, "
    "Tensor? mask1, Tensor? mask2, bool return_lse, bool save) -> (Tensor out, Tensor lse, Tensor saved_softmax)"
)
BACKWARD_SCHEMA = (
    "pair_attention_cuda_backward(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k1, Tensor v1, Tensor k2, "
    "Tensor v2, Tensor saved_softmax, float scale, str interaction, Tensor? mask1, Tensor? mask2) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
DTYPES = {torch.bfloat16: 0, torch.float16: 1}  # AvfCudaDtype of csrc/avf_cuda.h
INTERACTIONS = {"sum": 0, "product": 1}  # AvfCudaInteraction
SOFTMAXES = {"sum": 2, "product": 1}  # one a side, or one over all pairs
WIDTHS = (16, 32, 64)
MAX_TOKENS = 2**30
MAX_WARPS = 8  # AVF_CUDA_MAX_WARPS

# AvfCudaPairAttention of csrc/avf_cuda.h: 12 tensors of 4 words, 7 pointers and 7 sizes; stream; scale; two enums.
_ARGUMENTS = struct.Struct("62q Q f 2i 4x")


def forward(q, k1, v1, k2, v2, *, scale, interaction, mask1, mask2, dropout_p, seed, return_lse):
    """See `avfkernels.pair_attention`."""
    save = _wants_gradients(q, k1, v1, k2, v2)
    return torch.ops.avfkernels.pair_attention_cuda(
        q, k1, v1, k2, v2, scale, interaction, mask1, mask2, return_lse, save
    )[:2]


def _wants_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def why_not(*, q, k1, v1, k2, v2, dropout_p, **_) -> str | None:
    if q.device.type != "cuda":
        return f"the tensors are on {q.device.type}, not on a CUDA device"
    if q.dtype not in DTYPES:
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if dropout_p > 0.0:
        return "it has no dropout"
    if q.shape[-1] not in WIDTHS or v1.shape[-1] not in WIDTHS:
        return f"it takes widths of 16, 32 and 64, not {q.shape[-1]} and {v1.shape[-1]}"
    for name, tensor in (("q", q), ("k1", k1), ("v1", v1), ("k2", k2), ("v2", v2)):
        if tensor.shape[2] > MAX_TOKENS:
            return f"{name} has more than 2^30 tokens"
        if tensor.stride(-1) != 1:
            return f"{name} has a last stride of {tensor.stride(-1)}, not 1"
        if not _aligned(tensor):
            return f"the rows of {name} (strides {tuple(tensor.stride())}) do not begin at multiples of 16 bytes"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    return _native.why_cuda_unavailable()


def _aligned(tensor: Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes, as far as a fake tensor tells; the library looks at the address."""
    strides = (stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1)
    return all(stride % 8 == 0 for stride in strides) and tensor.storage_offset() % 8 == 0


def _like(tensor: Tensor, width: int) -> Tensor:
    """Memory for [B, H, N, width], heads next to each other: a caller's transpose(1, 2).flatten(2) is a view."""
    B, H, N, _ = tensor.shape
    return tensor.new_empty(B, N, H, width).transpose(1, 2)


def _outputs(q: Tensor, v1: Tensor, interaction: str, return_lse: bool, save: bool) -> tuple[Tensor, ...]:
    B, H, F, _ = q.shape
    lse = q.new_empty((B, H, F) if return_lse else 0, dtype=torch.float32)
    saved_softmax = q.new_empty((SOFTMAXES[interaction], 2, B, H, F) if save else 0, dtype=torch.float32)
    return _like(q, v1.shape[3]), lse, saved_softmax


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _strided(tensor: Tensor | None) -> tuple[int, ...]:
    """AvfCudaTensor: the address and the strides of batch, head and token."""
    return (0, 0, 0, 0) if tensor is None else (tensor.data_ptr(), *tensor.stride()[:3])


def _call(
    function: str, q, k1, v1, k2, v2, scale, interaction, mask1, mask2, saved_softmax,
    out=None, lse=None, grad_out=None, grad_lse=None, delta=None, grad_q_parts=None, grads=(None,) * 5,
):  # fmt: skip
    grad_q, grad_k1, grad_v1, grad_k2, grad_v2 = grads
    with _on(q.device) as stream:
        arguments = _ARGUMENTS.pack(
            *_strided(q), *_strided(k1), *_strided(k2), *_strided(v1), *_strided(v2), _pointer(mask1), _pointer(mask2),
            *_strided(out), _pointer(lse), _pointer(saved_softmax), *_strided(grad_out), _pointer(grad_lse),
            _pointer(delta), _pointer(grad_q_parts), *_strided(grad_q), *_strided(grad_k1), *_strided(grad_k2),
            *_strided(grad_v1), *_strided(grad_v2), *q.shape[:3], k1.shape[2], k2.shape[2], q.shape[3], v1.shape[3],
            stream, scale, DTYPES[q.dtype], INTERACTIONS[interaction],
        )  # fmt: skip
        _native.check_cuda(getattr(_native.cuda_library(), function)(arguments), function)


class _on:
    """Makes a device the current one; gives the address of torch's current stream there."""

    def __init__(self, device: torch.device):
        self.device, self.guard = device, torch.cuda.device(device)

    def __enter__(self) -> int:
        self.guard.__enter__()
        return torch.cuda.current_stream(self.device).cuda_stream

    def __exit__(self, *error) -> None:
        self.guard.__exit__(*error)


def kernel(q, k1, v1, k2, v2, scale, interaction, mask1, mask2, return_lse, save):
    out, lse, saved_softmax = _outputs(q, v1, interaction, return_lse, save)
    mask1, mask2 = (None if mask is None else mask.contiguous() for mask in (mask1, mask2))
    _call(
        "avf_cuda_pair_attention_forward", q, k1, v1, k2, v2, scale, interaction, mask1, mask2,
        saved_softmax if save else None, out, lse if return_lse else None,
    )  # fmt: skip
    return out, lse, saved_softmax


def fake(q, k1, v1, k2, v2, scale, interaction, mask1, mask2, return_lse, save):
    return _outputs(q, v1, interaction, return_lse, save)


def backward_kernel(grad_out, grad_lse, q, k1, v1, k2, v2, saved_softmax, scale, interaction, mask1, mask2):
    grads = backward_fake(grad_out, grad_lse, q, k1, v1, k2, v2)
    if grad_out is None:
        grad_out = q.new_zeros(1, 1, 1, v1.shape[3]).expand(*q.shape[:3], -1)
    elif grad_out.stride(-1) != 1 or not _aligned(grad_out):
        grad_out = grad_out.clone(memory_format=torch.contiguous_format)
    mask1, mask2, grad_lse = (None if t is None else t.contiguous() for t in (mask1, mask2, grad_lse))
    delta = q.new_empty((SOFTMAXES[interaction], *q.shape[:3]), dtype=torch.float32)
    parts = -(-k1.shape[2] // MAX_WARPS) if interaction == "product" else 0
    grad_q_parts = q.new_empty((parts, *q.shape), dtype=torch.float32)
    _call(
        "avf_cuda_pair_attention_backward", q, k1, v1, k2, v2, scale, interaction, mask1, mask2, saved_softmax,
        grad_out=grad_out, grad_lse=grad_lse, delta=delta, grad_q_parts=grad_q_parts, grads=grads,
    )  # fmt: skip
    return grads


def backward_fake(grad_out, grad_lse, q, k1, v1, k2, v2, *_):
    return tuple(_like(tensor, tensor.shape[3]) for tensor in (q, k1, v1, k2, v2))


def setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.interaction, mask1, mask2, _, _ = inputs
    ctx.save_for_backward(*tensors, output[2], mask1, mask2)
    ctx.set_materialize_grads(False)


def backward(ctx, grad_out, grad_lse, *_):
    *tensors, mask1, mask2 = ctx.saved_tensors
    grads = torch.ops.avfkernels.pair_attention_cuda_backward(
        grad_out, grad_lse, *tensors, ctx.scale, ctx.interaction, mask1, mask2
    )
    return *grads, *[None] * 6


def formula(ctx):
    *tensors, _, mask1, mask2 = ctx.saved_tensors
    return eager.formula(tensors, ctx.scale, ctx.interaction, mask1, mask2)


def is_faster(**_) -> bool:
    return False  # on an H200 the kernel is faster, but its call costs the host more (bench/results/nvidia-h200-gpu.md)
