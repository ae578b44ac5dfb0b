"""Weights in and out: the authors' checkpoints, safetensors, unimodal MAE. All or nothing: no key is lost in silence.

Files are read with safetensors or `torch.load(weights_only=True)`, never as plain pickle.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn

from avfusion.common import why
from avfusion.files import save_tensors, writing
from avfusion.models.deepavfusion import DeepAVFusion, EncoderConfig, ViT

# What the authors' pre-training checkpoint holds beside the encoder.
_DECODERS = ("image_decoder_", "audio_decoder_")
# What a unimodal MAE file holds beside the encoder. Its positions are the same fixed sin-cos, for a grid of its own.
_MAE_ONLY = ("decoder_", "mask_token", "cls_token", "pos_embed")


# In the package, by name: each with a card beside it.
PACKAGED = {path.stem: path for path in (Path(__file__).parent / "weights").glob("*.safetensors")}
POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has left in the place of another
# What neither keys nor shapes of an encoder tell.
UNTOLD = ("num_heads", "fusion_num_heads", "fusion_tokens", "image_agg_tokens", "audio_agg_tokens")


class CheckpointError(ValueError):
    """A file that is not the checkpoint it is taken for; the message names the file, the keys and the remedy."""


def load_encoder(path: str | os.PathLike, config: EncoderConfig | None = None, **known) -> DeepAVFusion:
    """A `DeepAVFusion` with the weights of a checkpoint, on the CPU, in eval mode.

    Args:
        path: a safetensors file (`save_encoder`), a folder (`DeepAVFusion.save_pretrained`), hf://org/name, the name
            "synth-small" (in the package, small, trained on synthetic clips alone), or the authors' checkpoint: a torch
            file with `state_dict`, whose encoder keys may carry the prefix `encoder.`. Its decoders are left out; any
            other key that is not the encoder's is named in a warning.
        config: the encoder's shape. By default it comes from the file: from what it says itself (safetensors, and
            `avfusion export --format authors`), or from its keys and shapes, for square images and 128 mel bands.
        known: what keys and shapes do not tell, by names of `EncoderConfig`: num_heads, fusion_num_heads, and, if
            factorized, fusion_tokens, image_agg_tokens, audio_agg_tokens. Not given, heads of a ViT are 64 wide,
            fusion blocks have the release's 12 heads, and its 8 + 8 tokens aggregate. At the released width, 768, and
            with its 32 tokens that is certain; elsewhere a warning names what is assumed.

    Raises:
        CheckpointError: no such file, not a checkpoint, keys that are missing, extra or misshapen (all are listed), or
            something is `known` otherwise than the file tells it.
        TypeError: something else is `known`, or a config is given too.
    """
    if known.keys() - set(UNTOLD):
        raise TypeError(f"load_encoder: {', '.join(known.keys() - set(UNTOLD))}: expected some of {', '.join(UNTOLD)}")
    if config is not None and known:
        raise TypeError(f"load_encoder: {', '.join(known)}: config tells it already")
    if str(path).startswith("hf://"):
        path = _fetched(str(path))
    path = PACKAGED[str(path)] if str(path) in PACKAGED and not Path(path).exists() else Path(path)
    state, metadata = _read_folder(path) if path.is_dir() else _read(path)
    if any(key.startswith("encoder.") for key in state):
        rest = [key for key in state if not key.startswith(("encoder.", *_DECODERS))]
        if rest:
            warnings.warn(f"{path}: left out, as not the encoder's: {', '.join(rest)}", stacklevel=2)
        state = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    if config is None:
        try:
            if "config" in metadata:
                config = EncoderConfig(**json.loads(metadata["config"]))
            else:
                config = _infer_config(state, known, path)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: its keys do not tell the encoder's shape; pass config=: {error}") from error
        told = asdict(config) | {"fusion_num_heads": config.heads_of_fusion}
        if wrong := [f"{name}={told[name]}, not {value}" for name, value in known.items() if told[name] != value]:
            raise CheckpointError(f"{path}: the file itself tells {', '.join(wrong)}")
    model = DeepAVFusion(config)
    _load_strictly(model, state, path)
    return model.eval()


def save_encoder(model: DeepAVFusion, path: str | Path) -> None:
    """Writes weights and config to a safetensors file for `load_encoder`. The file appears whole or not at all."""
    with writing(path) as part:
        save_tensors(part, model.state_dict(), {"config": json.dumps(asdict(model.config))})


def load_unimodal(vit: ViT, source: str | Path) -> None:
    """Loads MAE weights into one unimodal branch (`model.image` or `model.audio`), in place.

    Args:
        vit: the branch.
        source: a local file in the key layout of MAE or AudioMAE (`model` or `state_dict` inside, or safetensors), or
            the name of a timm model, such as "vit_base_patch16_224.mae", which timm fetches. The class token, the mask
            token, the positions and the decoder are left out, as in the release.

    Raises:
        CheckpointError: neither a file nor a timm model, no network, or keys that do not fit (all are listed).
    """
    if Path(source).exists():
        state, _ = _read(Path(source))
    elif str(source) in timm.list_models(pretrained=True):
        try:
            state = timm.create_model(str(source), pretrained=True, num_classes=0).state_dict()
        except Exception as error:  # whatever the hub client raises
            raise CheckpointError(
                f"{source}: timm cannot fetch it ({type(error).__name__}: {error}); pass a local file instead"
            ) from error
    else:
        raise CheckpointError(f"{source}: neither a file nor one of timm.list_models(pretrained=True)")
    state = {key: value for key, value in state.items() if not key.startswith(_MAE_ONLY)}
    _load_strictly(vit, state | {"pos_embed": vit.get_buffer("pos_embed")}, source)


def _fetched(address: str) -> Path:
    """The folder of a model on the Hub, hf://org/name or hf://org/name@revision; what is at hand is not fetched."""
    name, _, revision = address.removeprefix("hf://").partition("@")
    try:
        return Path(huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=["config.json", "model.safetensors"]
        ))  # fmt: skip
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{address}: cannot be fetched ({type(error).__name__}: {reason})") from error


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `DeepAVFusion.save_pretrained` wrote: the tensors, and the config."""
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(
            f"{folder}: a folder without model.safetensors; give a file, or what save_pretrained wrote"
        )
    state, _ = _read(folder / "model.safetensors")
    try:
        return state, {"config": (folder / "config.json").read_text(encoding="utf-8")}
    except OSError as error:
        raise CheckpointError(f"{folder}: no config.json beside model.safetensors ({error})") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, out of whatever they are wrapped in, and the file's metadata."""
    if not path.is_file():
        named = "" if path.suffix else f", and none of the encoders in the package: {', '.join(PACKAGED)}"
        raise CheckpointError(f"{path}: no such file{named}")
    with open(path, "rb") as raw:
        if raw.read(len(POINTER)) == POINTER:
            raise CheckpointError(f"{path}: a pointer of Git LFS, and not the weights themselves; fetch these by "
                                  "`git lfs pull` in its repository")  # fmt: skip
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path}: not a safetensors file ({error})") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # AudioMAE keeps its arguments in the file
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch makes of a file that is none
        # Not torch's message, whose advice is to load the file in an unsafe way.
        reason = "UnpicklingError" if isinstance(error, pickle.UnpicklingError) else why(error)
        raise CheckpointError(
            f"{path}: not a checkpoint of plain tensors ({reason}). Files that need arbitrary pickle are refused; "
            "convert them to safetensors where you trust them"
        ) from error
    config: Any = content.get("config") if isinstance(content, dict) else None
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds no state dict (tensors by name, or those under 'state_dict' or 'model')")
    return content, {"config": config} if _is_object(config) else {}


