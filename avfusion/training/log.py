"""What a run tells while it goes: the terminal, RUN/log.jsonl, and a tracker: TensorBoard, Weights & Biases, Trackio.

A line of log.jsonl is a JSON object. Each part of a run begins with {"state": "running", "step", "total", "pid",
"host", "time"} and ends with {"state": "finished", "stopped" or "failed", ...}; between them are lines of steps,
{"step", "time", "left", "loss", ...}, `left` in seconds.
"""

import json
import os
import socket
import time
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from avfusion import distributed
from avfusion.common import Progress, why
from avfusion.files import append_lines
from avfusion.training.config import TrainConfig

# Dense peak in bfloat16, TFLOP/s, by what the device calls itself.
PEAK_TFLOPS = {"A100": 312, "H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "L40S": 362, "4090": 165}


class Log:
    """Made in every process; the first one tells. To be entered; `state` is how the run ends, unless by an error.

    Args:
        out, config: of the run.
        step, total: where it stands, and how many steps there are.
        flop: of a step, over all processes.
    """

    def __init__(self, out: Path, config: TrainConfig, device: torch.device, *, step: int, total: int, flop: float):
        main, self.config, self.flop, self.state = not distributed.rank(), config, flop, "finished"
        self.peak = (config.run.peak_tflops or _peak(device, config.run.dtype)) * 1e12 * distributed.world_size()
        self.progress = Progress(total, "step", initial=step, show=main)
        self.restart(step)
        self.path = out / "log.jsonl" if main else None
        self._write(state="running", step=step, total=total, pid=os.getpid(), host=socket.gethostname())
        self.tensorboard = self.tracker = None
        if main and config.run.tracker == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(out / "tensorboard", purge_step=step)
            self.tensorboard.add_text("settings", f"`{json.dumps(config.flat())}`", step)
        elif main and config.run.tracker != "none":  # the two take the same calls
            self.tracker = import_module(config.run.tracker)
            place = {"dir": str(out)} if config.run.tracker == "wandb" else {}
            self.tracker.init(project="avfusion", name=out.name, config=config.flat(), **place)

    def _write(self, **facts: Any) -> None:
        if self.path:
            append_lines(self.path, [json.dumps({"time": round(time.time(), 1)} | facts)])

    def restart(self, step: int) -> None:
        """Speed is counted from here on."""
        self.clock, self.counted = time.perf_counter(), step

    def step(self, step: int, losses: dict[str, float], norm: float, lr: float) -> None:
        """Tells of a step: to the tracker every `log_steps`, to the terminal now and then."""
        pace = (step - self.counted) / max(time.perf_counter() - self.clock, 1e-9)
        speed = {"clips/s": pace * self.config.optim.batch_size, "TFLOP/s": pace * self.flop / 1e12}
        speed |= {"MFU": pace * self.flop / self.peak} if self.peak else {}
        shown = {"loss": " ".join(f"{name} {loss:.3f}" for name, loss in losses.items())}
        self.progress.update(step, **shown, **{name: f"{value:.3g}" for name, value in speed.items()})
        if step % self.config.run.log_steps == 0 or step == self.progress.total:
            more = {"gradient norm": norm, "lr": lr} | speed
            left = round((self.progress.total - step) / max(pace, 1e-9))
            self._write(step=step, left=left, loss=losses, **more)
            self.values(step, {f"loss/{name}": loss for name, loss in losses.items()} | more)
            self.restart(step)

    def values(self, step: int, values: dict[str, float]) -> None:
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
            self.tensorboard.flush()
        if self.tracker:
            self.tracker.log(values, step=step)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.progress.__exit__()
        if kind:
            with suppress(OSError):  # a full disk is what may have failed
                self._write(state="failed", why=why(error))
        else:
            self._write(state=self.state)
        if self.tensorboard:
            self.tensorboard.close()
        if self.tracker:
            self.tracker.finish()


def check_tracker(config: TrainConfig) -> None:
    name = config.run.tracker
    if name in ("wandb", "trackio") and find_spec(name) is None:
        raise ValueError(f"tracker={name!r}: it is not installed; pip install {name}, or use tensorboard")


def _peak(device: torch.device, dtype: str) -> float:
    if device.type != "cuda" or dtype != "bf16":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)
