"""One cell of the study: an encoder is pre-trained (or not), and everything that is asked of it is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeClassifier
from sklearn.svm import SVC
from torch import Tensor, nn

from avfkernels import DenseFusion
from avfusion.metrics.localization import negative_audio_scores, universal_threshold
from avfusion.metrics.neighbours import leave_one_out_accuracy
from avfusion.metrics.retrieval import retrieval_scores
from avfusion.models.deepavfusion import DeepAVFusion, EncoderConfig
from avfusion.models.heads.classifier import MODALITIES, Classifier
from avfusion.models.heads.contrast import alone, info_nce, similarity
from avfusion.models.heads.localization import attention_map
from avfusion.models.mae import AVMAE
from avfusion.synth.timbres import RATE
from avfusion.training.optim import adamw, set_rate
from bench.study.world import CLASSES, FRAMES, MELS, PATCH, PATCHES, SIZE, Moments, inputs, spectrogram, world_of

BATCH = 64
PRETRAIN_EPOCHS, FINETUNE_EPOCHS = 10, 8
NEIGHBOURS = FINETUNED = ("class", "conjunction")
CONTRAST_EPOCHS = 12
RATES = {"pretrain": 1.5e-3, "finetune": 1e-3}


@dataclass(frozen=True)
class Cell:
    """What is varied. `epochs` of pre-training, 0: from scratch."""

    fusion: str = "dense"
    layers: str = "all"
    tokens: int = 16
    aggregates: int = 8
    interaction: str = "sum"
    residual: str = "normalised"
    image_mask: float = 0.75
    audio_mask: float = 0.8
    epochs: int = PRETRAIN_EPOCHS
    world: str = "mixed"
    seed: int = 0

    @property
    def name(self) -> str:
        """What differs from the default, and the seed."""
        changes = [f"{k}={v}" for k, v in asdict(self).items() if k != "seed" and v != getattr(Cell, k)]
        return f"{' '.join(changes) or 'default'}, seed {self.seed}"

    def encoder(self) -> DeepAVFusion:
        model = DeepAVFusion(EncoderConfig(
            dim=64, depth=4, num_heads=4, patch_size=PATCH, image_size=(SIZE, SIZE), audio_size=(MELS, FRAMES),
            fusion=self.fusion, fusion_layers=self.layers, fusion_tokens=self.tokens, image_agg_tokens=self.aggregates,
            audio_agg_tokens=self.aggregates, interaction=self.interaction,
        ))  # fmt: skip
        if self.residual == "plain":
            for name in model.fusion_blocks:
                model.fusion_blocks[name] = PlainResidual(64, 4)
        return model


class PlainResidual(DenseFusion):
    """A dense block whose residual is added to the tokens as they come: x + attn(LN(x)), as in other transformers."""

    def forward(self, x_fusion: Tensor, x_visual: Tensor, x_audio: Tensor, return_attention: bool = False):
        norm_visual, norm_audio = self.norms()
        out = self.attn(self.norm1_mm(x_fusion), norm_visual(x_visual), norm_audio(x_audio), return_attention,
                        None, None)  # fmt: skip
        out, *maps = out if return_attention else (out,)
        x = x_fusion + out
        x = x + self.mlp(self.norm2(x))
        return (x, *maps) if return_attention else x


def row_of(cell: Cell, cache: Path, device: str, share: float) -> dict:
    """The cell's row: its settings, scores by name, seconds; its world is one of `cache`, which may be made there."""
    return {"cell": asdict(cell)} | run(cell, world_of(cell.world, cell.seed, cache, share=share), torch.device(device))


def run(cell: Cell, world: dict[tuple[str, str], Moments], device: torch.device) -> dict:
    """Everything that is measured of a cell."""
    begun = time.perf_counter()
    torch.manual_seed(cell.seed)
    encoder = cell.encoder().to(device)
    encoder.compiled = False  # a cell is shorter than a compilation
    world = {key: moments.to(device) for key, moments in world.items()}
    found = pretrain(cell, encoder, world) if cell.epochs else {}
    times = {"pretrain": time.perf_counter() - begun}
    encoder.eval()
    tokens = {key: encode(encoder, moments) for key, moments in world.items() if key[1] != "pretrain"}
    found |= probes(tokens, world) | neighbours(tokens, world)
    times["probes"] = time.perf_counter() - begun
    if cell.world == "mixed":
        found |= localization(encoder, world)
        times["localization"] = time.perf_counter() - begun
        found |= finetune(cell, encoder, world)
    times["all"] = time.perf_counter() - begun
    return {"scores": found, "seconds": {name: round(t, 1) for name, t in times.items()}}


