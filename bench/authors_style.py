"""A stand-in for the authors' code of DeepAVFusion: their attribute names, forward and order of layers, written anew.

Pairs are materialised, fusion tokens concatenated in front of the patches, as released; timm's blocks, as released.
The golden files hold what the authors' modules compute (test_accelerate.py compares).
"""

from functools import partial

import torch
from timm.models.vision_transformer import Block, DropPath, Mlp, PatchEmbed
from torch import nn


class ViT(nn.Module):
    def __init__(self, size, channels, dim, depth, num_heads, **drops):
        super().__init__()
        self.patch_embed = PatchEmbed(size, 16, channels, dim)
        self.pos_embed = nn.Parameter(torch.randn(1, self.patch_embed.num_patches, dim) / 2, requires_grad=False)
        self.cls_token = None
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, 4.0, qkv_bias=True, norm_layer=norm, **drops) for _ in range(depth)
        )
        self.norm = norm(dim)

    def prepare_patch_tokens(self, x, ids_keep=None):
        x = self.patch_embed(x) + self.pos_embed
        return x if ids_keep is None else x.gather(1, ids_keep.unsqueeze(-1).repeat(1, 1, x.shape[-1]))


def pairs(first, second):
    first = first.unsqueeze(2).repeat(1, 1, second.shape[1], 1)
    second = second.unsqueeze(1).repeat(1, first.shape[1], 1, 1)
    return torch.cat((first, second), dim=3).flatten(1, 2)


class Attention(nn.Module):
    """The part that all of their cross-attentions repeat; `layers` in the order of the state dict."""

    def __init__(self, num_heads, scaled_width, attn_drop=0.0, proj_drop=0.0, **layers):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (scaled_width // num_heads) ** -0.5
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)

    def attend(self, x, k, v):
        q, k, v = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (self.q(x), k, v))
        weights = self.attn_drop((q @ k.mT * self.scale).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2))), weights


class CrossAttention(Attention):
    def __init__(self, dim, num_heads, **drops):
        layers = {"q": nn.Linear(dim, dim), "kv": nn.Linear(dim, 2 * dim), "proj": nn.Linear(dim, dim)}
        super().__init__(num_heads, dim, **drops, **layers)

    def forward(self, x, source):
        return self.attend(x, *self.kv(source).chunk(2, -1))


class TokenAttention(Attention):
    def __init__(self, dim, num_heads, dim_ratio, **drops):
        width = int(dim * dim_ratio)
        layers = {"q": nn.Linear(dim, width), "kv": nn.Linear(dim, 2 * width), "proj": nn.Linear(width, dim)}
        super().__init__(num_heads, width, **drops, **layers)

    def forward(self, xmm, xv, xa):
        return self.attend(xmm, *self.kv(torch.cat((xv, xa), 1)).chunk(2, -1))


class DenseAttention(Attention):
    def __init__(self, dim, num_heads, dim_ratio, **drops):
        width = int(dim * dim_ratio)
        layers = {"q": nn.Linear(dim, width), "kv": nn.Linear(2 * dim, 2 * width), "proj": nn.Linear(width, dim)}
        super().__init__(num_heads, dim, **drops, **layers)

    def forward(self, xmm, xv, xa):
        return self.attend(xmm, *self.kv(pairs(xa, xv)).chunk(2, -1))


class FactorizedAttention(Attention):
    def __init__(self, dim, num_heads, dim_ratio, fusion_tkns, **drops):
        width = int(dim * dim_ratio)
        layers = {
            "attn_v": CrossAttention(dim, num_heads, **drops),
            "attn_a": CrossAttention(dim, num_heads, **drops),
            "q": nn.Linear(dim, width),
            "k": nn.Linear(2 * dim, width),
            "v": nn.Linear(2 * dim, dim),
            "proj": nn.Linear(dim, dim),
        }
        super().__init__(num_heads, dim, **drops, **layers)
        self.fusion_tkns = fusion_tkns

    def forward(self, xmm, xv, xa):
        xmm, xmm_v, xmm_a = xmm.split(self.fusion_tkns, dim=1)
        xmm_v, xmm_a = self.attn_v(xmm_v, xv)[0], self.attn_a(xmm_a, xa)[0]
        both = pairs(xmm_v, xmm_a)
        xmm, weights = self.attend(xmm, self.k(both), self.v(both))
        return torch.cat((xmm, xmm_v, xmm_a), dim=1), weights


