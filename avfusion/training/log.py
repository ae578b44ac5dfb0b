"""What a run tells while it goes: TensorBoard or Weights & Biases, and the terminal."""

import json
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from avfusion import distributed
from avfusion.common import Progress
from avfusion.training.config import TrainConfig

# Dense peak in bfloat16, TFLOP/s, by what the device calls itself.
PEAK_TFLOPS = {"A100": 312, "H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "L40S": 362, "4090": 165}


class Log:
    """Made in every process; the first one tells.

    Args:
        out, config: of the run.
        step, total: where it stands, and how many steps there are.
        flop: of a step, over all processes.
    """

    def __init__(self, out: Path, config: TrainConfig, device: torch.device, *, step: int, total: int, flop: float):
        main, self.config, self.flop = not distributed.rank(), config, flop
        self.peak = (config.run.peak_tflops or _peak(device, config.run.dtype)) * 1e12 * distributed.world_size()
        self.progress = Progress(total, "step", initial=step, show=main)
        self.restart(step)
        self.tensorboard = self.wandb = None
        if main and config.run.tracker == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(out / "tensorboard", purge_step=step)
            self.tensorboard.add_text("settings", f"`{json.dumps(config.flat())}`", step)
        elif main and config.run.tracker == "wandb":
            import wandb

            self.wandb = wandb.init(project="avfusion", name=out.name, dir=str(out), config=config.flat())

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
            self.values(step, {f"loss/{name}": loss for name, loss in losses.items()}
                        | {"gradient norm": norm, "lr": lr} | speed)  # fmt: skip
            self.restart(step)

    def values(self, step: int, values: dict[str, float]) -> None:
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
            self.tensorboard.flush()
        if self.wandb:
            self.wandb.log(values, step=step)

    def close(self) -> None:
        self.progress.__exit__()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def check_tracker(config: TrainConfig) -> None:
    if config.run.tracker == "wandb" and find_spec("wandb") is None:
        raise ValueError("tracker='wandb': it is not installed; pip install wandb, or use tensorboard")


def _peak(device: torch.device, dtype: str) -> float:
    if device.type != "cuda" or dtype != "bf16":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)
