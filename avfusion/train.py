"""Training: one flat loop, `train`, for pre-training and every downstream task, and the functions it is made of.

What a step computes is a function of the settings and of how many steps came before: order, crops and masks depend on
(seed, epoch, clip) and neither on processes nor on workers. (Batch norms in heads are of what one process computes at a
time.) A run that resumes repeats the undisturbed one bit for bit on the same number of processes.
"""

import math
import os
import signal
import sys
import time
from collections import deque
from contextlib import ContextDecorator, nullcontext
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import avfkernels
from avfusion.config import check_resumable
from avfusion.data.loader import random_seed
from avfusion.model import Block
from avfusion.optim import set_rate
from avfusion.runs import (
    NAMED,
    Curve,
    RunError,
    latest_checkpoint,
    load_checkpoint,
    note_skipped,
    save_checkpoint,
    write_run,
)
from avfusion.step import RecordedStep, Step
from avfusion.tasks.task import Task, spread

# Dense peak in bfloat16, TFLOP/s, by what the device calls itself.
PEAK_TFLOPS = {"A100": 312, "H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "L40S": 362, "4090": 165}


class _Sigterm(ContextDecorator):
    """Notes SIGTERM, while it is entered, instead of ending the process. Workers of loaders inherit that and live."""

    received = False

    def __enter__(self):
        self.received, self.previous = False, signal.signal(signal.SIGTERM, self._note)

    def __exit__(self, *error):
        signal.signal(signal.SIGTERM, self.previous)

    def _note(self, number, frame):
        self.received = True


SIGTERM = _Sigterm()


@SIGTERM
def train(task: Task, out: str | os.PathLike, *, resume: bool = False) -> bool:
    """Train a task's model as its settings say, in the folder `out`; True at its end, False where SIGTERM stopped it.

    Works in one process, and in each of several that torchrun or `accelerate launch` has started. `resume` goes on
    from the last checkpoint in `out`, if there is one.

    Raises:
        ValueError: settings, data or a checkpoint do not fit, or `out` holds a run already.
        RunError: too many steps in a row were not finite; a checkpoint could not be written.
        RuntimeError: too many clips failed.
    """
    out, config = Path(out), task.config
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision="no",  # autocast is the loop's own
        log_with=None if config.tracker == "none" else config.tracker,
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out)),
    )  # fmt: skip
    device, ranks, main = accelerator.device, accelerator.num_processes, accelerator.is_main_process
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32

    if config.tracker == "wandb" and find_spec("wandb") is None:
        raise ValueError("tracker='wandb': it is not installed; pip install wandb, or use tensorboard")

    # Data
    part, rest = divmod(config.batch_size, ranks * config.accumulation)
    if rest:
        raise ValueError(f"batch_size={config.batch_size}: expected a multiple of {ranks} processes "
                         f"x accumulation={config.accumulation}")  # fmt: skip
    with accelerator.main_process_first():
        source = task.open(make=main)
    task.mel.to(device)
    placed = {"rank": accelerator.process_index, "world_size": ranks}
    loader = task.loader(source, part, train=True, report=out / "failed.jsonl", **placed)
    steps = len(source.rows) // config.batch_size  # of an epoch
    if not steps:
        raise ValueError(f"batch_size={config.batch_size}: the set has only {len(source.rows)} clips, take a smaller "
                         "batch")  # fmt: skip
    total = steps * config.epochs

    # Run folder
    last = latest_checkpoint(out)
    if last and not resume:
        raise ValueError(f"{out}: holds a run already; add --resume to go on with it, or choose another --out")
    if last:
        check_resumable(config, out / "run.json")

    # Model
    torch.manual_seed(config.seed)
    with accelerator.main_process_first():  # the first fetches what the others find in the cache
        model = task.build(weights=not last).to(device)
    flop = task.flop() * config.batch_size
    torch.manual_seed(random_seed(config.seed, accelerator.process_index))
    sharded = ranks > 1 and (config.fsdp or accelerator.distributed_type == DistributedType.FSDP)
    if config.gradient_checkpointing:
        recompute_blocks(model)
    if sharded:
        shard(model)
    optimizer = task.optimizer(model)
    # FSDP and checkpointing depend on calls of the blocks, which the compiled layer does not make.
    compiles = config.compile is not False and not (sharded or config.gradient_checkpointing)
    pays = avfkernels.pays(device) and total * config.batch_size >= avfkernels.CLIPS
    model.encoder.compiled = compiles and bool(config.compile or pays)
    trained = model if sharded else accelerator.prepare_model(model)  # DDP where there are several processes

    step, bad = 0, 0
    if last:
        step, bad = load_checkpoint(last, model, optimizer, loader, accelerator)
    if main:
        write_run(out, task, source, ranks, step)
    accelerator.wait_for_everyone()
    evaluating, curve = None, Curve.resume(out, step)
    if config.eval_clips:
        chosen = task.open_evaluation()
        if not any(row.labels or row.label is not None for row in chosen.rows):
            accelerator.print(f"{config.eval_data or config.data}: no labels")
        evaluating = task.loader(chosen, part, train=False, **placed)
    save = partial(save_checkpoint, out, model, optimizer, loader, accelerator, config.keep)
    accelerator.init_trackers(
        "tensorboard" if config.tracker == "tensorboard" else "avfusion",
        {name: value if isinstance(value, int | float | str) else str(value) for name, value in asdict(config).items()},
        {"tensorboard": {"purge_step": step}, "wandb": {"name": out.name, "dir": str(out)}},
    )
    peak = (config.peak_tflops or _peak(device, dtype)) * 1e12 * ranks
    bar = tqdm(total=total, initial=step, unit="step", disable=not (main and sys.stderr.isatty()))

    def synchronise(micro: int):
        """Gradients are exchanged with the last part of a step."""
        last = micro == config.accumulation - 1
        if sharded:
            model.set_requires_gradient_sync(last)
        return nullcontext() if last or sharded else accelerator.no_sync(trained)

    def reduce(facts):
        return accelerator.reduce(torch.cat((facts, facts.new_tensor([SIGTERM.received]))), "mean")

    recorded = compiles and pays and ranks == 1 and isinstance(optimizer, torch.optim.AdamW)
    common = {"device": device, "dtype": dtype, "parts": config.accumulation}
    taking = (
        RecordedStep(partial(task.losses, trained), model, optimizer, **common)
        if recorded
        else Step(partial(task.losses, trained), model, optimizer, synchronise=synchronise, reduce=reduce, **common)
    )
    pending = deque()  # of a recorded step the host reads losses one step late

    def settle(left: int) -> None:
        """Read what steps have found until only the last `left` are unread; note those that were not taken."""
        nonlocal bad, losses, norm, stopping
        while len(pending) > left:
            number, clips, read = pending.popleft()
            *losses, norm, stopping = (*read(), SIGTERM.received) if taking.on_device else read()
            if all(map(math.isfinite, (*losses, norm))):
                bad = 0
                taken.append(losses)
                continue
            bad += 1
            values = {f"loss_{name}": loss for name, loss in zip(taking.names, losses, strict=True)}
            values["gradient_norm"] = norm
            names = note_skipped(out, number, values, source, clips, main=main)
            if bad == config.max_bad_steps:
                raise RunError(
                    f"step {number}, in epoch {number // steps}: {values}, the {bad}. step in a row that is not "
                    f"finite. Its clips: {', '.join(names[:NAMED])}{' ...' if len(names) > NAMED else ''} (all are in "
                    f"{out / 'skipped.jsonl'}). The last good checkpoint: {latest_checkpoint(out)}"
                )

    def due() -> bool:
        epoch, rest = divmod(step, steps)
        return evaluating is not None and not rest and (epoch % config.eval_epochs == 0 or epoch == config.epochs)

    def evaluate() -> None:
        copy = whole(model, task, sharded)
        training, compiled = copy.training, copy.encoder.compiled
        copy.eval().encoder.compiled = None if compiles else False
        found = task.evaluate(copy, evaluating, dtype).summary
        if main:
            curve.add(step, step / steps, found)
            (out / "pictures").mkdir(parents=True, exist_ok=True)
            task.draw(copy, evaluating, spread(len(evaluating.source.rows)), out / "pictures" / f"step-{step:08d}.png")
        copy.train(training).encoder.compiled = compiled
        accelerator.log({f"eval/{name}": value for name, value in found.items()}, step=step)

    if due() and not (last and curve.has(step)):  # at the beginning, and where SIGTERM came in an epoch's last step
        evaluate()
    clock, counted, losses, norm, stopping = time.perf_counter(), step, [], 0.0, False
    for epoch in range(step // steps, config.epochs):
        batches, taken = iter(loader), []
        for _ in range(steps - step % steps):
            lr = config.blr * config.batch_size / 256
            lr = set_rate(optimizer, lr, step / steps, config.epochs, config.warmup_epochs)
            clips = []
            for micro in range(config.accumulation):
                batch = next(batches)
                clips += batch.index.tolist()
                taking.part(task.prepare(batch, epoch, device), micro)
            pending.append((step, clips, taking.update()))
            step += 1
            if step % steps == 0:
                loader.epoch, loader.consumed = epoch + 1, 0  # what is left is less than a batch
            due_now = SIGTERM.received or not step % config.log_steps or not step % (config.save_steps or steps)
            settle(left=int(taking.on_device and not due_now and step % steps != 0))

            if step % config.log_steps == 0 or step == total:
                seconds, clock = time.perf_counter() - clock, time.perf_counter()
                speed = {"clips/s": (step - counted) * config.batch_size / seconds,
                         "TFLOP/s": (step - counted) * flop / seconds / 1e12}  # fmt: skip
                speed |= {"MFU": speed["TFLOP/s"] * 1e12 / peak} if peak else {}
                counted = step
                values = {f"loss/{name}": loss for name, loss in zip(taking.names, losses, strict=True)}
                accelerator.log(values | {"gradient norm": norm, "lr": lr} | speed, step=step)
                bar.set_postfix({name: f"{loss:.3f}" for name, loss in zip(taking.names, losses, strict=True)}
                                | {name: f"{value:.3g}" for name, value in speed.items()}, refresh=False)  # fmt: skip
            bar.update()
            if stopping:
                settle(left=0)  # SIGTERM may have come while the step before was read
                save(step, bad)
                accelerator.print(f"{out}: stopped by SIGTERM after step {step}, saved; --resume goes on")
                _finish(accelerator, bar)
                return False
            if config.save_steps and step % config.save_steps == 0 and step % steps:
                save(step, bad)

        if due():
            evaluate()
            clock, counted = time.perf_counter(), step
        save(step, bad)
        means = torch.tensor(taken).mean(0).tolist() if taken else [math.nan] * len(taking.names)
        text = ", ".join(f"{name} {mean:.4f}" for name, mean in zip(taking.names, means, strict=True))
        accelerator.print(f"epoch {epoch + 1}/{config.epochs}: loss {text}")
    _finish(accelerator, bar)
    return True


def _finish(accelerator: Accelerator, bar: tqdm) -> None:
    bar.close()
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()


def recompute_blocks(model: nn.Module) -> None:
    """Gradient checkpointing: every block keeps its inputs only, and is computed again when its gradient is."""
    blocks = (Block, avfkernels.DenseFusion, avfkernels.FactorizedFusion, avfkernels.TokenFusion)
    for module in model.modules():
        if isinstance(module, blocks):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def shard(model: nn.Module) -> None:
    """FSDP: each block's parameters are gathered when it runs, all others at the beginning."""
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module)
    fully_shard(model)


def whole(model: nn.Module, task: Task, sharded: bool) -> nn.Module:
    """The model with all its weights in this process: itself, or, if sharded, a copy."""
    if not sharded:
        return model
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    copy = task.build().to(next(iter(weights.values())).device)
    copy.load_state_dict(weights)
    return copy


def _peak(device: torch.device, dtype: torch.dtype) -> float:
    if device.type != "cuda" or dtype != torch.bfloat16:
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)
