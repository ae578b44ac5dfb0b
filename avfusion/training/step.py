"""A step of training on the device: forward and backward of its parts, and the update; on a GPU as CUDA graphs.

What a graph has recorded has no way back to the host: whether a step is finite, and so taken, is decided on the device,
learning rates are tensors, and the host reads losses one step late.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import avfkernels
from avfusion.training.task import autocast


class Step:
    """One optimizer step of `parts` parts: for each `part(inputs, i)`, then `update()`.

    Args:
        losses: of model inputs, scalars by name.
        model, optimizer: whose gradients and weights; autocast to `dtype`.
        parts: of a step; gradients are of the mean of their losses.
        synchronise: of the number of a part, a context in which gradients are exchanged or not.
        reduce: the mean of a tensor over processes.
    """

    on_device = False  # whether a step is taken is decided on the device, and read later

    def __init__(
        self, losses: Callable[..., dict[str, Tensor]], model: nn.Module, optimizer: torch.optim.Optimizer, *,
        device: torch.device, dtype: torch.dtype, parts: int = 1,
        synchronise: Callable[[int], AbstractContextManager] = lambda _: nullcontext(),
        reduce: Callable[[Tensor], Tensor] = lambda x: x,
    ):  # fmt: skip
        self.losses, self.model, self.optimizer = losses, model, optimizer
        self.device, self.dtype, self.parts = device, dtype, parts
        self.synchronise, self.reduce = synchronise, reduce
        self.names: list[str] = []
        # What batch norms have seen is part of a step, too.
        self.running = [x for module in model.modules() if isinstance(module, _BatchNorm) for x in module.buffers()]

    def part(self, inputs: Sequence, number: int) -> None:
        """Forward and backward of one part."""
        if number == 0:
            self.before = [x.clone() for x in self.running]
        with self.synchronise(number):
            with autocast(self.device, self.dtype):
                found = self.losses(*inputs)
            (sum(found.values()) / self.parts).backward()
        self.names = list(found)
        values = torch.stack([loss.detach().float() for loss in found.values()]) / self.parts
        self.values = values if number == 0 else self.values + values

    def facts(self) -> Tensor:
        """The losses and the norm of the gradient, [n + 1]; of all processes."""
        return self.reduce(torch.cat((self.values, total_norm(self.model).float()[None])))

    def update(self) -> Callable[[], list[float]]:
        """Takes the step, if losses and gradient are finite; returns what gives them, the norm last."""
        facts = self.facts()
        read = facts.tolist()  # the one place where the host waits for the device
        if all(map(math.isfinite, read)):
            self.optimizer.step()
        else:
            for x, before in zip(self.running, self.before, strict=True):
                x.copy_(before)
        self.optimizer.zero_grad(set_to_none=True)
        return lambda: read


class RecordedStep(Step):
    """The same as CUDA graphs: one for the first part, one for all others, one for the update.

    AdamW alone, in one process. Its groups become fused and capturable, their rates tensors. A failure to record is
    reported, once, and what failed runs as it is.
    """

    on_device = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.graphs: dict = {}
        self.hold = torch.ones((), device=self.device)  # 1 while recording: no step is taken
        self.recording = True
        for group in self.optimizer.param_groups:
            rate = torch.tensor(float(group["lr"]), dtype=torch.float32, device=self.device)
            group |= {"lr": rate, "fused": True, "capturable": True, "foreach": False}
        for state in self.optimizer.state.values():  # a checkpoint of a run that was none of this
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=self.device)

    def part(self, inputs: Sequence, number: int) -> None:
        key = ("part", number > 0)
        if key not in self.graphs and self.recording:
            self._record(key, lambda: self._part(number), inputs)
        if key not in self.graphs:
            if number == 0:
                self.optimizer.zero_grad(set_to_none=True)
            super().part(inputs, number)
            return
        for buffer, x in zip(self.inputs, inputs, strict=True):
            if isinstance(x, Tensor):
                if x.shape != buffer.shape:
                    raise ValueError(f"recorded for a batch with {list(buffer.shape)}, got {list(x.shape)}")
                buffer.copy_(x, non_blocking=True)
        self.graphs[key]()

    def _part(self, number: int) -> tuple[Tensor, ...]:
        if number == 0:  # the graph writes gradients, and does not add to them
            self.optimizer.zero_grad(set_to_none=True)
        values = None if number == 0 else self.values
        super().part(self.inputs, number)
        if values is not None:  # where it was, for the update and the parts to come
            self.values = values.copy_(self.values)
        return (self.values,)

    def update(self) -> Callable[[], list[float]]:
        if "update" not in self.graphs and self.recording:
            self._record("update", self._update)
        if "update" in self.graphs:
            self.graphs["update"]()
        else:
            self.hold.fill_(0.0)
            self._update()
        avfkernels.weights_changed()
        host = torch.empty(self.found.shape, pin_memory=self.device.type == "cuda")
        host.copy_(self.found, non_blocking=True)
        done = torch.cuda.Event() if self.device.type == "cuda" else None
        if done:
            done.record()

        def read() -> list[float]:
            if done:
                done.synchronize()
            return host.tolist()

        return read

    def _update(self) -> tuple[Tensor, ...]:
        self.found = self.facts()
        finite = self.found.isfinite().all()
        self.optimizer.found_inf = torch.maximum(1.0 - finite.float(), self.hold)  # as a GradScaler says so
        self.optimizer.step()
        for x, before in zip(self.running, self.before, strict=True):
            x.copy_(torch.where(finite, x, before))
        return (self.found,)

    def _record(self, key, function: Callable[[], tuple[Tensor, ...]], inputs: Sequence | None = None) -> None:
        """Records a function; gradients, losses, batch norms and random numbers are as before then."""
        if inputs is not None and not hasattr(self, "inputs"):
            self.inputs = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
        kept = [x for x in (*(p.grad for p in self.model.parameters()), *self.running) if x is not None]
        kept += [self.values] if hasattr(self, "values") else []
        copies = [x.detach().clone() for x in kept]
        devices = [self.device] if self.device.type == "cuda" else []
        self.hold.fill_(1.0)
        try:
            with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*capturable=True.*")  # while it is warmed up
                _, self.graphs[key] = avfkernels.record(function, self.device)
        except Exception as error:  # whatever compilers and drivers raise
            self.recording = self.model.encoder.compiled = False
            warnings.warn(f"training runs uncompiled: {type(error).__name__}: {error}", stacklevel=3)
        finally:
            self.hold.fill_(0.0)
            with torch.no_grad():
                for x, copy in zip(kept, copies, strict=True):
                    x.copy_(copy)


def total_norm(model: nn.Module) -> Tensor:
    """The 2-norm of all gradients together, over all processes if they are sharded."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
