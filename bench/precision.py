"""How far bfloat16 is from float32 on this CPU: `python -m bench.precision CLIP... [--run RUN --data SET]`.

Pooled features of windows of the clips, four a second, by ViT-B encoders with random weights and by the encoder of RUN,
a fine-tuned recognition run such as `avfusion finetune train tiny` leaves; and how often RUN says the same class of its
evaluation clips. autocast is what `--dtype bf16` does, cast is `model.to(torch.bfloat16)`. Writes
bench/results/precision-<cpu>.json and .md.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from avfusion import DeepAVFusion, EncoderConfig
from avfusion.embedding.embed import Embedder
from avfusion.embedding.features import POOLED
from avfusion.tasks.downstream import evaluate_run, load_run
from bench import measure, report

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")


def pooled(model: DeepAVFusion, clips: list[Path], dtype: torch.dtype | None = None) -> Tensor:
    """[windows, 3, D]: means over image, audio and fusion tokens."""
    rows = Embedder(model, windows={"every": 0.25}, dtype=dtype)({"file": list(map(str, clips))})
    if failed := [f"{file}: {reason}" for file, reason in zip(rows["file"], rows["reason"], strict=True) if reason]:
        raise SystemExit("\n".join(failed))
    return torch.stack([torch.from_numpy(rows[name]) for name in POOLED], 1)


def features(name: str, model: DeepAVFusion, clips: list[Path]) -> list[dict]:
    exact = pooled(model, clips)
    ways = {"autocast": pooled(model, clips, torch.bfloat16), "cast": pooled(deepcopy(model).bfloat16(), clips)}
    rows = []
    for way, found in ways.items():
        cosine = F.cosine_similarity(found, exact, dim=-1)
        error = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
        rows += [
            {"encoder": name, "way": way, "features": kind, "windows": len(exact),
             "smallest cosine": cosine[:, i].min().item(), "mean cosine": cosine[:, i].mean().item(),
             "largest relative error": error[:, i].max().item()}
            for i, kind in enumerate(POOLED)
        ]  # fmt: skip
    return rows


def agreement(run: Path, changes: dict) -> dict:
    """Of a recognition run: accuracy in both dtypes, and the share of clips of which both say the same class."""
    said, scores = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as folder:
            name = str(dtype).removeprefix("torch.")
            scores[name] = evaluate_run(run, "finetune", Path(folder), device=CPU, dtype=dtype, **changes)["top-1"]
            with open(Path(folder) / "samples.csv", newline="") as file:
                said[name] = [row["predicted"] for row in csv.DictReader(file)]
    same = [a == b for a, b in zip(*said.values(), strict=True)]
    return {"clips": len(same), "same class": sum(same) / len(same), "top-1": scores}


def text(results: dict) -> str:
    rows, made = results["rows"], results["environment"]
    shown = [[row[name] if isinstance(row[name], str) else f"{row[name]:.6g}" for name in row] for row in rows]
    columns = [[name, *cells] for name, cells in zip(rows[0], zip(*shown, strict=True), strict=True)]
    parts = [
        f"# bfloat16 against float32: {results['device']}",
        "Pooled features; autocast is `--dtype bf16`, cast is `model.to(torch.bfloat16)`.",
        report.aligned(columns).rstrip(),
    ]
    if found := results.get("agreement"):
        scores = ", ".join(f"{score:.1%} in {dtype}" for dtype, score in found["top-1"].items())
        same = f"{found['same class']:.1%} of {found['clips']} evaluation clips are given the same class by the run"
        parts.append(f"{same}; top-1 {scores}.")
    parts.append(
        f"Made by `{results['command']}` on {made['date'][:10]}, commit {made['commit']}; clips: "
        f"{', '.join(results['clips'])}; torch {made['versions']['torch']}."
    )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, nargs="+", metavar="CLIP", help="video files")
    parser.add_argument("--run", type=Path, help="a fine-tuned recognition run")
    parser.add_argument("--data", type=Path, help="the data set it is evaluated on (default: where the run has it)")
    args = parser.parse_args()
    rows, device = [], measure.device_name(CPU)
    for fusion in ("none", "dense", "factorized"):
        torch.manual_seed(0)
        rows += features(f"ViT-B, {fusion}", DeepAVFusion(EncoderConfig(fusion=fusion)).eval(), args.clips)
    given = " ".join(["CLIP...", *["--run RUN --data SET"] * bool(args.run)])
    results = {"device": device, "command": f"python -m bench.precision {given}", "clips": [p.name for p in args.clips],
               "environment": measure.environment(CPU), "rows": rows}  # fmt: skip
    if args.run:
        rows += features("the run's", load_run(args.run, "finetune")[1].encoder.eval(), args.clips)
        results["agreement"] = agreement(args.run, {"eval_data": str(args.data.absolute())} if args.data else {})
    path = RESULTS / f"precision-{measure.slug(device)}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(text(results))
    print(text(results))


if __name__ == "__main__":
    main()
