"""One early-fusion layer, and one layer after the other: what `avfusion`'s encoder and `accelerate` both run.

    x_fusion' = Fusion(x_fusion, x_image, x_audio)                         (Eq. 1)
    x_image'  = Visual(x_image, x_fusion),    x_audio' likewise            (Eqs. 2, 3)

Plain, the unimodal blocks read the fusion tokens as a prefix (R3) and the fusion block is a module like any other.
Fused, a modality's tokens are normalised once, x^ = (x - mean) / sqrt(var + eps), for the block and for the fusion
block, whose norms differ in affine and eps only:

    [q k v]          = x^ (W_qkv g)^T + (W_qkv b)                          g, b: affine of the block's norm
    what fusion reads = r x^ (W_f g')^T + (W_f b'),    r = sqrt((var + eps) / (var + eps')) a row

so that one matrix product gives both, with the rows of the prefix in front. In training the fold W g is part of the
graph, and gradients reach the parameters; in inference it is kept, and made anew when a parameter has changed. The
fused form is many small operations: it runs compiled, or inside somebody's torch.compile, and not otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfkernels.attentions import Tokens
from avfkernels.choice import materialises, transformed
from avfkernels.fold import Folded, folds, kept_folds
from avfkernels.modules import FusionBlock
from avfkernels.ops.attention import attention
from avfkernels.ops.common import compute_dtype, untouched
from avfkernels.ops.linear import apply_linear, is_linear, split_linear

# Rows of patch tokens below which a layer leaves a GPU idle, so that the fusion branch runs beside the others.
FEW_ROWS = 8192
# Tokens of both modalities from which factorized fusion moves its projections to the latents (R2) in a fused layer; to
# project is a few columns more of a product that is there anyway. An encoder on an H200, bf16, B = 64, as a graph: by
# projecting in a fused layer 4.5 ms with 49 + 19 tokens and 12.1 with 196 + 96; by R2 in one not fused 6.8 and 12.6.
ABSORB_FROM = 128
# A function may be compiled for many modalities, masks, dtypes and batches; past the limit would be an error. A layer
# is too small to be split for DDP's buckets.
DYNAMO = {"recompile_limit": 64, "optimize_ddp": False}


def early_fusion(
    image_blocks: Sequence[nn.Module] | nn.ModuleList, audio_blocks: Sequence[nn.Module] | nn.ModuleList,
    fusion_blocks: Sequence[nn.Module | None], x_image: Tensor, x_audio: Tensor, x_fusion: Tensor, *,
    compiled: bool = False, return_embs: bool = False,
) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor, Tensor]]]:  # fmt: skip
    """Runs the layers of an encoder.

    Args:
        image_blocks, audio_blocks: timm's ViT blocks or modules with their attributes, one a layer.
        fusion_blocks: `TokenFusion`, `DenseFusion`, `FactorizedFusion`, or None for a layer without fusion. With any
            other block a layer runs as released, fusion tokens through the unimodal blocks.
        x_image [B, n_v, D], x_audio [B, n_a, D], x_fusion [B, F, D].
        compiled: by torch.compile, once for all layers alike. Layers that `why_plain` names run as they are.

    Returns x_image, x_audio, x_fusion, and a list of the same three after every layer if `return_embs`, else empty.
    """
    embs = []
    if compiled:  # an expanded parameter would be a layout, and a compilation, of its own
        x_fusion = x_fusion.contiguous()
    limit = torch._dynamo.config.patch(**DYNAMO) if compiled else nullcontext()
    with limit:
        for blocks in zip(image_blocks, audio_blocks, fusion_blocks, strict=True):
            x_image, x_audio, x_fusion = _layer(*blocks, x_image, x_audio, x_fusion, compiled)
            if return_embs:
                embs.append((x_image, x_audio, x_fusion))
    return x_image, x_audio, x_fusion, embs


def run_block(block: nn.Module, x: Tensor, prefix: Tensor | None = None, *, compiled: bool = False) -> Tensor:
    """A ViT block over x [B, N, D]; with a prefix [B, P, D], the rows of x of the block over [prefix ; x] (R3).

    Not compiled, or where the block or a part of it has hooks, it is called as a module, so that what depends on calls
    (FSDP, checkpointing) works; a block of timm's, which takes no prefix, is so without one.
    """
    if compiled and not materialises() and not transformed() and all(map(untouched, block.modules())):
        with torch._dynamo.config.patch(**DYNAMO):
            return _compiled(_block)(block, x, prefix)
    if prefix is None:
        return block(x)
    return block(x, prefix) if getattr(block, "reads_prefix", False) else read_prefix(block, x, prefix)


def read_prefix(
    block: nn.Module, x: Tensor, prefix: Tensor | None = None, *, whole: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The rows of x [B, N, D] of a ViT block over [prefix ; x], by its parts; those of the prefix are not computed.

    Where its attention or `qkv`, which would not be called, has hooks or is no mere linear layer, they are, and
    dropped: `whole` runs the block over all rows (None: a call of the block).
    """
    by_parts = untouched(block.attn) and untouched(block.attn.qkv) and is_linear(block.attn.qkv)
    if materialises() or not by_parts or (prefix is None and not _of_timm(block.attn, "Attention")):
        return _released(whole or block, x, prefix)
    return _block(block, x, prefix)


