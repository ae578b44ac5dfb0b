"""The three fusion blocks of DeepAVFusion: drop-in modules with the state-dict keys and the numbers of the release.

Every block reads the patch tokens of both modalities and updates the fusion tokens:

    x = LN(x_fusion);  x = x + attn(x, LN(x_visual), LN(x_audio));  x = x + mlp(LN(x))

The residual is added to the *normalised* tokens, and LayerNorm's eps is 1e-5, as in the release. The attention runs by
the exact rewrites R1 (pairs separate) and R2 (projections move to the queries). It materialises the pairs, as the
paper's equations read, `with avfkernels.backend("reference")`. Products and, in training with attention dropout,
dropped pairs do not separate: `pair_attention` visits them one by one and keeps none, where a fused backend exists.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfkernels.choice import materialises
from avfkernels.ops.common import attend, autocast_enabled, check_mask, hide, join_masks, masked_softmax, pair_mask
from avfkernels.ops.latent import absorb, absorbed_attention
from avfkernels.ops.linear import split_linear
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


class _Attention(nn.Module):
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
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class TokenAttention(_Attention):
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
        return self.kv(x_visual), self.kv(x_audio)

    def update(self, x, kv_visual, kv_audio, return_attention=False, visual_mask=None, audio_mask=None):
        q = _heads(self.q(x), self.num_heads)
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


class DenseAttention(_Attention):
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
        return self.project(self.attend(_heads(self.q(x), self.num_heads), k, v, mask))

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
        q = _heads(self.q(x), self.num_heads)
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


class LatentCrossAttention(_Attention):
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
        q = _heads(self.q(latents), self.num_heads)  # [B, H, m, d]
        if isinstance(tokens, Tensor):
            return self.project(attend(q, *_key_value_heads(tokens, self.num_heads), self.scale)[0])
        x, weight, bias, factor = tokens
        keeps_weights = materialises() or self.dropout_p() > 0.0
        # Moving the projections to the latents (R2) takes fewer FLOP than projecting a dozen tokens or more.
        if keeps_weights or latents.shape[1] * self.num_heads >= self.q.in_features:
            x = x if factor is None else (x * factor).to(x.dtype)
            k, v = _key_value_heads(F.linear(x, weight, bias), self.num_heads)
            out = self.attend(q, k, v, mask) if keeps_weights else attend(q, k, v, self.scale, mask)[0]
            weights = _softmax_weights(q, k, self.scale, mask) if return_attention else None
        else:
            out = absorbed_attention(q, x, weight, bias, self.scale, mask, factor)
            weights = None
            if return_attention:
                weights = _softmax_weights(absorb(q, weight), x.unsqueeze(1), self.scale, mask)
        out = self.project(out)
        return (out, weights) if return_attention else out


class FactorizedAttention(_Attention):
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

        q = _heads(self.q(x), self.num_heads)
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


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, drop: float, **factory):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, **factory)
        self.fc2 = nn.Linear(hidden_dim, dim, **factory)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class FusionBlock(nn.Module):
    """Norms, residuals and MLP around one of the attentions; see the module's docstring."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop: float, drop_path: float, **factory):
        super().__init__()
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"{type(self).__name__}: drop_path must be in [0, 1), got {drop_path}")
        self.norm1_mm = nn.LayerNorm(dim, **factory)
        self.norm1_aud = nn.LayerNorm(dim, **factory)
        self.norm1_img = nn.LayerNorm(dim, **factory)
        self.attn = attn
        self.drop_path_p = drop_path
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights and zero biases, as in the release."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def drop_path(self, x: Tensor) -> Tensor:
        """Stochastic depth: the residual of a whole sample is dropped, the others are scaled up."""
        if self.drop_path_p == 0.0 or not self.training:
            return x
        keep = x.new_empty(x.shape[0], 1, 1).bernoulli_(1.0 - self.drop_path_p)
        return x * keep / (1.0 - self.drop_path_p)

    def norms(self) -> tuple[nn.Module, nn.Module]:
        """Of the visual tokens and of the audio tokens."""
        return self.norm1_img, self.norm1_aud

    def forward(
        self, x_fusion: Tensor, x_visual: Tensor, x_audio: Tensor, return_attention: bool = False,
        visual_mask: Tensor | None = None, audio_mask: Tensor | None = None,
    ):  # fmt: skip
        """x_fusion [B, F, D], x_visual [B, n_v, D], x_audio [B, n_a, D] -> x_fusion [B, F, D].

        visual_mask [B, n_v] and audio_mask [B, n_a], bool, are True for tokens that count: clips of several lengths,
        padded into one batch, give what each gives alone. What the others hold, NaN too, reaches no result.

        With `return_attention`, also the marginal attention maps: alpha [B, H, F, n_a] over audio tokens and beta
        [B, H, F, n_v] over visual tokens, each a distribution (for `TokenFusion` the two together are one). Of
        `FactorizedFusion` only the first `fusion_tkns[0]` tokens attend to pairs; F is their number in the maps, and
        the maps are carried through the aggregation to the patches (head-averaged there).

        Raises ValueError, naming the argument, if a shape does not fit.
        """
        self._check(x_fusion, x_visual, x_audio)
        for name, mask, tokens in (("visual_mask", visual_mask, x_visual), ("audio_mask", audio_mask, x_audio)):
            check_mask(type(self).__name__, name, mask, *tokens.shape[:2], tokens.device)
        norm_visual, norm_audio = self.norms()
        x_visual, x_audio = norm_visual(hide(x_visual, visual_mask)), norm_audio(hide(x_audio, audio_mask))
        x = self.norm1_mm(x_fusion)
        out = self.attn(x, x_visual, x_audio, return_attention, visual_mask, audio_mask)
        out, *maps = out if return_attention else (out,)
        x = self._finish(x, out)
        return (x, *maps) if return_attention else x

    def update(self, x_fusion: Tensor, visual, audio) -> Tensor:
        """The block for tokens that have been read (`attn.reads`) by somebody else."""
        x = self.norm1_mm(x_fusion)
        return self._finish(x, self.attn.update(x, visual, audio))

    def _finish(self, x: Tensor, out: Tensor) -> Tensor:
        x = x + self.drop_path(out)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _check(self, x_fusion, x_visual, x_audio):
        dim = self.norm2.normalized_shape[0]
        for name, x in (("x_fusion", x_fusion), ("x_visual", x_visual), ("x_audio", x_audio)):
            if x.ndim != 3 or x.shape[2] != dim or x.shape[0] != x_fusion.shape[0]:
                raise ValueError(
                    f"{type(self).__name__}: {name} must have shape [B, N, {dim}] with one B for all, got "
                    f"{list(x.shape)} (x_fusion {list(x_fusion.shape)})"
                )
            if x.dtype != x_fusion.dtype and not autocast_enabled(x.device.type):
                raise ValueError(
                    f"{type(self).__name__}: {name} {list(x.shape)} is {x.dtype}, x_fusion {list(x_fusion.shape)} is "
                    f"{x_fusion.dtype}; cast them to one dtype or use autocast"
                )


