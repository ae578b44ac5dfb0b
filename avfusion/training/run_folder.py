"""The folder of a training run: what it was made with, its checkpoints, what it skipped, its curve.

run.json                        settings, code, data
checkpoints/step-00001200/      model.safetensors; state.pt: optimizer, place in the data, generators; manifest.json:
                                the digests of both
log.jsonl                       losses and speed on the way; that it runs, ended, or why it failed
skipped.jsonl                   steps whose loss or gradient was not finite
evaluations.csv                 what evaluations on the way have found
run.html                        all of that as a page, with the best and the worst clips
"""

import csv
import json
import os
import platform
import re
import shutil
import subprocess
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError

import safetensors
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import avfkernels
from avfusion import distributed
from avfusion.common import why
from avfusion.data.loader import ClipLoader, multi_label
from avfusion.data.samples import Source
from avfusion.files import append_lines, read_json, save_tensors, sha256, write_json, writing
from avfusion.training.runs import read_evaluations
from avfusion.training.task import Task

FILES, MANIFEST = ("model.safetensors", "state.pt"), "manifest.json"  # of a checkpoint
NAMED = 8  # clips that an error message names
# Of an optimizer's groups: how this process computes, and no part of a run.
HOW = ("lr", "fused", "foreach", "capturable", "differentiable", "maximize")


@dataclass
class Curve:
    """What evaluations on the way have found: RUN/evaluations.csv, a line each."""

    out: Path
    rows: list[dict[str, float]]

    @classmethod
    def resume(cls, out: Path, step: int) -> "Curve":
        """For a run that stands at `step`: lines that are there from later steps are dropped."""
        return cls(out, [row for row in read_evaluations(out) if row["step"] <= step])

    def has(self, step: int) -> bool:
        return any(row["step"] == step for row in self.rows)

    def add(self, step: int, epoch: float, found: dict[str, float]) -> None:
        if found:
            self.rows = [row for row in self.rows if row["step"] != step]
            self.rows.append({"step": step, "epoch": epoch} | found)
            write_csv(self.out / "evaluations.csv", self.rows)


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows, which all have the keys of the first; the file is there as a whole or not at all."""
    with writing(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


class RunError(RuntimeError):
    """A run that cannot go on; the message names the step, the clips or the file, and the last good checkpoint."""


def write_run(out: Path, task: Task, source: Source, processes: int, step: int) -> None:
    """Write run.json: settings, the hash of the list of clips, and what code has run since which step."""
    path = out / "run.json"
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"] if step else []
    code = {"avfusion": avfkernels.__version__, "git": _git_version(), "torch": torch.__version__,
            "python": platform.python_version()}  # fmt: skip
    facts = {
        "task": task.name,
        "settings": task.config.flat(),
        "data": {"clips": len(source.rows), "sha256": source.sha256, "classes": list(source.classes),
                 "multi_label": multi_label(source)},
        "parts": [*parts, {"step": step, "processes": processes, "code": code}],
    }  # fmt: skip
    write_json(path, facts, indent=1)


def _git_version() -> str | None:
    """The commit that the package is checked out at, "-dirty" where files differ; None where it is installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def checkpoints(out: Path) -> list[Path]:
    """The folders of a run's checkpoints, the last one last. They appear under these names when they are complete."""
    return sorted(path for path in out.glob("checkpoints/step-*") if re.fullmatch(r"step-\d{8}", path.name))


def latest_checkpoint(out: Path, *, aside: bool = False) -> Path | None:
    """The last checkpoint of a run whose files are what was written; None where the run has none at all.

    Each after it is named in a warning and, if it is to be put `aside`, renamed to damaged-step-00001200. Raises
    ValueError where none is whole.
    """
    found, damaged = checkpoints(out), []
    for path in reversed(found):
        if not (wrong := damage(path)):
            for other, what in damaged:
                kept = f", kept as {_put_aside(other).name}" if aside else ""
                warnings.warn(f"{other}: damaged ({what}){kept}; {path.name} is taken", stacklevel=2)
            return path
        damaged.append((path, wrong))
    if damaged:
        told = "; ".join(f"{path.name}: {what}" for path, what in damaged)
        raise ValueError(f"{out}: none of its checkpoints is whole ({told}): copy one back from elsewhere, or begin "
                         "anew with another --out")  # fmt: skip
    return None


