"""`accelerate`: a model made of the authors' classes, computed by the rewrites R1 to R3.

Nothing of theirs is imported: an encoder is recognised by its attributes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfkernels.modules import DenseFusion, FactorizedFusion, FusionBlock, TokenFusion, _Attention
from avfkernels.ops.linear import split_linear

ENCODER = ("image", "audio", "fusion_tokens", "fusion_blocks", "fusion_norm")
VIT = ("patch_embed", "pos_embed", "blocks", "norm", "prepare_patch_tokens")
VIT_BLOCK = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")  # of timm, as is its attention
VIT_ATTENTION = ("num_heads", "scale", "qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop")
FUSION_BLOCK = ("norm1_mm", "norm1_aud", "norm1_img", "attn", "drop_path", "norm2", "mlp")
FUSION_ATTENTION = ("num_heads", "scale", "q", "attn_drop", "proj", "proj_drop")


def accelerate(model: nn.Module) -> Callable[[], None]:
    """Makes a DeepAVFusion model of the authors' release fast, in place and exactly; returns what undoes it.

        restore = avfkernels.accelerate(model)

    The model is their encoder or holds it (their masked auto-encoder, a classifier, ...). Its fusion blocks give way to
    `TokenFusion`, `DenseFusion` or `FactorizedFusion` (R1, R2), built around the very same linear layers, norms and
    MLPs, and the encoder's `forward` to one in which the unimodal blocks read the fusion tokens and do not update them
    (R3). Parameters, their order and state-dict keys stay: optimizers and checkpoints keep working. Outputs and
    gradients are those of before up to rounding. With dropout they are so in distribution: it is drawn for fewer rows.

    In layers with fusion, the unimodal blocks and their attention, the fusion blocks and theirs, and the projections
    whose parts are applied apart (`qkv`, and `kv`, `k`, `v` of interactions) are not called as modules any more. So
    their projections have to be linear layers as they come from torch, and none of them may have hooks: accelerate
    before whatever adds hooks to other modules (FSDP), and look at tokens with `return_embs`.

    Raises:
        ValueError: the model holds no such encoder, or it is not built as expected; says which attribute of which
            module is missing, or which module would not be called. Nothing has been changed then.

    Source: Mo & Morgado, CVPR 2024, https://arxiv.org/abs/2312.01017; code: https://github.com/stoneMo/DeepAVFusion.
    """
    encoders = {name: module for name, module in model.named_modules() if not _missing(module, ENCODER)}
    if not encoders:
        closest = min(model.modules(), key=lambda module: len(_missing(module, ENCODER)))
        raise ValueError(
            f"accelerate: {type(model).__name__} holds no encoder of DeepAVFusion: the module that comes closest, "
            f"{type(closest).__name__}, has no {', '.join(_missing(closest, ENCODER))}"
        )
    exchanged = [
        (encoder.fusion_blocks, i, theirs, ours)
        for name, encoder in encoders.items()
        for i, theirs, ours in _fusion_blocks(name or "model", encoder)
    ]
    for blocks, i, _, ours in exchanged:
        blocks[i] = ours
    for encoder in encoders.values():
        encoder.forward = partial(_forward, encoder)  # and no method, which could not be unpickled

    def restore() -> None:
        for blocks, i, theirs, ours in exchanged:
            blocks[i] = theirs.train(ours.training)
        for encoder in encoders.values():
            del encoder.forward

    return restore


def _forward(self, image, audio, image_ids_keep=None, audio_ids_keep=None, return_embs=False):
    """The authors' encoder: image, audio and fusion tokens after their norms (, and a list of them for every layer)."""
    x_image = self.image.prepare_patch_tokens(image, image_ids_keep)
    x_audio = self.audio.prepare_patch_tokens(audio, audio_ids_keep)
    x_fusion = self.fusion_tokens.expand(image.shape[0], -1, -1)
    embs = []
    for image_block, audio_block, fusion_block in zip(
        self.image.blocks, self.audio.blocks, self.fusion_blocks, strict=False
    ):
        if fusion_block is None:
            x_image, x_audio = image_block(x_image), audio_block(x_audio)
        else:
            x_image, x_audio, x_fusion = (  # in the order in which the authors draw random numbers
                _read_prefix(image_block, x_image, x_fusion),
                _read_prefix(audio_block, x_audio, x_fusion),
                fusion_block(x_fusion, x_image, x_audio),
            )
        if return_embs:
            embs.append((x_image, x_audio, x_fusion))
    out = self.image.norm(x_image), self.audio.norm(x_audio), self.fusion_norm(x_fusion)
    return (*out, embs) if return_embs else out


def _read_prefix(block: nn.Module, x: Tensor, prefix: Tensor) -> Tensor:
    """The rows of x of a timm block over [prefix ; x]; those of the prefix are not computed."""
    x = x + block.drop_path1(block.ls1(_attend(block.attn, block.norm1(x), block.norm1(prefix))))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _attend(attn: nn.Module, x: Tensor, prefix: Tensor) -> Tensor:
    """timm's self-attention with queries from x, keys and values from [prefix ; x]."""
    width = attn.proj.in_features
    joined = torch.cat((prefix, x), dim=1)
    q, kv = split_linear((x, joined), attn.qkv.weight, attn.qkv.bias, sizes=(width, 2 * width))
    q = q.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
    k, v = kv.unflatten(2, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    dropout_p = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v, dropout_p=dropout_p, scale=attn.scale)
    return attn.proj_drop(attn.proj(out.transpose(1, 2).flatten(2)))