def _released(whole: Callable[[Tensor], Tensor], x: Tensor, prefix: Tensor | None) -> Tensor:
    """The prefix goes through the block and is dropped."""
    return whole(x) if prefix is None else whole(torch.cat((prefix, x), dim=1))[:, prefix.shape[1] :]


def why_plain(image_block: nn.Module, audio_block: nn.Module, fusion_block: nn.Module) -> str | None:
    """Why a layer is not fused, or None: what it does not call, or reads the weights of, must do nothing else."""
    if not isinstance(fusion_block, FusionBlock):
        return f"the fusion block is a {type(fusion_block).__name__}"
    if fusion_block.training and fusion_block.attn.attn_drop:
        return "attn_drop drops attention weights, which the fused layer does not have"
    norm_v, norm_a = fusion_block.norms()
    for block, norm in ((image_block, norm_v), (audio_block, norm_a)):
        parts = {"the block": block, "its attention": block.attn}
        layers = {"norm1": (block.norm1, nn.LayerNorm), "qkv": (block.attn.qkv, nn.Linear),
                  "the fusion block's norm": (norm, nn.LayerNorm)}  # fmt: skip
        for name, (part, kind) in layers.items():
            if type(part).forward is not kind.forward or part.weight is None:
                return f"{name} is a {type(part).__name__} and does more, or less, than {kind.__name__}"
        if norm.bias is None or block.norm1.bias is None:
            return "a norm has no bias"
        for name, part in (parts | {name: part for name, (part, _) in layers.items()}).items():
            if not untouched(part):
                return f"{name} has hooks, or a forward of its own"
    readers = {f"the fusion block's {name}": part for name, part in fusion_block.attn.readers().items()}
    uncalled = {"the fusion block": fusion_block, "the fusion block's attention": fusion_block.attn} | readers
    for name, part in uncalled.items():
        if not untouched(part):
            return f"{name} has hooks, or a forward of its own"
        if part in fusion_block.attn.readers().values() and not is_linear(part):
            return f"{name} is a {type(part).__name__} and does more than Linear"
    return None