class FusionBlock(nn.Module):
    def __init__(self, attn, dim, num_heads, mlp_ratio, dim_ratio, drop_path, attn_drop, drop, **tokens):
        super().__init__()
        self.norm1_mm, self.norm1_aud, self.norm1_img = (nn.LayerNorm(dim) for _ in range(3))
        self.attn = attn(dim, num_heads, dim_ratio=dim_ratio, attn_drop=attn_drop, proj_drop=drop, **tokens)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)

    def forward(self, xmm, xv, xa):
        if isinstance(self.attn, TokenAttention):
            xv, xa = self.norm1_aud(xv), self.norm1_img(xa)  # swapped, as released
        else:
            xv, xa = self.norm1_img(xv), self.norm1_aud(xa)
        xmm = self.norm1_mm(xmm)
        xmm = xmm + self.drop_path(self.attn(xmm, xv, xa)[0])
        return xmm + self.drop_path(self.mlp(self.norm2(xmm)))


class Encoder(nn.Module):
    def __init__(
        self, fusion, tokens=(16, 8, 8), fusion_layers=None, dim=768, depth=12, num_heads=12, image_size=(224, 224),
        audio_size=(128, 192), mlp_ratio=1.0, attn_ratio=0.25, drop_path=0.0, attn_drop=0.0, drop=0.0,
    ):  # fmt: skip
        super().__init__()
        drops = {"drop_path": drop_path, "attn_drop": attn_drop}
        self.image = ViT(image_size, 3, dim, depth, num_heads, proj_drop=drop, **drops)
        self.audio = ViT(audio_size, 1, dim, depth, num_heads, proj_drop=drop, **drops)
        self.fusion_tokens = nn.Parameter(torch.randn(1, sum(tokens), dim) / 2)
        attn = {"token": TokenAttention, "dense": DenseAttention, "factorized": FactorizedAttention}[fusion]
        split = {"fusion_tkns": tokens} if fusion == "factorized" else {}
        self.fusion_blocks = nn.ModuleList(
            FusionBlock(attn, dim, num_heads, mlp_ratio, attn_ratio, drop=drop, **drops, **split)
            if fusion_layers is None or i in fusion_layers
            else None
            for i in range(depth)
        )
        self.fusion_norm = nn.LayerNorm(dim)

    def forward(self, image, audio, image_ids_keep=None, audio_ids_keep=None, return_embs=False):
        x_image = self.image.prepare_patch_tokens(image, image_ids_keep)
        x_audio = self.audio.prepare_patch_tokens(audio, audio_ids_keep)
        x_fusion = self.fusion_tokens.expand(len(image), -1, -1)
        F, embs = x_fusion.shape[1], []
        for blk_image, blk_audio, blk_fusion in zip(
            self.image.blocks, self.audio.blocks, self.fusion_blocks, strict=True
        ):
            if blk_fusion is None:
                x_image, x_audio = blk_image(x_image), blk_audio(x_audio)
            else:
                next_image = blk_image(torch.cat((x_fusion, x_image), 1))[:, F:]
                next_audio = blk_audio(torch.cat((x_fusion, x_audio), 1))[:, F:]
                x_fusion = blk_fusion(x_fusion, x_image, x_audio)
                x_image, x_audio = next_image, next_audio
            embs.append((x_image, x_audio, x_fusion))
        out = self.image.norm(x_image), self.audio.norm(x_audio), self.fusion_norm(x_fusion)
        return (*out, embs) if return_embs else out


class AVMAE(nn.Module):
    """The masked auto-encoder, as far as `accelerate` is concerned: the encoder below `encoder`, and masks."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.image_decoder_pred = nn.Linear(encoder.fusion_norm.normalized_shape[0], 1)

    def forward(self, image, audio, image_ids_keep, audio_ids_keep):
        x_image, x_audio, x_fusion = self.encoder(image, audio, image_ids_keep, audio_ids_keep)
        return self.image_decoder_pred(x_image).mean() + x_audio.sin().mean() + x_fusion.sin().mean()