def _is_object(text: object) -> bool:
    """Whether it is JSON of names and values, as `avfusion export --format authors` writes beside the weights."""
    try:
        return isinstance(text, str) and isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _load_strictly(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    own = module.state_dict()
    problems = {
        "missing": [key for key in own if key not in state],
        "extra": [key for key in state if key not in own],
        "misshapen": [
            f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    }
    if any(problems.values()):
        lines = [f"  {kind} ({len(keys)}): {', '.join(keys)}" for kind, keys in problems.items() if keys]
        raise CheckpointError(
            "\n".join([f"{source}: does not fit {type(module).__name__}; nothing was loaded", *lines])
        )
    module.load_state_dict(state)


def _infer_config(state: dict[str, Tensor], known: dict[str, int], path: Path) -> EncoderConfig:
    """The config that a released checkpoint was made with, from its keys and shapes, and from what is known of it.

    Raises KeyError or ValueError.
    """
    dim, _, patch_size, _ = state["image.patch_embed.proj.weight"].shape
    depth = 1 + max(int(match[1]) for key in state if (match := re.match(r"image\.blocks\.(\d+)\.", key)))
    side = round(state["image.pos_embed"].shape[1] ** 0.5)
    mel_rows = 128 // patch_size
    frames = state["audio.pos_embed"].shape[1] // mel_rows
    if dim % 64 and "num_heads" not in known:
        raise ValueError(f"{dim} wide, which is not a multiple of 64: the number of heads is unknown; give num_heads=")
    layers = sorted({int(match[1]) for key in state if (match := re.match(r"fusion_blocks\.(\d+)\.", key))})
    tokens, assumed = state["fusion_tokens"].shape[1], {}
    if "num_heads" not in known and dim != 768:
        assumed["num_heads"] = 16 if dim == 1280 else dim // 64  # ViT-S, B, L; ViT-H has 16 heads 80 wide
    heads = known.get("num_heads", assumed.get("num_heads", 12))
    config: dict[str, Any] = {
        "dim": dim,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": state["image.blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "patch_size": patch_size,
        "image_size": (side * patch_size, side * patch_size),
        "audio_size": (mel_rows * patch_size, frames * patch_size),
        "fusion": "none",
        "fusion_tokens": tokens,
    }
    if layers:
        block = f"fusion_blocks.{layers[0]}"
        config["fusion_layers"] = "all" if len(layers) == depth else "-".join(map(str, layers))
        config["fusion_mlp_ratio"] = state[f"{block}.mlp.fc1.weight"].shape[0] / dim
        queries = state[f"{block}.attn.q.weight"].shape[0]
        config["fusion_attn_ratio"] = queries / dim
        if "fusion_num_heads" not in known and dim != 768:
            assumed["fusion_num_heads"] = heads if dim % 12 or queries % 12 else 12
        if f"{block}.attn.attn_v.q.weight" in state:
            config["fusion"] = "factorized"
            config |= _split_tokens(tokens, known, assumed)
        else:
            config["fusion"] = "dense" if state[f"{block}.attn.kv.weight"].shape[1] == 2 * dim else "token"
    if assumed:
        told = ", ".join(f"{name}={value}" for name, value in assumed.items())
        warnings.warn(f"{path}: neither keys nor shapes tell {told}: assumed, as the release would have it; give what "
                      f"is right: load_encoder(..., {next(iter(assumed))}=...)", stacklevel=3)  # fmt: skip
    config |= assumed | known
    if config.get("fusion_num_heads") == config["num_heads"]:
        config["fusion_num_heads"] = 0
    return EncoderConfig(**config)


def _split_tokens(tokens: int, known: dict[str, int], assumed: dict[str, int]) -> dict[str, int]:
    """Tokens of a factorized encoder: what attends, and what aggregates each modality. Raises ValueError."""
    names = ("fusion_tokens", "image_agg_tokens", "audio_agg_tokens")
    split = {name: known.get(name, 8) for name in names[1:]}
    split["fusion_tokens"] = known.get("fusion_tokens", tokens - sum(split.values()))
    if split["fusion_tokens"] < 1 or sum(split.values()) != tokens:
        raise ValueError(f"{tokens} tokens are not {split}; give {', '.join(names)}")
    if tokens != 32:
        assumed |= {name: split[name] for name in names if name not in known}
    return split
