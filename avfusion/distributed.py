"""This process among those of a run, which torchrun has started: torch.distributed, and nothing where there is one."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def own_device(device: str | torch.device | None = None) -> torch.device:
    """The device of this name. None and "auto" take a GPU where there is one; of several processes each its own."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device in (None, "auto") else str(device)
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def start(device: str | torch.device | None = None, *, apart: bool = False) -> torch.device:
    """Joins the processes that the environment names (RANK, WORLD_SIZE), and returns this one's device.

    `apart`: they only meet at the end, for which the first that is done waits for days.
    """
    device, several = own_device(device), int(os.environ.get("WORLD_SIZE", 1)) > 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if several and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" and not apart else "gloo"
        dist.init_process_group(backend, **{"timeout": timedelta(days=30)} if apart else {})
    return device


def stop() -> None:
    """Leaves them. Nothing that knows the group, as a DistributedDataParallel does, may be alive any more.

    Its threads would outlive this, and abort an interpreter that ends while they let go of tensors.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # those are in cycles
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def gather(rows: list) -> list:
    """The rows of all processes, one after the other; all of them have to call it."""
    if world_size() == 1:
        return rows
    parts = [None] * world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def mean(x: Tensor) -> Tensor:
    """The mean of a tensor over processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
        x /= world_size()
    return x


@contextmanager
def first() -> Iterator[None]:
    """The first process goes ahead; the others find what it has made or fetched."""
    if rank():
        barrier()
    yield
    if not rank():
        barrier()


def say(text: str) -> None:
    """Prints, in the first process alone."""
    if not rank():
        print(text, flush=True)