class TokenFusion(FusionBlock):
    """Plain cross-attention over [x_visual ; x_audio]: fusion without interactions.

    Args and shapes as `FactorizedFusion`, without `fusion_tkns`; any number of fusion tokens.
    """

    def __init__(
        self, dim, num_heads, attn_ratio=0.25, mlp_ratio=1.0, qkv_bias=True,
        drop=0.0, attn_drop=0.0, drop_path=0.0, device=None, dtype=None,
    ):  # fmt: skip
        factory = {"device": device, "dtype": dtype}
        attn = TokenAttention(dim, num_heads, attn_ratio, qkv_bias, attn_drop, drop, **factory)
        super().__init__(dim, attn, mlp_ratio, drop, drop_path, **factory)

    def norms(self):
        return self.norm1_aud, self.norm1_img  # swapped in the release, and so in its checkpoints


class DenseFusion(FusionBlock):
    r"""Fusion tokens attend to all n_a x n_v interactions W_a x_a[i] + W_v x_v[j] (Eqs. 4-6), at O(n_a + n_v) by R1.

    Args and shapes as `FactorizedFusion`, without `fusion_tkns`; any number of fusion tokens.
        interaction: "sum", or "product" for the multiplicative (W_a x_a[i] + b) * (W_v x_v[j] + b), feature by feature:
            each feature of a pair is a rank-one bilinear form of the two tokens, so that a key or value can tell which
            tokens go together and not only which are there. No identity separates it. `pair_attention` computes all
            pairs, O(n_a n_v) time (18,816 pairs at 196 + 96 tokens, against 292 tokens for sums) and O(n_a + n_v)
            memory.
    """

    def __init__(
        self, dim, num_heads, attn_ratio=0.25, mlp_ratio=1.0, qkv_bias=True, interaction="sum",
        drop=0.0, attn_drop=0.0, drop_path=0.0, device=None, dtype=None,
    ):  # fmt: skip
        factory = {"device": device, "dtype": dtype}
        attn = DenseAttention(dim, num_heads, attn_ratio, qkv_bias, attn_drop, drop, interaction, **factory)
        super().__init__(dim, attn, mlp_ratio, drop, drop_path, **factory)


