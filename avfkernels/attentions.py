"""The attentions of the three fusion blocks, and what the ops need of them; modules.py is the blocks around them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfkernels.choice import materialises
from avfkernels.ops.common import attend, join_masks, masked_softmax, pair_mask
from avfkernels.ops.latent import absorb, absorbed_attention
from avfkernels.ops.linear import apply_linear, linear, split_linear
from avfkernels.ops.pair import INTERACTIONS, pair_attention


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, H * d] -> [B, H, N, d], a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _key_value_heads(kv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """[B, N, 2 * H * d] -> k, v [B, H, N, d], views of the packed projection."""
    k, v = kv.chunk(2, dim=-1)
    return _heads(k, num_heads), _heads(v, num_heads)


def _pairs(first: Tensor, second: Tensor) -> Tensor:
    """[B, N1, D], [B, N2, D] -> [B, N1 * N2, 2D]: every pair, concatenated."""
    n1, n2 = first.shape[1], second.shape[1]
    first = first.unsqueeze(2).expand(-1, -1, n2, -1)
    second = second.unsqueeze(1).expand(-1, n1, -1, -1)
    return torch.cat((first, second), dim=3).flatten(1, 2)


def _softmax_weights(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    return masked_softmax(q @ k.transpose(-2, -1) * scale, mask)[0]


def _marginals(q, k1, k2, scale: float, interaction: str, mask1=None, mask2=None) -> tuple[Tensor, Tensor]:
    """The marginals [B, H, F, N1], [B, H, F, N2] of the attention over pairs; their outer product, for sums."""
    if interaction == "sum":
        return _softmax_weights(q, k1, scale, mask1), _softmax_weights(q, k2, scale, mask2)
    if k1.shape[2] == 0:
        return q.new_zeros(*q.shape[:3], 0), q.new_zeros(*q.shape[:3], k2.shape[2])
    nothing1, nothing2 = (k.new_zeros(*k.shape[:3], 1) for k in (k1, k2))
    masks = {"mask1": mask1, "mask2": mask2}
    _, lse = pair_attention(
        q, k1, nothing1, k2, nothing2, scale=scale, interaction=interaction, return_lse=True, **masks
    )
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))  # without a pair: weights 0
    alpha, beta = [], 0.0
    for i in range(k1.shape[2]):  # one token of the first set at a time, so that no tensor of all pairs exists
        weights = ((q * k1[:, :, i, None]) @ k2.transpose(-2, -1) * scale - lse[..., None]).exp()  # [B, H, F, N2]
        for mask in (None if mask1 is None else mask1[:, i, None], mask2):
            weights = weights if mask is None else weights.masked_fill(~mask[:, None, None], 0.0)
        alpha.append(weights.sum(-1))
        beta = beta + weights
    return torch.stack(alpha, -1).to(q.dtype), beta.to(q.dtype)


class Attention(nn.Module):
    """What the attentions of the three blocks share: sizes and dropout.

    Those of the blocks work in two steps, `read` the tokens of the modalities and `update` the fusion tokens with that,
    so that a layer that reads the tokens for somebody else too (layer.py) can do so by one matrix product: `reads` says
    by which weights and biases. `absorbs`: what is read may be the tokens themselves (R2).
    """

    absorbs = False

    def readers(self) -> dict[str, nn.Module]:
        """The layers whose weights `reads` takes."""
        return {"kv": self.kv}

    def __init__(self, dim: int, num_heads: int, attn_ratio: float, attn_drop: float, drop: float):
        super().__init__()
        self.num_heads = num_heads
        self.attn_dim = int(dim * attn_ratio)
        if dim % num_heads or self.attn_dim % num_heads or self.attn_dim < num_heads:
            raise ValueError(
                f"{type(self).__name__}: dim = {dim} and int(dim * attn_ratio) = {self.attn_dim} must be positive "
                f"multiples of num_heads = {num_heads}"
            )
        self.scale = (dim // num_heads) ** -0.5  # of the full width, though queries and keys are narrower
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(drop)

    def dropout_p(self) -> float:
        return self.attn_drop if self.training else 0.0

    def forward(self, x, x_visual, x_audio, *options):
        return self.update(x, *self.read(x_visual, x_audio), *options)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Ordinary attention with its weights in memory, and dropped out in training."""
        return F.dropout(_softmax_weights(q, k, self.scale, mask), self.dropout_p()) @ v

    def project(self, out: Tensor) -> Tensor:
        return self.proj_drop(apply_linear(self.proj, out.transpose(1, 2).flatten(2)))


