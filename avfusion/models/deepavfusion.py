"""DeepAVFusion: a visual ViT, an audio ViT and a branch of fusion tokens, side by side for every layer.

    x_fusion[l] = Fusion(x_fusion[l-1], x_image[l-1], x_audio[l-1])       (Eq. 1)
    x_image[l]  = Visual(x_image[l-1], x_fusion[l-1])                     (Eq. 2)
    x_audio[l]  = Audio (x_audio[l-1], x_fusion[l-1])                     (Eq. 3)

State-dict keys and outputs are those of the authors' release. The unimodal blocks read the fusion tokens as a
prefix: their keys and values enter, their rows are not computed (rewrite R3).

Source: Mo & Morgado, CVPR 2024, https://arxiv.org/abs/2312.01017.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from timm.layers import PatchEmbed
from timm.models import vision_transformer
from torch import Tensor, nn

import avfkernels
from avfusion.common import setting

FUSIONS = ("factorized", "dense", "token", "none")


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of a `DeepAVFusion` encoder. The defaults are the paper's ViT-B with factorized interactions.

    Raises ValueError, naming the field, for a combination that cannot be built.
    """

    dim: int = setting(768, "width of the encoder's tokens")
    depth: int = setting(12, "its layers")
    num_heads: int = setting(12, "its heads")
    mlp_ratio: float = setting(4.0, "width of its blocks' MLPs, as a share of dim")
    patch_size: int = setting(16, "pixels, and mel bands x frames")
    image_size: tuple[int, int] = setting((224, 224), "height and width in pixels")
    audio_size: tuple[int, int] = setting((128, 192), "mel bands and frames, 64 frames a second")
    fusion: str = setting("factorized", "kind of fusion", choices=FUSIONS)
    fusion_layers: str = setting("all", "all, none, late (the last), mid (the last four) or layers such as 0-3-11")
    fusion_tokens: int = setting(16, "tokens that attend to interactions")
    image_agg_tokens: int = setting(8, "factorized: tokens that aggregate the image")
    audio_agg_tokens: int = setting(8, "factorized: tokens that aggregate the audio")
    fusion_attn_ratio: float = setting(0.25, "width of the fusion attention's queries and keys, as a share of dim")
    fusion_mlp_ratio: float = setting(1.0, "width of the fusion blocks' MLPs, as a share of dim")
    fusion_num_heads: int = setting(0, "heads of the fusion blocks (default: num_heads)")
    interaction: str = setting("sum", "dense: how two tokens of a pair combine", choices=("sum", "product"))
    drop_path: float = setting(0.0, "stochastic depth of the encoder, the same in every block")

    def __post_init__(self):
        # Lists come back from JSON.
        object.__setattr__(self, "image_size", tuple(self.image_size))
        object.__setattr__(self, "audio_size", tuple(self.audio_size))
        if self.fusion not in FUSIONS:
            raise ValueError(f"EncoderConfig: fusion must be one of {FUSIONS}, got {self.fusion!r}")
        if self.interaction not in ("sum", "product"):
            raise ValueError(f"EncoderConfig: interaction must be 'sum' or 'product', got {self.interaction!r}")
        if self.interaction == "product" and self.fusion != "dense":
            raise ValueError(f"EncoderConfig: interaction='product' belongs to fusion='dense', not {self.fusion!r}")
        for name in ("dim", "depth", "num_heads", "patch_size", "fusion_tokens", "image_agg_tokens",
                     "audio_agg_tokens"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"EncoderConfig: {name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.num_heads or self.dim % 4:
            raise ValueError(
                f"EncoderConfig: dim = {self.dim} must be a multiple of num_heads = {self.num_heads} and 4"
            )
        if self.fusion_num_heads < 0 or self.dim % self.heads_of_fusion:
            raise ValueError(f"EncoderConfig: dim = {self.dim} must be a multiple of fusion_num_heads = "
                             f"{self.fusion_num_heads}")  # fmt: skip
        for name in ("image_size", "audio_size"):
            size = getattr(self, name)
            if len(size) != 2 or any(side < self.patch_size or side % self.patch_size for side in size):
                raise ValueError(
                    f"EncoderConfig: {name} = {size} must be two multiples of patch_size {self.patch_size}"
                )
        self.layers_with_fusion  # noqa: B018  raises for a bad fusion_layers

    @property
    def heads_of_fusion(self) -> int:
        """Heads of the fusion blocks' attention."""
        return self.fusion_num_heads or self.num_heads

    @property
    def image_grid(self) -> tuple[int, int]:
        """Image patches, rows x columns."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def audio_grid(self) -> tuple[int, int]:
        """Spectrogram patches, mel bands x frames."""
        return self.audio_size[0] // self.patch_size, self.audio_size[1] // self.patch_size

    @property
    def num_fusion_tokens(self) -> int:
        """All tokens of the fusion branch; the aggregates count where there are any."""
        aggregates = self.image_agg_tokens + self.audio_agg_tokens if self.fusion == "factorized" else 0
        return self.fusion_tokens + aggregates

    @property
    def layers_with_fusion(self) -> tuple[int, ...]:
        """Indices of the layers that have a fusion block."""
        if self.fusion == "none" or self.fusion_layers == "none":
            return ()
        named = {"all": range(self.depth), "late": range(self.depth - 1, self.depth), "mid": range(self.depth)[-4:]}
        if self.fusion_layers in named:
            return tuple(named[self.fusion_layers])
        try:
            layers = sorted({int(layer) for layer in self.fusion_layers.split("-")})
        except ValueError:
            layers = [-1]
        if layers[0] < 0 or layers[-1] >= self.depth:
            raise ValueError(
                "EncoderConfig: fusion_layers must be 'all', 'none', 'late', 'mid' or layers such as '0-3-11', each "
                f"below depth = {self.depth}; got {self.fusion_layers!r}"
            )
        return tuple(layers)


def sincos_position_embedding(dim: int, grid: tuple[int, int]) -> Tensor:
    """The fixed 2-D sine-cosine embedding of MAE: [1, rows * columns, dim], the first half encodes the column."""
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = [position.flatten()[:, None] * omega for position in (columns, rows)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)[None].float()


def take(x: Tensor, ids: Tensor) -> Tensor:
    """x [B, n, D], ids [B, m] -> [B, m, D]."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class Block(vision_transformer.Block):
    """timm's pre-norm ViT block, which may also read a prefix of fusion tokens (R3)."""

    reads_prefix = True

    def __init__(self, config: EncoderConfig):
        super().__init__(
            config.dim, config.num_heads, config.mlp_ratio, qkv_bias=True, drop_path=config.drop_path,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]
        )  # fmt: skip

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x [B, N, D], prefix [B, P, D] -> the rows of x of the block over [prefix ; x]."""
        return avfkernels.read_prefix(self, x, prefix, whole=super().forward)


class ViT(nn.Module):
    """The unimodal branch: patches, fixed positions, blocks, final norm. No class token."""

    def __init__(self, config: EncoderConfig, size: tuple[int, int], channels: int):
        super().__init__()
        self.patch_embed = PatchEmbed(size, config.patch_size, channels, config.dim)
        self.register_buffer("pos_embed", sincos_position_embedding(config.dim, self.patch_embed.grid_size))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)

        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def embed(self, x: Tensor, ids_keep: Tensor | None) -> Tensor:
        """x [B, C, H, W], ids_keep [B, n] -> tokens [B, n or all patches, D], positions added."""
        if ids_keep is None or avfkernels.materialises():
            x = (self.patch_embed(x) + self.pos_embed).contiguous()  # a convolution's tokens lie feature by feature
            return x if ids_keep is None else take(x, ids_keep)
        # Hidden patches are not embedded: a convolution without overlap is a product with the patches that are kept.
        p, q = self.patch_embed.patch_size
        patches = take(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=q), ids_keep)
        proj = self.patch_embed.proj
        return F.linear(patches, proj.weight.flatten(1), proj.bias) + self.get_buffer("pos_embed")[0][ids_keep]


CARD = """---
{{ card_data }}
---

