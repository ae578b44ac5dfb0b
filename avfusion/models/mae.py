"""AVMAE: masked auto-encoding of pictures and sound at once around a `DeepAVFusion` encoder.

    x_image, x_audio, x_fusion = encoder(visible image patches, visible audio patches)            (Eq. 12)
    pred[m] = decoder[m]([x_fusion ; x[m] ; mask tokens + positions])        m in {image, audio}   (Eq. 13)
    loss[m] = mean over hidden patches of |pred[m] - patch normalised by its own mean and deviation|^2   (Eq. 14)

State-dict keys and numbers are those of the authors' release. Three things are cheaper, and equal: decoders see tokens
in the order (fusion, visible, hidden), so nothing is shuffled back before attention, which has no order; the last
block of a decoder computes rows of hidden patches only and reads the others as a prefix (rewrite R3); targets are
normalised where they are hidden, and no normalised target outlives the forward pass.

Source: Mo & Morgado, CVPR 2024, https://arxiv.org/abs/2312.01017.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn

import avfkernels
from avfusion.models.deepavfusion import Block, DeepAVFusion, sincos_position_embedding, take

EPS = 1e-6  # of the variance of a target patch


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, patches, patch_size**2 * C]: patches row by row, each flattened (row, column, channel)."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(x: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """The inverse of `patchify`, for a grid of rows x columns."""
    return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], p=patch_size, q=patch_size)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (unbiased, floored) of each patch, [..., 1]: what targets are normalised with."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + EPS).sqrt()


class AVMAE(nn.Module):
    """The masked auto-encoder that pre-trains a `DeepAVFusion` encoder.

    Args:
        encoder: is trained in place.
        decoder_dim, decoder_depth, decoder_num_heads: of either decoder, one for each modality.
        image_mask_ratio, audio_mask_ratio: the share of patches that is hidden, in (0, 1).
        norm_loss: normalise each target patch.

    Raises ValueError where a ratio leaves no patch visible or none hidden, or the decoder cannot be built.
    """

    def __init__(
        self,
        encoder: DeepAVFusion,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        image_mask_ratio: float = 0.75,
        audio_mask_ratio: float = 0.8,
        norm_loss: bool = True,
    ):
        super().__init__()
        config, self.norm_loss = encoder.config, norm_loss
        if min(decoder_dim, decoder_num_heads, decoder_depth) < 1 or decoder_dim % decoder_num_heads or decoder_dim % 4:
            raise ValueError(
                f"AVMAE: decoder_dim = {decoder_dim} must be a multiple of decoder_num_heads = {decoder_num_heads} "
                f"and of 4, and these and decoder_depth = {decoder_depth} at least 1"
            )
        self.encoder = encoder
        self.visible = {}
        decoder = replace(config, dim=decoder_dim, num_heads=decoder_num_heads, fusion_num_heads=0, mlp_ratio=4.0,
                          drop_path=0.0)  # fmt: skip
        for name, grid, channels, ratio in (
            ("image", config.image_grid, 3, image_mask_ratio),
            ("audio", config.audio_grid, 1, audio_mask_ratio),
        ):
            patches = grid[0] * grid[1]
            self.visible[name] = int(patches * (1 - ratio))
            if not 0 < self.visible[name] < patches:
                raise ValueError(
                    f"AVMAE: {name}_mask_ratio = {ratio} leaves {self.visible[name]} of {patches} patches visible; "
                    "some must be visible and some hidden"
                )
            for part, module in {
                "embed": nn.Linear(config.dim, decoder_dim),
                "mask_token": nn.Parameter(torch.empty(1, 1, decoder_dim).normal_(std=0.02)),
                "pos_embed": nn.Parameter(sincos_position_embedding(decoder_dim, grid)),  # learnt, as in the release
                "blocks": nn.ModuleList(Block(decoder) for _ in range(decoder_depth)),
                "norm": nn.LayerNorm(decoder_dim),
                "pred": nn.Linear(decoder_dim, config.patch_size**2 * channels),
            }.items():
                setattr(self, f"{name}_decoder_{part}", module)
        for key, module in self.named_modules():
            if "_decoder_" in key and isinstance(module, nn.LayerNorm):
                module.eps = 1e-5  # unlike the ViTs' blocks
            elif "_decoder_" in key and isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        image: Tensor,
        audio: Tensor,
        image_noise: Tensor | None = None,
        audio_noise: Tensor | None = None,
        predict: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Hides patches and reconstructs them.

        Args:
            image, audio: [B, 3, H, W] and [B, 1, mels, frames], as for the encoder.
            image_noise, audio_noise: [B, patches]. In each row the patches with the smallest values stay visible; None
                draws uniform noise.
            predict: False leaves out what the losses do not need: training does, and gets None for the predictions.

        Returns:
            loss_image, loss_audio: scalars.
            pred_image [B, n_v, patch_size**2 * 3], pred_audio [B, n_a, patch_size**2]: of every patch, in the space of
                the (normalised) targets.

        Raises ValueError, naming the argument, for a shape that does not fit the encoder.
        """
        image_ids, audio_ids = (
            self._shuffle(name, x, noise)
            for name, x, noise in (("image", image, image_noise), ("audio", audio, audio_noise))
        )
        x_image, x_audio, x_fusion = self.encoder(
            image, audio, image_ids[:, : self.visible["image"]], audio_ids[:, : self.visible["audio"]]
        )
        pred_image, hidden_image = self._decode("image", x_image, x_fusion, image_ids, predict)
        pred_audio, hidden_audio = self._decode("audio", x_audio, x_fusion, audio_ids, predict)
        loss_image = self._loss("image", hidden_image, image, image_ids)
        loss_audio = self._loss("audio", hidden_audio, audio, audio_ids)
        return loss_image, loss_audio, pred_image, pred_audio

    @torch.no_grad()
    def reconstruct(self, image: Tensor, audio: Tensor, image_noise: Tensor, audio_noise: Tensor) -> list[Tensor]:
        """What a picture of the task shows: image, masked image, reconstructed image, and the same three of the audio.

        Masked is NaN where it is hidden. Reconstructed has predictions there, brought back by the mean and deviation of
        the patch that is hidden, and the input elsewhere. Arguments as in `forward`; all shapes are those of the input.
        """
        noise = image_noise, audio_noise
        _, _, *preds = self(image, audio, *noise)
        config, out = self.encoder.config, []
        for name, grid, x, n, pred in zip(
            ("image", "audio"), (config.image_grid, config.audio_grid), (image, audio), noise, preds, strict=True
        ):
            patches = patchify(x, config.patch_size)
            hidden = (n.argsort(1).argsort(1) >= self.visible[name]).unsqueeze(-1)
            if self.norm_loss:
                mean, deviation = patch_statistics(patches)
                pred = pred * deviation + mean
            masked, filled = patches.masked_fill(hidden, torch.nan), torch.where(hidden, pred.to(x.dtype), patches)
            out += [x, *(unpatchify(p, grid, config.patch_size) for p in (masked, filled))]
        return out

    def _shuffle(self, name: str, x: Tensor, noise: Tensor | None) -> Tensor:
        """Patch numbers [B, patches], those that stay visible first."""
        shape = (x.shape[0], getattr(self, f"{name}_decoder_pos_embed").shape[1])
        if noise is None:
            noise = torch.rand(shape, device=x.device)
        elif noise.shape != shape:
            raise ValueError(
                f"AVMAE: {name}_noise must have shape [B, patches] = {list(shape)}, got {list(noise.shape)}"
            )
        return noise.argsort(dim=1)

    def _decode(self, name: str, x: Tensor, x_fusion: Tensor, ids: Tensor, predict: bool):
        """Predictions of all patches in order (None unless `predict`), and of the hidden ones in the order of `ids`."""
        embed, mask_token, positions, blocks, norm, pred = (
            getattr(self, f"{name}_decoder_{part}")
            for part in ("embed", "mask_token", "pos_embed", "blocks", "norm", "pred")
        )
        visible, fusion = x.shape[1], x_fusion.shape[1]
        positions = take(positions.expand(len(ids), -1, -1), ids)
        x = torch.cat((embed(x_fusion), embed(x) + positions[:, :visible], mask_token + positions[:, visible:]), dim=1)
        compiled = bool(self.encoder.compiled) and torch.is_grad_enabled()
        for block in blocks[:-1]:
            x = avfkernels.run_block(block, x, compiled=compiled)
        wanted = fusion if predict else fusion + visible
        x = pred(norm(avfkernels.run_block(blocks[-1], x[:, wanted:], x[:, :wanted], compiled=compiled)))
        return (take(x, ids.argsort(dim=1)), x[:, visible:]) if predict else (None, x)

    def _loss(self, name: str, pred: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        target = take(patchify(x, self.encoder.config.patch_size), ids[:, self.visible[name] :])
        if self.norm_loss:
            mean, deviation = patch_statistics(target)
            target = (target - mean) / deviation
        return (pred - target).square().mean()  # keeps the difference alone; mse_loss would keep both