class TokenAttention(Attention):
    """Fusion tokens attend to the tokens of both modalities, concatenated; no interactions (the MBT-style baseline)."""

    def __init__(self, dim, num_heads, attn_ratio, qkv_bias, attn_drop, drop, **factory):
        super().__init__(dim, num_heads, attn_ratio, attn_drop, drop)
        self.scale = (self.attn_dim // num_heads) ** -0.5  # here the release scales by the narrow width
        self.q = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(dim, 2 * self.attn_dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(self.attn_dim, dim, **factory)

    def reads(self):
        return ((self.kv.weight, self.kv.bias),) * 2

    def read(self, x_visual, x_audio):
        return apply_linear(self.kv, x_visual), apply_linear(self.kv, x_audio)

    def update(self, x, kv_visual, kv_audio, return_attention=False, visual_mask=None, audio_mask=None):
        q = _heads(apply_linear(self.q, x), self.num_heads)
        k, v = _key_value_heads(torch.cat((kv_visual, kv_audio), dim=1), self.num_heads)
        sizes = kv_visual.shape[1], kv_audio.shape[1]
        mask = join_masks(visual_mask, audio_mask, *sizes)
        if materialises() or self.dropout_p() > 0.0:
            out = self.attend(q, k, v, mask)
        else:
            out, _ = attend(q, k, v, self.scale, mask)
        out = self.project(out)
        if not return_attention:
            return out
        beta, alpha = _softmax_weights(q, k, self.scale, mask).split(sizes, 3)
        return out, alpha, beta


class DenseAttention(Attention):
    """Fusion tokens attend to the interactions of all audio x visual pairs (Eqs. 4-6)."""

    def __init__(self, dim, num_heads, attn_ratio, qkv_bias, attn_drop, drop, interaction, **factory):
        super().__init__(dim, num_heads, attn_ratio, attn_drop, drop)
        if interaction not in INTERACTIONS:
            raise ValueError(f"DenseFusion: interaction must be one of {INTERACTIONS}, got {interaction!r}")
        self.interaction = interaction
        self.q = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(2 * dim, 2 * self.attn_dim, bias=qkv_bias, **factory)  # of [audio ; visual]
        self.proj = nn.Linear(self.attn_dim, dim, **factory)

    def forward(self, x, x_visual, x_audio, return_attention=False, visual_mask=None, audio_mask=None):
        if not materialises() or self.interaction == "product" or return_attention:
            return super().forward(x, x_visual, x_audio, return_attention, visual_mask, audio_mask)
        k, v = _key_value_heads(self.kv(_pairs(x_audio, x_visual)), self.num_heads)
        mask = pair_mask(audio_mask, visual_mask, x_audio.shape[1], x_visual.shape[1])
        return self.project(self.attend(_heads(apply_linear(self.q, x), self.num_heads), k, v, mask))

    # W [x_a ; x_v] + b = W_a x_a + (W_v x_v + b). A product takes the bias on both factors.

    def reads(self):
        audio, visual = self.kv.weight.chunk(2, dim=1)
        return (visual, self.kv.bias), (audio, self.kv.bias if self.interaction == "product" else None)

    def read(self, x_visual, x_audio):
        kv_audio, kv_visual = split_linear((x_audio, x_visual), self.kv.weight, self.kv.bias)
        if self.interaction == "product" and self.kv.bias is not None:
            kv_audio = kv_audio + self.kv.bias
        return kv_visual, kv_audio

    def update(self, x, kv_visual, kv_audio, return_attention=False, visual_mask=None, audio_mask=None):
        q = _heads(apply_linear(self.q, x), self.num_heads)
        k_a, v_a = _key_value_heads(kv_audio, self.num_heads)
        k_v, v_v = _key_value_heads(kv_visual, self.num_heads)
        out = pair_attention(
            q, k_a, v_a, k_v, v_v, scale=self.scale, interaction=self.interaction, mask1=audio_mask, mask2=visual_mask,
            dropout_p=self.dropout_p(),
        )  # fmt: skip
        out = self.project(out)
        if not return_attention:
            return out
        return out, *_marginals(q, k_a, k_v, self.scale, self.interaction, audio_mask, visual_mask)


class Tokens(NamedTuple):
    """Tokens [B, N, D], and the projection to keys and values that is still to come: r x W^T + b, r [B, N, 1] or 1."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    factor: Tensor | None = None


class LatentCrossAttention(Attention):
    """A few latent tokens aggregate the tokens of one modality by full-width cross-attention (Eqs. 7-8)."""

    def __init__(self, dim, num_heads, qkv_bias, attn_drop, drop, **factory):
        super().__init__(dim, num_heads, 1.0, attn_drop, drop)
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, latents, tokens: Tokens | Tensor, return_attention=False, mask=None):
        """latents [B, m, D], tokens [B, N, D], mask [B, N] -> [B, m, D] (, weights [B, H, m, N]).

        Tokens that have been projected already are their keys and values [B, N, 2D].
        """
        q = _heads(apply_linear(self.q, latents), self.num_heads)  # [B, H, m, d]
        if isinstance(tokens, Tensor):
            return self.project(attend(q, *_key_value_heads(tokens, self.num_heads), self.scale)[0])
        x, weight, bias, factor = tokens
        keeps_weights = materialises() or self.dropout_p() > 0.0
        # Moving the projections to the latents (R2) takes fewer FLOP than projecting a dozen tokens or more.
        if keeps_weights or latents.shape[1] * self.num_heads >= self.q.in_features:
            x = x if factor is None else (x * factor).to(x.dtype)
            k, v = _key_value_heads(linear(x, weight, bias), self.num_heads)
            out = self.attend(q, k, v, mask) if keeps_weights else attend(q, k, v, self.scale, mask)[0]
            weights = _softmax_weights(q, k, self.scale, mask) if return_attention else None
        else:
            out = absorbed_attention(q, x, weight, bias, self.scale, mask, factor)
            weights = None
            if return_attention:
                weights = _softmax_weights(absorb(q, weight), x.unsqueeze(1), self.scale, mask)
        out = self.project(out)
        return (out, weights) if return_attention else out


class FactorizedAttention(Attention):
    """Each modality is aggregated into a few tokens, and the fusion tokens attend to all pairs of those (Eqs. 7-11)."""

    def __init__(self, dim, num_heads, attn_ratio, qkv_bias, attn_drop, drop, fusion_tkns, **factory):
        super().__init__(dim, num_heads, attn_ratio, attn_drop, drop)
        self.fusion_tkns = tuple(fusion_tkns)
        self.attn_v = LatentCrossAttention(dim, num_heads, qkv_bias, attn_drop, drop, **factory)
        self.attn_a = LatentCrossAttention(dim, num_heads, qkv_bias, attn_drop, drop, **factory)
        self.q = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **factory)
        self.k = nn.Linear(2 * dim, self.attn_dim, bias=qkv_bias, **factory)  # of [visual ; audio]
        self.v = nn.Linear(2 * dim, dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    absorbs = True

    def readers(self):
        return {"attn_v.kv": self.attn_v.kv, "attn_a.kv": self.attn_a.kv}

    def reads(self):
        return tuple((attn.kv.weight, attn.kv.bias) for attn in (self.attn_v, self.attn_a))

    def read(self, x_visual, x_audio):
        return tuple(Tokens(x, *read) for x, read in zip((x_visual, x_audio), self.reads(), strict=True))

    def update(self, x, visual, audio, return_attention=False, visual_mask=None, audio_mask=None):
        x, agg_v, agg_a = x.split(self.fusion_tkns, dim=1)
        agg_v = self.attn_v(agg_v, visual, return_attention, visual_mask)
        agg_a = self.attn_a(agg_a, audio, return_attention, audio_mask)
        if return_attention:
            (agg_v, weights_v), (agg_a, weights_a) = agg_v, agg_a

        q = _heads(apply_linear(self.q, x), self.num_heads)
        if materialises() and not return_attention:
            pairs = _pairs(agg_v, agg_a)
            out = self.attend(q, _heads(self.k(pairs), self.num_heads), _heads(self.v(pairs), self.num_heads))
            return torch.cat((self.project(out), agg_v, agg_a), dim=1)

        (k_v, k_a), (v_v, v_a) = (
            (_heads(y, self.num_heads) for y in split_linear((agg_v, agg_a), layer.weight, layer.bias))
            for layer in (self.k, self.v)
        )
        out = pair_attention(q, k_v, v_v, k_a, v_a, scale=self.scale, dropout_p=self.dropout_p())
        out = torch.cat((self.project(out), agg_v, agg_a), dim=1)
        if not return_attention:
            return out
        # From fusion tokens over aggregates to patches. The heads of the aggregation are mixed by its output
        # projection before the pairs see them, so their mean is taken.
        beta, alpha = _marginals(q, k_v, k_a, self.scale, "sum")
        return out, alpha @ weights_a.mean(1, keepdim=True), beta @ weights_v.mean(1, keepdim=True)