class FactorizedFusion(FusionBlock):
    r"""Each modality is aggregated into a few tokens; fusion tokens attend to all pairs of aggregates (Eqs. 7-11).

    A drop-in for the block of the authors' release: same state-dict keys, same numbers. R2 aggregates without keys or
    values of the patch tokens wherever that takes fewer FLOP, and R1 separates the pairs.

    Args:
        dim: width D of all tokens; num_heads: H; both D and int(D * attn_ratio) are multiples of H.
        attn_ratio: width of the queries and keys that meet pairs, as a share of D.
        mlp_ratio: hidden width of the MLP over D.
        qkv_bias: biases on queries, keys and values.
        fusion_tkns: how x_fusion splits, in order: fusion tokens, visual aggregates, audio aggregates.
        drop, attn_drop, drop_path: dropout after projections, of attention weights (of a pair's, where pairs are
            attended to: time grows with their number, memory does not), and of whole residuals.
        device, dtype: of the parameters.

    Raises:
        ValueError: sizes that do not divide, or an input whose shape does not fit.

    Source: Mo & Morgado, CVPR 2024, https://arxiv.org/abs/2312.01017.
    """

    def __init__(
        self, dim, num_heads, attn_ratio=0.25, mlp_ratio=1.0, qkv_bias=True, fusion_tkns=(16, 8, 8),
        drop=0.0, attn_drop=0.0, drop_path=0.0, device=None, dtype=None,
    ):  # fmt: skip
        factory = {"device": device, "dtype": dtype}
        if len(fusion_tkns) != 3 or min(fusion_tkns) < 1:
            raise ValueError(
                "FactorizedFusion: fusion_tkns must be three positive counts (fusion, visual aggregates, audio "
                f"aggregates), got {fusion_tkns}"
            )
        attn = FactorizedAttention(dim, num_heads, attn_ratio, qkv_bias, attn_drop, drop, fusion_tkns, **factory)
        super().__init__(dim, attn, mlp_ratio, drop, drop_path, **factory)

    def _check(self, x_fusion, x_visual, x_audio):
        super()._check(x_fusion, x_visual, x_audio)
        if x_fusion.shape[1] != sum(self.attn.fusion_tkns):
            raise ValueError(
                f"FactorizedFusion: x_fusion must hold sum(fusion_tkns) = {sum(self.attn.fusion_tkns)} tokens "
                f"(fusion_tkns = {self.attn.fusion_tkns}), got {list(x_fusion.shape)}"
            )