A [DeepAVFusion](https://arxiv.org/abs/2312.01017) encoder: a picture and three seconds of sound to image, audio and
fusion tokens.

```python
from avfusion import DeepAVFusion

model = DeepAVFusion.from_pretrained("{{ repo_id | default("ORG/NAME", true) }}")
features = model.embed("clip.mp4")  # x_image, x_audio, x_fusion [tokens, D], pooled [3, D]
```

Data, recipe, licence of the weights and results: [more information needed].
"""


class DeepAVFusion(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="avfusion",
    paper_url="https://arxiv.org/abs/2312.01017",
    pipeline_tag="feature-extraction",
    tags=["audio-visual", "video", "audio"],
    model_card_template=CARD,
):
    """The early-fusion encoder: an image and a spectrogram to image, audio and fusion tokens.

    `save_pretrained(folder)` writes config.json, model.safetensors and a model card; `push_to_hub("org/name")` uploads
    them; `from_pretrained(folder or "org/name")` reads them, every key checked, in evaluation mode.
    """

    def __init__(self, config: EncoderConfig | None = None):
        super().__init__()
        self.config = self._hub_mixin_config = config = config or EncoderConfig()
        self.image = ViT(config, config.image_size, channels=3)
        self.audio = ViT(config, config.audio_size, channels=1)
        self.fusion_tokens = nn.Parameter(torch.empty(1, config.num_fusion_tokens, config.dim))
        nn.init.normal_(self.fusion_tokens, std=0.02)
        self.fusion_blocks = nn.ModuleDict({str(i): self._fusion_block() for i in config.layers_with_fusion})
        self.fusion_norm = nn.LayerNorm(config.dim)  # eps 1e-5, unlike the ViTs
        # By torch.compile and CUDA graphs: None without gradients, on CUDA, once 200 clips of a shape have been seen;
        # True always, in training and on CPUs too; False never.
        self.compiled: bool | None = None
        self._captured, self._captured_embs = avfkernels.Captured(), avfkernels.Captured()

    @classmethod
    def _load_as_safetensor(cls, model, model_file, map_location, strict):
        return super()._load_as_safetensor(model, model_file, map_location, strict=True)  # no key is lost in silence

    def _fusion_block(self) -> nn.Module:
        c = self.config
        sizes = (c.dim, c.heads_of_fusion, c.fusion_attn_ratio, c.fusion_mlp_ratio)
        if c.fusion == "token":
            return avfkernels.TokenFusion(*sizes, drop_path=c.drop_path)
        if c.fusion == "dense":
            return avfkernels.DenseFusion(*sizes, interaction=c.interaction, drop_path=c.drop_path)
        split = (c.fusion_tokens, c.image_agg_tokens, c.audio_agg_tokens)
        return avfkernels.FactorizedFusion(*sizes, fusion_tkns=split, drop_path=c.drop_path)

    def forward(
        self,
        image: Tensor,
        audio: Tensor,
        image_ids_keep: Tensor | None = None,
        audio_ids_keep: Tensor | None = None,
        return_embs: bool = False,
    ):
        """Encodes a batch.

        Args:
            image: [B, 3, H, W], normalised by ImageNet's mean and deviation.
            audio: [B, 1, mels, frames], log10 mel power.
            image_ids_keep, audio_ids_keep: int64 [B, n], the patches that are visible (masked modelling); None: all.
            return_embs: also return the tokens after each layer.

        Returns:
            x_image [B, n_v, D], x_audio [B, n_a, D], x_fusion [B, F, D] after their final norms, and, if asked for, a
            list of the same three, before the norms, a layer.

        Raises ValueError, naming the argument, if a shape is not the configured one.
        """
        inputs = [x for x in (image, audio, image_ids_keep, audio_ids_keep) if x is not None]
        if self.compiled is False or len(inputs) == 3:
            return self._forward(image, audio, image_ids_keep, audio_ids_keep, return_embs=return_embs)
        after = 0 if self.compiled else None
        if not return_embs:
            return self._captured(self, self._forward, *inputs, after=after)
        out = self._captured_embs(self, self._with_embs, *inputs, after=after)
        return (*out[:3], [out[i : i + 3] for i in range(3, len(out), 3)])

    def _with_embs(self, *inputs, compiled: bool = False):
        *out, embs = self._forward(*inputs, return_embs=True, compiled=compiled)
        return (*out, *(x for layer in embs for x in layer))

    def _forward(
        self, image, audio, image_ids_keep=None, audio_ids_keep=None, *, return_embs: bool = False, compiled=False
    ):
        x_image, x_audio, x_fusion = self._embed(image, audio, image_ids_keep, audio_ids_keep)
        blocks = dict(self.fusion_blocks.items())
        fusion_blocks = [blocks.get(str(layer)) for layer in range(self.config.depth)]
        x_image, x_audio, x_fusion, embs = avfkernels.early_fusion(
            self.image.blocks, self.audio.blocks, fusion_blocks, x_image, x_audio, x_fusion,
            compiled=compiled or bool(self.compiled), return_embs=return_embs,
        )  # fmt: skip
        out = self.image.norm(x_image), self.audio.norm(x_audio), self.fusion_norm(x_fusion)
        return (*out, embs) if return_embs else out

    def _embed(self, image, audio, image_ids_keep, audio_ids_keep):
        for name, x, channels, size in (
            ("image", image, 3, self.config.image_size),
            ("audio", audio, 1, self.config.audio_size),
        ):
            if x.ndim != 4 or x.shape[0] != image.shape[0] or tuple(x.shape[1:]) != (channels, *size):
                raise ValueError(
                    f"DeepAVFusion: {name} must have shape [B, {channels}, {size[0]}, {size[1]}] "
                    f"(EncoderConfig.{name}_size) with one B for both, got {list(x.shape)}"
                )
        x_image, x_audio = self.image.embed(image, image_ids_keep), self.audio.embed(audio, audio_ids_keep)
        return x_image, x_audio, self.fusion_tokens.expand(image.shape[0], -1, -1)

    @torch.no_grad()
    def attention_maps(self, image: Tensor, audio: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """What the fusion tokens look at: layer -> (alpha [B, H, F, n_a], beta [B, H, F, n_v]).

        alpha is over audio patches and beta over image patches: the marginals of the attention over pairs, as
        `return_attention` of the fusion blocks gives them. Shapes of the inputs as in `forward`.
        """
        *_, embs = self.forward(image, audio, return_embs=True)
        inputs = [self._embed(image, audio, None, None), *embs]
        maps = {}
        for layer in self.config.layers_with_fusion:
            x_image, x_audio, x_fusion = inputs[layer]
            _, alpha, beta = self.fusion_blocks[str(layer)](x_fusion, x_image, x_audio, return_attention=True)
            maps[layer] = alpha, beta
        return maps

    @torch.no_grad()
    def graphed(self, *batch: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        """The forward pass at the shapes of this batch, compiled and recorded as a CUDA graph now, in evaluation mode.

        Takes what `forward` takes: image and audio and, if masked, the ids of the visible patches. Returns run(*batch)
        -> x_image, x_audio, x_fusion for further batches of these shapes, without gradients. Raises ValueError for
        other shapes, RuntimeError where there is no CUDA.
        """
        if not batch[0].is_cuda:
            found = "" if torch.cuda.is_available() else "; torch finds none"
            raise RuntimeError(f"graphed: CUDA graphs need the model and the batch on a CUDA device{found}")
        expected, captured = [list(x.shape) for x in batch], avfkernels.Captured()

        @torch.no_grad()
        def run(*batch: Tensor) -> tuple[Tensor, ...]:
            if (shapes := [list(x.shape) for x in batch]) != expected:
                raise ValueError(f"graphed: recorded for a batch of the shapes {expected}, got {shapes}")
            return captured(self, self._forward, *batch, after=0)

        run(*batch)
        return run

    @torch.no_grad()
    def embed(self, clip) -> dict[str, Tensor]:
        """The features of one video file: what `avfusion.embed_clips` finds for many.

        Returns `x_image`, `x_audio`, `x_fusion` [tokens, D] and `pooled` [3, D], their means, float32 on the CPU.

        Raises `ClipError` where the clip cannot be read.
        """
        from avfusion.media.reader import read_clip  # a model alone needs no video decoder
        from avfusion.media.transforms import preprocessing

        transform, mel, window = preprocessing(self.config.image_size, self.config.audio_size)
        found, weight = read_clip(clip, **window), self.fusion_tokens
        image = transform(found.frame)[None].to(weight.device, weight.dtype)
        audio = mel.to(weight.device)(found.waveform[None].to(weight.device)).to(weight.dtype)
        training = [(module, module.training) for module in self.modules()]
        try:
            x = [tokens[0].float().cpu() for tokens in self.eval()(image, audio)]
        finally:
            for module, mode in training:
                module.training = mode
        names = ("x_image", "x_audio", "x_fusion")
        return dict(zip(names, x, strict=True)) | {"pooled": torch.stack([tokens.mean(0) for tokens in x])}
