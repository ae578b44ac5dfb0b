"""The encoder of a pre-training run as one file: for `load_encoder`, or to be resumed by the authors' trainer."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from avfusion.files import writing
from avfusion.models.checkpoint import load_encoder, save_encoder
from avfusion.training.run_folder import latest_checkpoint

# Of a fresh torch.cuda.amp.GradScaler, which their trainer resumes, too.
SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}


def export(run: Path, out: Path | None = None, *, authors: bool = False) -> tuple[Path, int]:
    """Write the encoder of a run's last checkpoint to one file; returns the file and the step.

    The file is safetensors for `load_encoder`, or, for `authors`, a torch file in their checkpoint format, which
    `load_encoder` reads too: all weights, the decoders' too, under `state_dict`, the finished epochs and the steps, and
    the encoder's `config`; of a pre-training run also the moments of AdamW and a gradient scaler as it begins, so that
    their trainer resumes it as `checkpoint_latest.pth`. The default name is RUN/encoder.safetensors or RUN/encoder.pth.

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
    facts, weights = json.loads((run / "run.json").read_text()), load_file(last / "model.safetensors")
    settings = facts["settings"]
    content = {
        "state_dict": weights,
        "n_steps": torch.tensor([step]),
        "epoch": step // (facts["data"]["clips"] // settings["batch_size"]),
        "config": json.dumps(asdict(encoder.config)),
    }
    if facts["task"] == "pretrain":
        moments = torch.load(last / "state.pt", map_location="cpu", weights_only=True)["optimizer"]
        started = [f"encoder.{name}." for name in ("image", "audio") if settings[f"{name}_weights"]]
        content |= {"optimizer": released_moments(moments, weights, started), "scaler": SCALER}
    with writing(out) as part, open(part, "wb") as file:  # by its name, torch would call a folder inside by it
        torch.save(content, file)
    return out, step


def released_moments(
    moments: dict[str, Any], weights: Mapping[str, Tensor], pretrained: Iterable[str]
) -> dict[str, Any]:
    """The state of AdamW by names of weights -> by numbers, in the release's groups and their order.

    That is: weights without decay (vectors) and with it; then, of each ViT that started from pre-trained weights,
    likewise. `pretrained` are the prefixes of these.
    """
    found = [(name, group) for group in moments["param_groups"] for name in group["params"]]
    found.sort(key=lambda pair: _released_order(pair[0]))
    pretrained, groups, state = list(pretrained), [], {}
    for part in (None, *pretrained):
        for decays in (False, True):
            members = [
                (name, group) for name, group in found
                if (weights[name].ndim > 1) == decays
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
