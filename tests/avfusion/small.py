"""Small encoders and batches, and the authors' golden ones, for the tests."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from avfusion import DeepAVFusion, EncoderConfig

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = EncoderConfig(
    dim=64, depth=2, num_heads=4, image_size=(64, 48), audio_size=(32, 48),
    fusion_tokens=5, image_agg_tokens=3, audio_agg_tokens=4,
)  # fmt: skip


def build(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return DeepAVFusion(replace(SMALL, **changes)).to(dtype)


def batch(config=SMALL, B=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(B, 3, *config.image_size, generator=g).to(dtype),
        torch.randn(B, 1, *config.audio_size, generator=g).to(dtype),
    )


def masks(config=SMALL, B=2, image=5, audio=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    sizes = [(grid[0] * grid[1], kept) for grid, kept in ((config.image_grid, image), (config.audio_grid, audio))]
    return [torch.rand(B, n, generator=g).argsort(1)[:, :kept] for n, kept in sizes]


def golden_config(kind, arguments):
    """What the authors' arguments, the metadata of a golden file, are here."""
    tokens, image_agg, audio_agg = json.loads(arguments["fusion_tkns"])
    return EncoderConfig(
        dim=int(arguments["dim"]), depth=int(arguments["depth"]), num_heads=int(arguments["num_heads"]),
        image_size=json.loads(arguments["image_size"]), audio_size=json.loads(arguments["audio_size"]),
        fusion=kind, fusion_tokens=tokens, image_agg_tokens=image_agg or 8, audio_agg_tokens=audio_agg or 8,
        fusion_mlp_ratio=float(arguments["fusion_mlp_ratio"]), fusion_attn_ratio=float(arguments["fusion_attn_ratio"]),
    )  # fmt: skip


def golden_encoder(kind):
    with safe_open(GOLDEN / f"encoder_{kind}.safetensors", "pt") as file:
        arguments, golden = file.metadata(), {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118
    model = DeepAVFusion(golden_config(kind, arguments)).double()
    prefix = "param.encoder."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)})
    return model, golden