def batches(size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Rows of each step: the same for all cells of a seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(size, generator=generator)[: size // BATCH * BATCH].split(BATCH)


def kinds_of(world: Iterable[tuple[str, str]]) -> list[str]:
    return list(dict.fromkeys(kind for kind, _ in world))


def joined(world: dict[tuple[str, str], Moments], split: str, kinds: Iterable[str] = ()) -> Moments:
    """The moments of some kinds, or of all."""
    parts = [world[kind, split] for kind in kinds or kinds_of(world)]
    return Moments(*(torch.cat(column) for column in zip(*parts, strict=True)))


def train(model: nn.Module, losses: Callable[[Tensor], Tensor], size: int, epochs: int, rate: float, seed: int) -> None:
    """Steps of AdamW, whose rate is warmed up and then falls by a cosine; `losses` is of the rows of a step."""
    optimizer = adamw(model, weight_decay=0.05, betas=(0.9, 0.95))
    steps = size // BATCH * epochs
    for step, rows in enumerate(batches(size, epochs, seed)):
        set_rate(optimizer, rate, step, steps, steps // 10)
        loss = losses(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def pretrain(cell: Cell, encoder: DeepAVFusion, world: dict[tuple[str, str], Moments]) -> dict[str, float]:
    """Masked pre-training; masks are the same for all cells of a seed whose ratios are."""
    model = AVMAE(encoder, 48, 1, 4, cell.image_mask, cell.audio_mask).to(encoder.fusion_tokens.device).train()
    pool, device = joined(world, "pretrain"), encoder.fusion_tokens.device
    masks = torch.Generator().manual_seed(cell.seed)

    def losses(rows: Tensor) -> Tensor:
        noise = (torch.rand(len(rows), n, generator=masks).to(device) for n in PATCHES)
        image_loss, audio_loss, *_ = model(*inputs(pool.take(rows.to(device))), *noise, predict=False)
        return image_loss + audio_loss

    train(model, losses, len(pool.image), cell.epochs, RATES["pretrain"], cell.seed)
    with torch.no_grad():
        held, generator = joined(world, "val"), torch.Generator().manual_seed(1)
        noise = (torch.rand(len(held.image), n, generator=generator).to(device) for n in PATCHES)
        image_loss, audio_loss, *_ = model.eval()(*inputs(held), *noise, predict=False)
    return {"loss image": image_loss.item(), "loss audio": audio_loss.item()}


@torch.no_grad()
def encode(encoder: DeepAVFusion, moments: Moments) -> dict[str, Tensor]:
    """Tokens of moments, on the CPU: image, audio and fusion [N, tokens, D]."""
    parts = [encoder(*inputs(moments.take(slice(i, i + 256)))) for i in range(0, len(moments.image), 256)]
    return {name: torch.cat(x).cpu() for name, x in zip(MODALITIES, zip(*parts, strict=True), strict=True)}


Tokens = dict[tuple[str, str], dict[str, Tensor]]  # by kind and split, by modality
READ = {"image": ("image",), "audio": ("audio",), "fusion": ("fusion",), "image+audio": ("image", "audio"),
        "all": MODALITIES}  # fmt: skip


def probes(tokens: Tokens, world: dict[tuple[str, str], Moments]) -> dict[str, float]:
    """Test accuracy of readers of frozen features; the validation split chooses how much they are regularised.

    "probe": a linear reader of the tokens' mean, as the paper probes. "linear" and "kernel": of all tokens side by
    side, which also tell where and when; only the second can find what no sum tells.
    """
    found = {}
    for kind in kinds_of(world):
        labels = {split: world[kind, split].label.cpu().numpy() for split in ("train", "val", "test")}
        for name, parts in READ.items():
            pooled, whole = {}, {}
            for split in labels:
                each = [tokens[kind, split][part] for part in parts]
                pooled[split] = torch.cat([F.normalize(x.mean(1), dim=-1) for x in each], 1)
                whole[split] = torch.cat([x.flatten(1) for x in each], 1)
            found[f"probe {kind} {name}"] = read(pooled, labels, kernel=False)
            if kind != "class":
                found[f"linear {kind} {name}"] = read(whole, labels, kernel=False)
                found[f"kernel {kind} {name}"] = read(whole, labels, kernel=True)
    return found


def read(features: dict[str, Tensor], labels: dict[str, np.ndarray], *, kernel: bool) -> float:
    mean, deviation = features["train"].mean(0), features["train"].std(0) + 1e-6
    x = {split: (f - mean) / deviation for split, f in features.items()}
    if kernel:  # SVC(kernel="rbf", gamma="scale") by its matrices, which PyTorch makes faster
        x = {split: torch.exp(-torch.cdist(f, x["train"]).square() / f.shape[1]) for split, f in x.items()}
    x = {split: f.numpy() for split, f in x.items()}
    if kernel:
        ways = [SVC(C=c, kernel="precomputed") for c in (1, 10)]
    else:
        ways = [RidgeClassifier(alpha) for alpha in (10, 100, 1000)]
    best = max(ways, key=lambda way: way.fit(x["train"], labels["train"]).score(x["val"], labels["val"]))
    return float(best.score(x["test"], labels["test"]))


def pooled(tokens: dict[str, Tensor]) -> dict[str, Tensor]:
    """Features for neighbours: means of the tokens, and other ways to pool those of fusion."""
    mean = {name: x.mean(1) for name, x in tokens.items()}
    length = {name: F.normalize(x, dim=-1) for name, x in mean.items()}
    return mean | {
        "image+audio": torch.cat([length["image"], length["audio"]], 1),
        "all": torch.cat(list(length.values()), 1),
        "fusion, all tokens": tokens["fusion"].flatten(1),
        "fusion, maximum": tokens["fusion"].amax(1),
    }


def neighbours(tokens: Tokens, world: dict[tuple[str, str], Moments]) -> dict[str, float]:
    """Leave-one-out neighbours of the test split (Fig. 3), by labels that need one modality, and both.

    Features are compared as they are, and each divided by its deviation over the training split ("scaled").
    """
    found = {}
    for kind in (kind for kind in kinds_of(world) if kind in NEIGHBOURS):
        moments = world[kind, "test"].to(torch.device("cpu"))
        labels = {kind: moments.label}
        if kind == "conjunction":
            labels |= {"look": moments.look, "timbre": moments.timbre, "pair": moments.look * 16 + moments.timbre}
        bases = pooled(tokens[kind, "train"])
        for name, x in pooled(tokens[kind, "test"]).items():
            base = bases[name]
            scaled = (x - base.mean(0)) / (base.std(0) + 1e-6)
            for label, y in labels.items():
                found[f"neighbour {label} {name}"] = leave_one_out_accuracy(x, y)
                found[f"neighbour {label} {name}, scaled"] = leave_one_out_accuracy(scaled, y)
    return found


def finetune(cell: Cell, encoder: DeepAVFusion, world: dict[tuple[str, str], Moments]) -> dict[str, float]:
    """Test accuracy of all weights trained on the labels of two kinds at once, each with classes of its own.

    Of synchrony no encoder of this size learns more from these labels than its training split by heart.
    """
    device = encoder.fusion_tokens.device
    model = Classifier(encoder, sum(CLASSES[kind] for kind in FINETUNED), freeze_encoder=False).to(device).train()
    first = CLASSES[FINETUNED[0]]
    own = dict(zip(FINETUNED, ((0, first), (first, first + CLASSES[FINETUNED[1]])), strict=True))
    pool = joined(world, "train", FINETUNED)
    kinds = torch.cat([torch.full_like(world[kind, "train"].label, n) for n, kind in enumerate(FINETUNED)])

    def losses(rows: Tensor) -> Tensor:
        rows = rows.to(device)
        logits, loss = model(*inputs(pool.take(rows)), average=True), 0
        for number, (low, high) in enumerate(own.values()):
            chosen = kinds[rows] == number
            loss = loss + F.cross_entropy(logits[chosen, low:high], pool.label[rows][chosen].long(), reduction="sum")
        return loss / len(rows)

    train(model, losses, len(pool.label), FINETUNE_EPOCHS, RATES["finetune"], cell.seed)
    found = {}
    model.eval()
    for kind, (low, high) in own.items():
        moments = world[kind, "test"]
        with torch.no_grad():
            logits = [x[:, low:high] for x in model(*inputs(moments))]
        for name, x in {"mean": torch.stack(logits).mean(0), **dict(zip(MODALITIES, logits, strict=True))}.items():
            found[f"finetune {kind} {name}"] = (x.argmax(1) == moments.label).float().mean().item()
    return found


def localization(encoder: DeepAVFusion, world: dict[tuple[str, str], Moments]) -> dict[str, float]:
    """Which of two objects sounds, whose picture goes with a sound, and what happens where nothing seen sounds.

    Two linear maps of frozen tokens are trained as the retrieval task trains an encoder: each modality alone, no
    labels. "pointing": how often the map is higher, on average, on the object that sounds than on the silent one.
    """
    device, kind = encoder.fusion_tokens.device, "class"
    found, tokens = {}, {split: alone_tokens(encoder, world[kind, split]) for split in ("pretrain", "val", "test")}
    heads = nn.ModuleList(nn.Linear(encoder.config.dim, 32) for _ in range(2)).to(device)
    optimizer = torch.optim.Adam(heads.parameters(), 3e-3)
    patches, sounds = tokens["pretrain"]

    def embed(patches: Tensor, sounds: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(heads[0](patches), dim=-1), F.normalize(heads[1](sounds), dim=-1)

    for rows in batches(len(sounds), CONTRAST_EPOCHS, 0):
        loss = info_nce(similarity(*embed(patches[rows.to(device)], sounds[rows.to(device)])), 0.07)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        maps = {}
        for split in ("val", "test"):
            moments = world[kind, split]
            for name, audio in negatives(moments).items():
                _, heard = alone_tokens(encoder, moments._replace(audio=audio))
                seen, heard = embed(tokens[split][0], heard)
                maps[split, name] = torch.einsum("bpd,bd->bp", seen, heard)
        seen, heard = embed(*tokens["test"])
        scores = retrieval_scores(heard.cpu(), seen.mean(1).cpu())
        found["pointing contrast"] = pointing(maps["test", "own"], world[kind, "test"])
        found["recall@10"] = (scores["audio_to_image_recall@10"] + scores["image_to_audio_recall@10"]) / 2
        for name in ("silence", "noise", "off-screen"):
            threshold = universal_threshold(maps["val", "own"], maps["val", name])
            scored = negative_audio_scores(maps["test", "own"], maps["test", name], threshold)
            found |= {f"{score} {name}": value for score, value in scored.items()}
        if encoder.config.layers_with_fusion:
            moments = world[kind, "test"]
            found["pointing attention"] = pointing(attention_map(encoder, *inputs(moments)).flatten(1), moments)
    return found


@torch.no_grad()
def alone_tokens(encoder: DeepAVFusion, moments: Moments) -> tuple[Tensor, Tensor]:
    """Image tokens [N, 36, D] and the mean audio token [N, D], each modality encoded without the other."""
    image, audio = inputs(moments)
    return alone(encoder.image, image), alone(encoder.audio, audio).mean(1)


def negatives(moments: Moments) -> dict[str, Tensor]:
    """The moments' own sounds, and three that nothing in the picture makes: [N, 1, 32, 64] each."""
    rng, device = np.random.default_rng(0), moments.audio.device
    waves = [(rng.standard_normal(RATE) * 32767 * rng.uniform(0.03, 0.12)).astype(np.int16) for _ in moments.audio]
    noise = torch.stack([spectrogram(wave) for wave in waves])
    strangers = []
    for look, other in zip(moments.look, moments.other, strict=True):
        rows = ((moments.timbre != look) & (moments.timbre != other)).nonzero().flatten().tolist()
        strangers.append(int(rng.choice(rows)))
    silence = spectrogram(np.zeros(RATE, np.int16)).to(device).expand_as(moments.audio)
    return {"own": moments.audio, "silence": silence, "noise": noise.to(device),
            "off-screen": moments.audio[strangers]}  # fmt: skip


def pointing(maps: Tensor, moments: Moments) -> float:
    """How often maps [N, 36] are higher on what sounds; moments whose silent object is hidden do not count."""
    means = []
    for cover in (moments.sounding, moments.silent):
        weight = cover.float()
        means.append((maps * weight).sum(1) / weight.sum(1))
    seen = means[0].isfinite() & means[1].isfinite()
    return (means[0] > means[1])[seen].float().mean().item()
