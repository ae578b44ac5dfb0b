"""The encoder of a pre-training run as one file: for `load_encoder`, or to be resumed by the authors' trainer."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from avfusion.common import writing
from avfusion.models.checkpoint import load_encoder, save_encoder
from avfusion.training.run_folder import latest_checkpoint

# Of a fresh torch.cuda.amp.GradScaler, which their trainer resumes, too.
SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}


def export(run: Path, out: Path | None = None, *, authors: bool = False) -> tuple[Path, int]:
    """Write the encoder of a run's last checkpoint to one file; returns the file and the step.

    The file is safetensors for `load_encoder`, or, for `authors`, a torch file in their checkpoint format, which
    `load_encoder` reads too and their trainer resumes as `checkpoint_latest.pth`: all weights, the decoders' too, under
    `state_dict`, the moments of AdamW, a gradient scaler as it begins, the finished epochs and the steps, and the
    encoder's `config`. The default name is RUN/encoder.safetensors or RUN/encoder.pth.

    Raises ValueError where there is no checkpoint, or `out` has the suffix of the other format.
    """
    last = latest_checkpoint(run)
    if last is None:
        raise ValueError(f"{run}: no checkpoint of a pre-training run in it")
    step, suffix = int(last.name.removeprefix("step-")), ".pth" if authors else ".safetensors"
    out = out or run / f"encoder{suffix}"
    if (out.suffix == ".safetensors") == authors:
        raise ValueError(f"{out}: expected a name in {suffix}, which tells readers the format")
    encoder = load_encoder(last / "model.safetensors")
    if not authors:
        save_encoder(encoder, out)
        return out, step
    clips, settings = (json.loads((run / "run.json").read_text())[k] for k in ("data", "settings"))
    weights = load_file(last / "model.safetensors")
    moments = torch.load(last / "state.pt", map_location="cpu", weights_only=True)["optimizer"]
    started = [f"encoder.{name}." for name in ("image", "audio") if settings.get(f"{name}_weights")]
    content = {
        "state_dict": weights,
        "n_steps": torch.tensor([step]),
        "optimizer": released_moments(moments, started),
        "scaler": SCALER,
        "epoch": step // (clips["clips"] // settings["batch_size"]),
        "config": json.dumps(asdict(encoder.config)),
    }
    with writing(out) as part:
        torch.save(content, part)
    return out, step


def released_moments(moments: dict[str, Any], pretrained: Iterable[str]) -> dict[str, Any]:
    """The state of AdamW by names of weights -> by numbers, in the release's groups and their order.

    That is: weights without decay and with it; then, of each ViT that started from pre-trained weights, likewise.
    """
    found = [(name, group) for group in moments["param_groups"] for name in group["params"]]
    found.sort(key=lambda pair: _released_order(pair[0]))
    pretrained, groups, state = list(pretrained), [], {}
    for part in (None, *pretrained):
        for decays in (False, True):
            members = [
                (name, group) for name, group in found
                if bool(group["weight_decay"]) == decays
                and next((p for p in pretrained if name.startswith(p)), None) == part
            ]  # fmt: skip
            numbers = range(len(state), len(state) + len(members))
            state |= {number: moments["state"][name] for number, (name, _) in zip(numbers, members, strict=True)}
            options = dict(members[0][1] if members else found[0][1])
            options |= {"lr": float(options["lr"]), "fused": None, "foreach": None, "capturable": False}
            groups.append(options | {"params": list(numbers), "pretrained": part is not None})
    return {"state": state, "param_groups": groups}


def _released_order(name: str) -> int:
    """Where their model registers a weight: its own before the encoder's, then the decoders', the sound's first."""
    own = name.endswith(("decoder_mask_token", "decoder_pos_embed"))
    return ("audio_", "image_").index(name[:6]) + (0 if own else 3) if not name.startswith("encoder.") else 2
