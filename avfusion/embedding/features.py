"""Features in memory, to and from files."""

import csv
import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avfusion.embedding.store import DTYPES, FORMAT, POOLED, TOKENS, Rows, read_manifest, read_rows, shards, write_rows
from avfusion.files import writing
from avfusion.media.clip import ClipError
from avfusion.models.deepavfusion import DeepAVFusion


@dataclass
class Features:
    """Features of N windows, float32 on the CPU. Rows are in the order of files, and of times in each."""

    pooled: Tensor  # [N, 3, D]: means over the image, the audio and the fusion tokens
    clips: list[str]  # the file of each row
    starts: list[float]  # where each row's window begins, in seconds
    ends: list[float]
    frame_times: list[float]
    failed: list[ClipError] = field(default_factory=list)  # files that could not be read, or not to their ends
    config: dict = field(default_factory=dict)  # of the model
    checkpoint: str | None = None  # as it was given to `avfusion embed`; None: not told
    weights: str | None = None  # the `fingerprint` of the model; None: not known
    x_image: Tensor | None = None  # [N, image patches, D]; None: means alone were kept
    x_audio: Tensor | None = None  # [N, audio patches, D]
    x_fusion: Tensor | None = None  # [N, fusion tokens, D]

    def tensors(self) -> dict[str, Tensor]:
        """`pooled` and, where all tokens are there, `x_image`, `x_audio`, `x_fusion`, by name."""
        found = {name: getattr(self, name) for name in (*TOKENS, "pooled")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def of(cls, rows: Sequence[Rows], made: dict, files: Sequence[str] | None = None) -> "Features":
        """Rows of an `Embedder`, made with a model of which `made` tells the facts; `files` is their order.

        Rows that stand for what could not be read become `failed`.
        """
        found = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]} if rows else {}
        failed = [ClipError(*args) for args in made.get("failed", [])]
        if "reason" in found:
            bad = np.flatnonzero(found["reason"] != "")
            failed += [ClipError(*(found[name][row] for name in ("file", "stream", "reason"))) for row in bad]
            found = {name: np.delete(x, bad, 0) for name, x in found.items()}
        facts: dict[str, Any] = {name: made.get(name) for name in ("config", "checkpoint", "weights")}
        if not found or not len(found["file"]):
            width = (facts["config"] or {}).get("dim", 0)
            return cls(torch.empty(0, 3, width), [], [], [], [], failed, **facts)
        names = found["file"].tolist()
        place = {name: number for number, name in enumerate(files if files is not None else sorted(set(names)))}
        moments = found.get("frame_time", found["start"])
        order = sorted(range(len(names)), key=lambda row: (place[names[row]], found["start"][row], moments[row]))
        if files is not None:
            failed.sort(key=lambda error: place.get(error.path, -1))
        found = {name: x[order] for name, x in found.items()}
        unknown = np.full(len(names), np.nan)
        clips, starts, ends, times = (
            found.get(name, unknown).tolist() for name in ("file", "start", "end", "frame_time")
        )
        tokens: dict[str, Any] = {name: torch.from_numpy(found[name]) for name in TOKENS if name in found}
        pooled = np.stack([found[name] for name in POOLED], 1)
        return cls(torch.from_numpy(pooled), clips, starts, ends, times, failed, **facts, **tokens)

    def save(self, path: str | os.PathLike, dtype: str = "fp32") -> None:
        """Write a file: .parquet, .safetensors, or .npy, which is `pooled` alone, beside a .csv of its rows.

        `dtype` is one of fp32, fp16 and, in safetensors, bf16. Files appear as a whole or not at all. Raises ValueError
        for other suffixes and where there is no row, StoreError where the file cannot be written.
        """
        path = os.fspath(path)
        if not self.clips:
            raise ValueError(f"{path}: not written, since no clip could be read")
        if not path.endswith((".parquet", ".safetensors", ".npy")):
            raise ValueError(f"{path}: expected a name in .parquet, .safetensors or .npy")
        facts = {"file": np.array(self.clips, object), "start": np.array(self.starts), "end": np.array(self.ends),
                 "frame_time": np.array(self.frame_times)}  # fmt: skip
        if path.endswith(".npy"):
            with writing(path) as part, open(part, "wb") as file:
                np.save(file, self.pooled.to(DTYPES[dtype]).numpy())
            _write_csv(path.removesuffix(".npy") + ".csv", facts)
            return
        made = {"format": FORMAT, "stored": dtype, "config": self.config, "checkpoint": self.checkpoint,
                "weights": self.weights, "failed": [error.args for error in self.failed]}  # fmt: skip
        pooled = dict(zip(POOLED, self.pooled.numpy().swapaxes(0, 1), strict=True))
        tokens = {name: x.numpy() for name, x in self.tensors().items() if name in TOKENS}
        write_rows(path, facts | pooled | tokens, made)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Features":
        """Read a file that `save`, or a folder that `avfusion embed`, wrote. Raises StoreError."""
        found = [read_rows(shard) for shard in shards(path)]
        made = dict(found[0][1])
        if (manifest := read_manifest(path)) is not None:
            made |= {"failed": manifest.get("failed", [])}
        return cls.of([rows for rows, _ in found], made)


def _write_csv(path: str, columns: Rows) -> None:
    with writing(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(x.tolist() for x in columns.values()), strict=True))


def facts_of(model: DeepAVFusion) -> dict:
    """What features of a model say of it: its `config`, and its `weights`."""
    return {"config": asdict(model.config), "weights": fingerprint(model)}


def fingerprint(model: DeepAVFusion) -> str:
    """Tells encoders apart: a hash of the parameters that lie outside the layers, rounded to bfloat16."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "blocks." not in name:
            digest.update(parameter.detach().cpu().bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
