"""FLOP of the encoder for one video: matrix products and attention contractions, a multiply-add counted as 2.

Softmax, norms and activations are left out. The ratio of these counts to those of no fusion is the floor that timings
are held against.
"""

from __future__ import annotations

from avfusion import EncoderConfig


def linear(tokens: int, d_in: int, d_out: int) -> int:
    return 2 * tokens * d_in * d_out


def attention(queries: int, keys: int, d_qk: int, d_v: int) -> int:
    """Scores and weighted sum; the widths count all heads together."""
    return 2 * queries * keys * (d_qk + d_v)


def unimodal_block(config: EncoderConfig, tokens: int, prefix: int, *, materialised: bool) -> int:
    """A ViT block that reads `prefix` fusion tokens (R3), or, as released, computes their rows."""
    D, hidden = config.dim, int(config.dim * config.mlp_ratio)
    rows = tokens + prefix if materialised else tokens
    return (
        linear(rows, D, 3 * D)
        + linear(tokens + prefix - rows, D, 2 * D)  # keys and values of the prefix
        + attention(rows, tokens + prefix, D, D)
        + linear(rows, D, D)
        + linear(rows, D, hidden)
        + linear(rows, hidden, D)
    )


def aggregation(config: EncoderConfig, latents: int, tokens: int, *, materialised: bool) -> int:
    """Cross-attention of a few latents over the tokens of one modality: projected, or absorbed (R2) if that is less."""
    D, queries = config.dim, latents * config.heads_of_fusion
    projected = linear(tokens, D, 2 * D) + attention(latents, tokens, D, D)
    absorbed = 2 * linear(latents, D, D) + attention(queries, tokens, D, D)
    return 2 * linear(latents, D, D) + (projected if materialised else min(projected, absorbed))


def fusion_block(config: EncoderConfig, n_image: int, n_audio: int, *, materialised: bool) -> int:
    """A fusion block with summed interactions, over all pairs or by R1 and R2."""
    D, F = config.dim, config.fusion_tokens
    narrow = int(D * config.fusion_attn_ratio)
    if config.fusion == "factorized":
        aggregates = config.image_agg_tokens, config.audio_agg_tokens
        flop = sum(
            aggregation(config, latents, tokens, materialised=materialised)
            for latents, tokens in zip(aggregates, (n_image, n_audio), strict=True)
        )
        n_image, n_audio = aggregates
        d_v = D
    else:
        flop = 0
        d_v = narrow
    if materialised and config.fusion != "token":
        flop += linear(n_image * n_audio, 2 * D, narrow + d_v) + attention(F, n_image * n_audio, narrow, d_v)
    else:
        flop += linear(n_image + n_audio, D, narrow + d_v) + attention(F, n_image + n_audio, narrow, d_v)
    hidden = int(D * config.fusion_mlp_ratio)
    mlp = linear(config.num_fusion_tokens, D, hidden) + linear(config.num_fusion_tokens, hidden, D)
    return flop + linear(F, D, narrow) + linear(F, d_v, D) + mlp


def layers(config: EncoderConfig, n_image: int, n_audio: int, *, materialised: bool) -> int:
    """Forward FLOP of all layers on n_image + n_audio visible patches.

    Materialised means as the release computes them; otherwise the rewrites R1-R3. A backward pass takes twice as much
    again. The patch embedding, the same for every kind of fusion, comes on top: `patch_embedding`.
    """
    total = 0
    for layer in range(config.depth):
        fused = layer in config.layers_with_fusion
        prefix = config.num_fusion_tokens if fused else 0
        for tokens in (n_image, n_audio):
            total += unimodal_block(config, tokens, prefix, materialised=materialised)
        if fused:
            total += fusion_block(config, n_image, n_audio, materialised=materialised)
    return total


def patch_embedding(config: EncoderConfig) -> int:
    """Of embedding all patches of a picture and a spectrogram."""
    (image_rows, image_columns), (audio_rows, audio_columns) = config.image_grid, config.audio_grid
    area = config.patch_size**2
    return linear(image_rows * image_columns, 3 * area, config.dim) + linear(
        audio_rows * audio_columns, area, config.dim
    )
