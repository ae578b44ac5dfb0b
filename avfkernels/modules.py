"""The three fusion blocks of DeepAVFusion: drop-in modules with the state-dict keys and the numbers of the release.

Every block reads the patch tokens of both modalities and updates the fusion tokens:

    x = LN(x_fusion);  x = x + attn(x, LN(x_visual), LN(x_audio));  x = x + mlp(LN(x))

The residual is added to the *normalised* tokens, and LayerNorm's eps is 1e-5, as in the release. The attention runs by
the exact rewrites R1 (pairs separate) and R2 (projections move to the queries). It materialises the pairs, as the
paper's equations read, `with avfkernels.backend("reference")`. Products and, in training with attention dropout,
dropped pairs do not separate: `pair_attention` visits them one by one and keeps none, where a fused backend exists.

The weights of `kv` (and of `k` and `v` over aggregates) are applied by parts: these layers are read and not called, so
that hooks on them run in `TokenFusion` alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from avfkernels.attentions import DenseAttention, FactorizedAttention, TokenAttention
from avfkernels.ops.common import autocast_enabled, check_mask, hide
from avfkernels.ops.linear import apply_linear


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, drop: float, **factory):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, **factory)
        self.fc2 = nn.Linear(hidden_dim, dim, **factory)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(apply_linear(self.fc2, self.drop(apply_linear(self.fc1, x, gelu=True))))


class FusionBlock(nn.Module):
    """Norms, residuals and MLP around one of the attentions; see the module's docstring."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop: float, drop_path: float, **factory):
        super().__init__()
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"{type(self).__name__}: drop_path must be in [0, 1), got {drop_path}")
        self.norm1_mm = nn.LayerNorm(dim, **factory)
        self.norm1_aud = nn.LayerNorm(dim, **factory)
        self.norm1_img = nn.LayerNorm(dim, **factory)
        self.attn: Any = attn
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
            batch, count = tokens.shape[:2]
            check_mask(type(self).__name__, name, mask, batch, count, tokens.device)
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
