"""`accelerate`: a model made of the authors' classes, computed by the rewrites R1 to R3.

Nothing of theirs is imported: an encoder is recognised by its attributes.
"""

from __future__ import annotations

import inspect
from functools import partial

import torch
from torch import nn

from avfkernels import capture
from avfkernels.attentions import Attention
from avfkernels.capture import Captured
from avfkernels.layer import early_fusion
from avfkernels.modules import DenseFusion, FactorizedFusion, FusionBlock, TokenFusion

ARGUMENTS = ("image", "audio", "image_ids_keep", "audio_ids_keep", "return_embs")  # of the encoder's forward
ENCODER = ("image", "audio", "fusion_tokens", "fusion_blocks", "fusion_norm")
VIT = ("patch_embed", "pos_embed", "blocks", "norm", "prepare_patch_tokens")
VIT_BLOCK = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")  # of timm, as is its attention
VIT_ATTENTION = ("num_heads", "scale", "qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop")
FUSION_BLOCK = ("norm1_mm", "norm1_aud", "norm1_img", "attn", "drop_path", "norm2", "mlp")
FUSION_ATTENTION = ("num_heads", "scale", "q", "attn_drop", "proj", "proj_drop")


def accelerate(model: nn.Module, *, compile: bool = True) -> Restore:
    """Makes a DeepAVFusion model of the authors' release fast, in place and exactly; returns what undoes it.

        restore = avfkernels.accelerate(model)

    The model is their encoder or holds it (their masked auto-encoder, a classifier, ...). Its fusion blocks give way to
    `TokenFusion`, `DenseFusion` or `FactorizedFusion` (R1, R2), built around the very same linear layers, norms and
    MLPs, and the encoder's `forward` to one in which the unimodal blocks read the fusion tokens and do not update them
    (R3). Parameters, their order and state-dict keys stay: optimizers and checkpoints keep working. Outputs and
    gradients are those of before up to rounding. With dropout they are so in distribution: it is drawn for fewer rows.

    On a GPU the layers are compiled, and recorded as CUDA graphs in inference, once 200 clips of a shape have been seen
    (`Captured`; half a minute or less, once). Until then, and with `compile=False`, only dense interactions are
    rewritten there: the other two are bound by launches, of which the rewrites have more. `restore.report` says, for
    each layer, what runs.

    In layers with fusion, the unimodal blocks and their attention, the fusion blocks and theirs, and the projections
    whose parts are applied apart (`qkv`, and `kv`, `k`, `v` of interactions) are not called as modules any more. So
    their projections have to be linear layers as they come from torch, and none of them may have hooks: accelerate
    before whatever adds hooks to other modules (FSDP), and look at tokens with `return_embs`.

    Raises:
        ValueError: the model holds no such encoder, is compiled, or is not built as expected; says which attribute of
            which module is missing, or which module would not be called. Nothing has been changed then.

    Source: Mo & Morgado, CVPR 2024, https://arxiv.org/abs/2312.01017; code: https://github.com/stoneMo/DeepAVFusion.
    """
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise ValueError(f"accelerate: {name or 'the model'} is compiled: accelerate it first, and compile what "
                             "that leaves (a model that torch.compile has wrapped is its _orig_mod)")  # fmt: skip
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
    return Restore(encoders, exchanged, compile)