def _fusion_blocks(name: str, encoder: nn.Module) -> list[tuple[int, nn.Module, FusionBlock]]:
    """Layer, their block and ours, for an encoder that is built as expected."""
    if "forward" in vars(encoder):
        raise ValueError(f"accelerate: {name}.forward has been replaced already; restore it first")
    expected, found = (list(inspect.signature(f).parameters) for f in (MethodType(_forward, encoder), encoder.forward))
    if found != expected:
        raise ValueError(f"accelerate: {name}.forward takes {', '.join(found)}; expected {', '.join(expected)}")
    for branch in ("image", "audio"):
        vit = getattr(encoder, branch)
        _require(f"{name}.{branch}", vit, VIT)
        for i, (block, fusion_block) in enumerate(zip(vit.blocks, encoder.fusion_blocks, strict=False)):
            path = f"{name}.{branch}.blocks.{i}"
            _require(path, block, VIT_BLOCK)
            _require(f"{path}.attn", block.attn, VIT_ATTENTION)
            if fusion_block is not None:
                _check_uncalled(path, block)
                _check_uncalled(f"{path}.attn", block.attn, ("qkv",))
                if not isinstance(getattr(block.attn, "norm", None), nn.Identity | None):
                    raise ValueError(
                        f"accelerate: {path}.attn.norm, between attention and projection, is not supported"
                    )
                if getattr(block.attn, "gate", None) is not None:
                    raise ValueError(f"accelerate: {path}.attn.gate is not supported")
    return [
        (i, block, _replacement(f"{name}.fusion_blocks.{i}", block))
        for i, block in enumerate(encoder.fusion_blocks)
        if block is not None
    ]


def _replacement(name: str, theirs: nn.Module) -> FusionBlock:
    """Our fusion block for theirs, around the same layers."""
    _require(name, theirs, FUSION_BLOCK)
    attn = theirs.attn
    _require(f"{name}.attn", attn, FUSION_ATTENTION)
    _require(f"{name}.mlp", theirs.mlp, ("fc1",))
    dim, options = attn.q.in_features, {}
    if hasattr(attn, "fusion_tkns"):
        kind, options = FactorizedFusion, {"fusion_tkns": attn.fusion_tkns}
    else:
        _require(f"{name}.attn", attn, ("kv",))
        kind = DenseFusion if attn.kv.in_features == 2 * dim else TokenFusion
    # Half a feature more, so that int(dim * ratio) is the width whatever the ratio is rounded to.
    ratios = ((width + 0.5) / dim for width in (attn.q.out_features, theirs.mlp.fc1.out_features))
    ours = kind(
        dim, attn.num_heads, *ratios, qkv_bias=attn.q.bias is not None, **options, attn_drop=attn.attn_drop.p,
        drop_path=getattr(theirs.drop_path, "drop_prob", 0.0), device="meta",
    )  # fmt: skip
    shapes, wanted = ({key: list(x.shape) for key, x in block.state_dict().items()} for block in (theirs, ours))
    if shapes != wanted:
        key = next(key for key in shapes | wanted if shapes.get(key) != wanted.get(key))
        raise ValueError(
            f"accelerate: {name} is not the {kind.__name__} it looks like: {key} has the shape "
            f"{shapes.get(key, 'of nothing, it is missing')}, expected {wanted.get(key, 'no such parameter')}"
        )
    _check_uncalled(name, theirs)
    _check_uncalled(f"{name}.attn", attn, () if kind is TokenFusion else ("kv", "k", "v"))
    for part in ("attn_v", "attn_a"):
        if hasattr(attn, part):
            _check_uncalled(f"{name}.attn.{part}", getattr(attn, part), ("kv",))
    _adopt(ours, theirs)
    return ours


def _check_uncalled(name: str, module: nn.Module, linear: tuple[str, ...] = ()) -> None:
    """Nothing may depend on calls of a module that will not be called, nor of its `linear` layers, which are read."""
    for path, part in [(name, module), *((f"{name}.{n}", getattr(module, n)) for n in linear if hasattr(module, n))]:
        if any(getattr(part, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")):
            raise ValueError(f"accelerate: {path} has hooks, and would not be called any more: remove them first")
        if part is not module and (type(part).forward is not nn.Linear.forward or "forward" in vars(part)):
            raise ValueError(f"accelerate: {path} is a {type(part).__name__} that does more than torch.nn.Linear; its "
                             "weight alone would be read")  # fmt: skip


def _adopt(ours: nn.Module, theirs: nn.Module) -> None:
    """Puts their layers in the place of ours; only the attention around them remains."""
    ours.training = theirs.training
    if isinstance(ours, _Attention):
        ours.scale = theirs.scale
    for name, child in list(ours.named_children()):
        if isinstance(child, _Attention):
            _adopt(child, getattr(theirs, name))
        else:
            setattr(ours, name, getattr(theirs, name))


def _missing(module: nn.Module, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if not hasattr(module, name)]


def _require(name: str, module: nn.Module, attributes: tuple[str, ...]) -> None:
    if missing := _missing(module, attributes):
        raise ValueError(f"accelerate: {name} ({type(module).__name__}) has no {', '.join(missing)}")