def last_of(out: Path) -> str:
    """The last checkpoint's name for a message, unchecked."""
    return str(max(checkpoints(out), default="none"))


def damage(checkpoint: Path) -> str:
    """What is wrong with the files of a checkpoint by its manifest; nothing where all is well."""
    for name in FILES:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    if not (checkpoint / MANIFEST).exists():  # of a version before 0.2
        return ""
    try:
        for name, digest in read_json(checkpoint / MANIFEST)["sha256"].items():
            if sha256(checkpoint / name) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return why(error)
    return ""


def _put_aside(checkpoint: Path) -> Path:
    path, number = checkpoint.with_name(f"damaged-{checkpoint.name}"), 1
    while path.exists():
        path, number = path.with_name(f"damaged-{checkpoint.name}-{number + 1}"), number + 1
    return checkpoint.rename(path)


def save_checkpoint(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: ClipLoader,
    device: torch.device,
    keep: int,
    step: int,
    bad: int,
) -> None:
    """Write a checkpoint that is there as a whole or not at all, and remove all but the last `keep`.

    Every process has to call it. Raises RunError, naming the checkpoint before, where it cannot be written.
    """  # fmt: skip
    generators = distributed.gather([_generators(device)])
    weights, moments = get_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    path = out / "checkpoints" / f"step-{step:08d}"
    if not distributed.rank() and not path.exists():
        part = path.with_name(f".{path.name}.part")
        state = {"step": step, "bad": bad, "loader": loader.state_dict(), "generators": generators,
                 "optimizer": moments}  # fmt: skip
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            save_tensors(part / FILES[0], weights, {"config": json.dumps(asdict(model.encoder.config))})
            with open(part / FILES[1], "wb") as file:  # to a name, torch would not say why it cannot write
                torch.save(state, file)
            write_json(part / MANIFEST, {"sha256": {name: sha256(part / name) for name in FILES}})
            for file in part.iterdir():  # on the disk before the name is
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
            os.replace(part, path)
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            shutil.rmtree(part, ignore_errors=True)
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise RunError(f"{path}: cannot be written ({why(cause)}); the last good checkpoint is "
                           f"{last_of(out)}. Make room, then --resume") from error  # fmt: skip
        for old in sorted(path.parent.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    distributed.barrier()


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, loader: ClipLoader, device: torch.device
) -> tuple[int, int]:
    """Put everything back as it was; returns the number of steps done, and of skipped ones since the last good one.

    With other processes than before, those that are new keep the generators that they have: masks, order and crops
    come from elsewhere, so that only stochastic depth differs.

    Raises ValueError where the checkpoint is of other data, or its files are damaged or of another model.
    """
    try:
        weights = load_file(path / FILES[0])
        state = torch.load(path / FILES[1], map_location="cpu", weights_only=True)
        own = [{key: group[key] for key in HOW if key in group} for group in optimizer.param_groups]
        set_state_dict(
            model, optimizer, model_state_dict=weights, optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )  # fmt: skip
    except Exception as error:  # whatever torch and safetensors make of a file that is none
        # Not torch's message, whose advice is to load the file in an unsafe way.
        reason = "state.pt is no file of plain tensors" if isinstance(error, UnpicklingError) else why(error)
        raise ValueError(f"{path}: cannot be resumed ({reason}): it is damaged, or of another model; remove it to "
                         "go on from the one before") from error  # fmt: skip
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group |= options | {"betas": tuple(group["betas"])} if "betas" in group else options
    for moments in optimizer.state.values():
        if isinstance(moments.get("step"), torch.Tensor):
            moments["step"] = moments["step"].cpu()
    loader.load_state_dict(state["loader"])
    if distributed.rank() < len(state["generators"]):
        own = state["generators"][distributed.rank()]
        torch.set_rng_state(own["cpu"])
        if "cuda" in own and device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda"], device)
    return state["step"], state["bad"]


def _generators(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def note_skipped(out: Path, step: int, values: dict[str, float], source: Source, index: list[int]) -> list[str]:
    """Add a step that was not taken, and its clips (of all processes, which all have to call it), to skipped.jsonl.

    Returns the names of the clips.
    """
    clips = [source.name(i) for i in distributed.gather(index)]
    if not distributed.rank():
        fact = {"step": step} | {k: repr(v) for k, v in values.items()} | {"clips": clips}
        append_lines(out / "skipped.jsonl", [json.dumps(fact)])
    return clips