def _layer(image_block, audio_block, fusion_block, x_image, x_audio, x_fusion, compiled):
    if fusion_block is None:
        blocks = ((image_block, x_image), (audio_block, x_audio))
        return *(run_block(block, x, compiled=compiled) for block, x in blocks), x_fusion
    traced = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if (compiled or traced) and not materialises() and not transformed():
        blocks = image_block, audio_block, fusion_block
        if why_plain(*blocks) is None:
            if traced:
                return _fused(*blocks, x_image, x_audio, x_fusion, None)
            if torch.is_grad_enabled():
                return _compiled(_fused)(*blocks, x_image, x_audio, x_fusion, None)
            folded = kept_folds(*blocks, x_image, _absorbs(fusion_block, x_image, x_audio))
            if _beside and x_image.is_cuda and len(x_image) * (x_image.shape[1] + x_audio.shape[1]) <= FEW_ROWS:
                return _on_two_streams(*blocks, x_image, x_audio, x_fusion, folded)
            return _compiled(_fused)(*blocks, x_image, x_audio, x_fusion, folded)
    # A fusion block that is not ours is in a layer that is to be as it was. Random numbers are drawn in its order.
    read = run_block if isinstance(fusion_block, FusionBlock) else _released
    next_image, next_audio = read(image_block, x_image, x_fusion), read(audio_block, x_audio, x_fusion)
    return next_image, next_audio, fusion_block(x_fusion, x_image, x_audio)


# A unimodal block in two steps: what attention reads, and what comes of it.


def _block(block: nn.Module, x: Tensor, prefix: Tensor | None = None) -> Tensor:
    attn = block.attn
    dim = attn.proj.in_features
    x_norm = block.norm1(x)
    if prefix is None:
        q, k, v = apply_linear(attn.qkv, x_norm).split(dim, dim=-1)
    else:
        # Joining the tokens before one projection to keys and values is cheaper than joining keys and values after two:
        # one copy for two, and one matrix product of a good size for a good and a small one.
        joined = torch.cat((block.norm1(prefix), x_norm), dim=1)
        q, kv = split_linear((x_norm, joined), attn.qkv.weight, attn.qkv.bias, sizes=(dim, 2 * dim))
        k, v = kv.split(dim, dim=-1)
    return _finish(block, x, q, k, v)