class Restore:
    """Undoes `accelerate` when called; calling it again does nothing. `report`: layer -> what runs there, and why."""

    def __init__(self, encoders: dict[str, nn.Module], exchanged: list, compile: bool):
        self.done = False
        self.encoders, self.exchanged, self.captured = encoders, exchanged, {}
        for name, encoder in encoders.items():
            theirs = {i: block for blocks, i, block, _ in exchanged if blocks is encoder.fusion_blocks}
            self.captured[name] = Captured() if compile else None
            # No method, which could not be unpickled.
            encoder.forward = partial(_forward, encoder, theirs, self.captured[name])

    def __call__(self) -> None:
        if self.done:
            return
        self.done = True
        for blocks, i, theirs, ours in self.exchanged:
            blocks[i] = theirs.train(ours.training)
        for encoder in self.encoders.values():
            del encoder.forward

    @property
    def report(self) -> dict[str, str]:
        found = {}
        for name, encoder in self.encoders.items():
            captured = self.captured[name]
            why = "compile=False" if captured is None else captured.failure
            for i, block in enumerate(encoder.fusion_blocks):
                path = f"{name}.fusion_blocks.{i}".lstrip(".")
                if block is None:
                    found[path] = "no fusion in this layer: as released"
                    continue
                rewrites = "R1, R2, R3" if isinstance(block, FactorizedFusion) else "R1, R3"
                rewrites = "R3" if isinstance(block, TokenFusion) else rewrites
                found[path] = f"{type(block).__name__}: {rewrites}"
                if not isinstance(block, DenseFusion):
                    alone = "before 200 clips of a shape" if why is None else f"uncompiled ({why})"
                    found[path] += f"; on a GPU, {alone}, left alone as released, which has fewer launches"
        return found


def _forward(self, theirs, captured, image, audio, image_ids_keep=None, audio_ids_keep=None, return_embs=False):
    """The authors' encoder: image, audio and fusion tokens after their norms (, and a list of them for every layer)."""
    inputs = [x for x in (image, audio, image_ids_keep, audio_ids_keep) if x is not None]
    run = partial(_layers, self, theirs)
    if captured is None or return_embs or len(inputs) == 3:
        return run(image, audio, image_ids_keep, audio_ids_keep, return_embs=return_embs)
    return captured(self, run, *inputs)


def _layers(self, theirs, image, audio, image_ids_keep=None, audio_ids_keep=None, *, compiled=False, return_embs=False):
    x_image = self.image.prepare_patch_tokens(image, image_ids_keep)
    x_audio = self.audio.prepare_patch_tokens(audio, audio_ids_keep)
    x_fusion = self.fusion_tokens.expand(image.shape[0], -1, -1)
    depth = min(map(len, (self.image.blocks, self.audio.blocks, self.fusion_blocks)))
    blocks = [list(blocks)[:depth] for blocks in (self.image.blocks, self.audio.blocks, self.fusion_blocks)]
    dense = any(isinstance(block, DenseFusion) for block in blocks[2])
    if not (compiled or dense or torch.compiler.is_compiling()) and capture.pays(x_image.device):
        blocks[2] = [theirs[i].train(block.training) if block else None for i, block in enumerate(blocks[2])]
    x_image, x_audio, x_fusion, embs = early_fusion(
        *blocks, x_image, x_audio, x_fusion, compiled=compiled, return_embs=return_embs
    )
    out = self.image.norm(x_image), self.audio.norm(x_audio), self.fusion_norm(x_fusion)
    return (*out, embs) if return_embs else out


def _fusion_blocks(name: str, encoder: nn.Module) -> list[tuple[int, nn.Module, FusionBlock]]:
    """Layer, their block and ours, for an encoder that is built as expected."""
    if "forward" in vars(encoder):
        raise ValueError(f"accelerate: {name}.forward has been replaced already; restore it first")
    found = tuple(inspect.signature(encoder.forward).parameters)
    if found != ARGUMENTS:
        raise ValueError(f"accelerate: {name}.forward takes {', '.join(found)}; expected {', '.join(ARGUMENTS)}")
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
    if isinstance(ours, Attention):
        ours.scale = theirs.scale
    for name, child in list(ours.named_children()):
        if isinstance(child, Attention):
            _adopt(child, getattr(theirs, name))
        else:
            setattr(ours, name, getattr(theirs, name))


def _missing(module: nn.Module, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if not hasattr(module, name)]


def _require(name: str, module: nn.Module, attributes: tuple[str, ...]) -> None:
    if missing := _missing(module, attributes):
        raise ValueError(f"accelerate: {name} ({type(module).__name__}) has no {', '.join(missing)}")