def _finish(block: nn.Module, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention, its projection and the MLP of a block, with their residuals; q [B, N, D], k and v [B, P + N, D]."""
    attn, mlp = block.attn, block.mlp
    q, k, v = (y.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
    dropout_p = attn.attn_drop.p if attn.training else 0.0
    out = attention(attn.q_norm(q), attn.k_norm(k), v, attn.scale, dropout_p)
    x = _add(x, attn.proj, out.transpose(1, 2).flatten(2), (attn.proj_drop, block.ls1, block.drop_path1))
    y, then = block.norm2(x), (block.ls2, block.drop_path2)
    if torch.compiler.is_compiling() or not _of_timm(mlp, "Mlp") or list(mlp._modules) != MLP or not untouched(mlp):
        return x + _through(mlp(y), then)
    gelu = type(mlp.act) is nn.GELU and mlp.act.approximate == "none" and untouched(mlp.act)
    y = apply_linear(mlp.fc1, y, gelu=gelu)
    y = _through(y, (mlp.drop1, mlp.norm) if gelu else (mlp.act, mlp.drop1, mlp.norm))
    return _add(x, mlp.fc2, y, (mlp.drop2, *then))


MLP = ["fc1", "act", "drop1", "norm", "fc2", "drop2"]  # of timm's, in the order in which they run


def _of_timm(module: nn.Module, name: str) -> bool:
    """Whether a module does what timm's of this name does, which is known."""
    forward = type(module).forward
    return forward.__module__.startswith("timm.") and forward.__qualname__ == f"{name}.forward"


def _add(x: Tensor, layer: nn.Module, y: Tensor, then: tuple[nn.Module, ...]) -> Tensor:
    """x + then(layer(y)), in one pass where what is behind the layer does nothing."""
    if not torch.compiler.is_compiling() and all(map(_idle, then)):
        return apply_linear(layer, y, add=x)
    return x + _through(apply_linear(layer, y), then)


def _idle(module: nn.Module) -> bool:
    drops = type(module) is nn.Dropout or type(module).__name__ == "DropPath"
    return untouched(module) and (type(module) is nn.Identity or (drops and not module.training))


def _through(x: Tensor, modules: tuple[nn.Module, ...]) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _read(block, norm, folded: Folded, x: Tensor, x_fusion: Tensor):
    """q [B, N, D], k, v [B, P + N, D] of a block over [x_fusion ; x], and what the fusion block reads of x."""
    dim, prefix, eps = x.shape[-1], x_fusion.shape[1], block.norm1.eps
    joined = torch.cat((x_fusion, x), dim=1)
    x_hat = F.layer_norm(joined, (dim,), None, None, eps)
    factor = None
    if norm.eps != eps:
        var = x.to(compute_dtype(x.dtype)).var(-1, correction=0, keepdim=True)
        factor = ((var + eps) / (var + norm.eps)).sqrt()
    if folded.agg_weight is not None:
        q, k, v = F.linear(x_hat, folded.weight, folded.bias).split(dim, dim=-1)
        return q[:, prefix:], k, v, Tokens(x_hat[:, prefix:], folded.agg_weight, folded.agg_bias, factor)
    if factor is None:
        y = F.linear(x_hat, folded.weight, folded.bias)
        fusion = y[:, prefix:, 3 * dim :]
    else:  # the factor is for the product, and not for the constant
        bias, constant = folded.bias.split((3 * dim, len(folded.bias) - 3 * dim))
        y = F.linear(x_hat, folded.weight, F.pad(bias, (0, len(constant))))
        fusion = (y[:, prefix:, 3 * dim :] * factor + constant).to(y.dtype)
    q, k, v, _ = y.split((dim, dim, dim, y.shape[-1] - 3 * dim), dim=-1)
    return q[:, prefix:], k, v, fusion


def _absorbs(fusion_block, x_image: Tensor, x_audio: Tensor) -> bool:
    return fusion_block.attn.absorbs and x_image.shape[1] + x_audio.shape[1] >= ABSORB_FROM


def _fused(image_block, audio_block, fusion_block, x_image, x_audio, x_fusion, folded):
    blocks = image_block, audio_block, fusion_block
    folded_v, folded_a = folded or folds(*blocks, _absorbs(fusion_block, x_image, x_audio))
    norm_v, norm_a = fusion_block.norms()
    *qkv_v, read_v = _read(image_block, norm_v, folded_v, x_image, x_fusion)
    *qkv_a, read_a = _read(audio_block, norm_a, folded_a, x_audio, x_fusion)
    next_image, next_audio = _finish(image_block, x_image, *qkv_v), _finish(audio_block, x_audio, *qkv_a)
    return next_image, next_audio, fusion_block.update(x_fusion, read_v, read_a)


def _update(fusion_block, x_fusion, read_v, read_a):
    return fusion_block.update(x_fusion, read_v, read_a)


@cache
def _compiled(function):
    # When it is needed: this loads dynamo and Triton. By shape: a CUDA graph has one, and what depends on a size is
    # settled when it compiles.
    return torch.compile(function, fullgraph=True, dynamic=False)


def _on_two_streams(image_block, audio_block, fusion_block, x_image, x_audio, x_fusion, folded):
    """The layer with its fusion branch beside the unimodal ones, while a CUDA graph is recorded."""
    main, side = torch.cuda.current_stream(), _side_stream(x_image.device)
    norm_v, norm_a = fusion_block.norms()
    *qkv_v, read_v = _compiled(_read)(image_block, norm_v, folded[0], x_image, x_fusion)
    *qkv_a, read_a = _compiled(_read)(audio_block, norm_a, folded[1], x_audio, x_fusion)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        next_fusion = _compiled(_update)(fusion_block, x_fusion, read_v, read_a)
    next_image = _compiled(_finish)(image_block, x_image, *qkv_v)
    next_audio = _compiled(_finish)(audio_block, x_audio, *qkv_a)
    main.wait_stream(side)  # before anything that both have read is freed
    return next_image, next_audio, next_fusion


_beside = False


@contextmanager
def beside() -> Iterator[None]:
    """While a graph is made: layers of few tokens run their fusion branch on a stream of its own."""
    global _beside
    previous, _beside = _beside, True
    try:
        yield
    finally:
        _beside = previous


@cache
def _side_stream(device: torch.device):
    return torch.cuda.Stream(device)
