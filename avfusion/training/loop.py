"""Training: one flat loop, `train`, for pre-training and every downstream task, and the parts it is made of.

What a step computes is a function of the settings and of how many steps came before: order, crops and masks depend on
(seed, epoch, clip) and neither on processes nor on workers. (Batch norms in heads are of what one process computes at a
time.) A run that resumes repeats the undisturbed one bit for bit on the same number of processes.
"""

import math
import os
import signal
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import avfkernels
from avfusion import distributed
from avfusion.data.loader import ClipLoader
from avfusion.data.sampler import random_seed
from avfusion.data.samples import Source
from avfusion.files import Held
from avfusion.models.deepavfusion import Block
from avfusion.training.config import TrainConfig, check_resumable
from avfusion.training.log import Log, check_tracker
from avfusion.training.optim import set_rate
from avfusion.training.run_folder import (
    NAMED,
    Curve,
    RunError,
    checkpoints,
    last_of,
    latest_checkpoint,
    load_checkpoint,
    note_skipped,
    save_checkpoint,
    write_run,
)
from avfusion.training.step import RecordedStep, Step
from avfusion.training.task import Task, spread

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class _Stop:
    """Notes SIGTERM and SIGINT (Ctrl-C) while it is entered, and ends nothing; but for a second Ctrl-C."""

    received = 0  # the number of the signal

    def __enter__(self):
        self.received = 0
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if number == signal.SIGINT and not distributed.rank():
            os.write(2, b"\nstops after this step and saves it; Ctrl-C again ends it at once\n")  # print may be at work


STOP = _Stop()


def train(
    task: Task, out: str | os.PathLike, *, resume: bool = False, device: str | torch.device | None = None
) -> bool:
    """Train a task's model as its settings say, in the folder `out`; True at its end, False where a signal stopped it.

    Works in one process, and in each of several that torchrun has started; on `device`, or on GPUs where there are any.
    `resume` goes on from the last whole checkpoint in `out`, if there is one. SIGTERM and Ctrl-C end it with one.

    Raises:
        ValueError: settings, data or a checkpoint do not fit, or `out` holds a run already.
        InUse: another process trains in `out`.
        RunError: too many steps in a row were not finite; a checkpoint could not be written.
        RuntimeError: too many clips failed; a worker died, or none gave anything.
    """
    out, device = Path(out), distributed.start(device)
    check_writable(out)
    with nullcontext() if distributed.rank() else Held(out, "checkpoints", "pictures"):
        return _train(task, out, resume, device)


def _train(task: Task, out: Path, resume: bool, device: torch.device) -> bool:
    config, ranks = task.config, distributed.world_size()
    optim, run = config.optim, config.run

    # What can be checked is, before anything takes long.
    with distributed.first():  # it puts a damaged checkpoint aside
        last = check_folder(task, out, resume)
    part = part_of_a_step(config)
    config.check_new()
    check_tracker(config)
    task.check()

    # Data
    with distributed.first():
        source = task.open(make=not distributed.rank())
    loader = task.loader(source, part, train=True, report=out / "failed.jsonl")
    steps = steps_of_an_epoch(source, optim.batch_size)
    total = steps * optim.epochs

    # Model
    torch.manual_seed(optim.seed)
    with distributed.first():  # the first fetches what the others find in the cache
        model = task.build(weights=not last).to(device)
    task.mel.to(device)
    flop = task.flop() * optim.batch_size
    torch.manual_seed(random_seed(optim.seed, distributed.rank()))
    sharded = ranks > 1 and run.fsdp
    if run.gradient_checkpointing:
        recompute_blocks(model)
    if sharded:
        shard(model)
    optimizer = task.optimizer(model)
    # FSDP and checkpointing depend on calls of the blocks, which the compiled layer does not make.
    compiles = run.compile is not False and not (sharded or run.gradient_checkpointing)
    pays = avfkernels.pays(device) and total * optim.batch_size >= avfkernels.CLIPS
    model.encoder.compiled = compiles and bool(run.compile or pays)
    trained = model
    if ranks > 1 and not sharded:
        trained = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    # Where it stands
    step, bad = load_checkpoint(last, model, optimizer, loader, device) if last else (0, 0)
    if not distributed.rank():
        write_run(out, task, source, ranks, step)
    distributed.barrier()
    distributed.say(f"{out}: {task.name}, {total} steps of {optim.batch_size} clips on {ranks} x {device}, "
                    + (f"goes on after step {step} from {last}" if last else "from the beginning"))  # fmt: skip
    curve = Curve.resume(out, step)
    watched = task.loader(task.open_evaluation(), part, train=False) if config.data.eval_clips else None
    evaluation = Evaluation(task, model, watched, curve, steps, compiled=compiles and None, sharded=sharded)
    save = partial(save_checkpoint, out, model, optimizer, loader, device, run.keep)
    recorded = compiles and pays and ranks == 1 and isinstance(optimizer, torch.optim.AdamW)
    exchange = {} if recorded else {"synchronise": exchanges(model, trained, optim.accumulation), "reduce": with_stop}
    taking = (RecordedStep if recorded else Step)(
        partial(task.losses, trained), model, optimizer, device=device, dtype=DTYPES[run.dtype],
        parts=optim.accumulation, **exchange,
    )  # fmt: skip
    found = Found(taking, out, source, steps, run.max_bad_steps, bad)
    log = Log(out, config, device, step=step, total=total, flop=flop)
    with STOP, log:
        # At the beginning, and after a stop at an epoch's end.
        if evaluation.due(step) and not (last and curve.has(step)):
            log.values(step, evaluation(step))
        log.restart(step)
        for epoch in range(step // steps, optim.epochs):
            batches, found.taken = iter(loader), []
            for _ in range(steps - step % steps):
                lr = optim.blr * optim.batch_size / 256
                lr = set_rate(optimizer, lr, step / steps, optim.epochs, optim.warmup_epochs)
                clips = []
                for micro in range(optim.accumulation):
                    batch = next(batches)
                    clips += batch.index.tolist()
                    taking.part(task.prepare(batch, epoch, device), micro)
                found.later(step, clips, taking.update())
                step += 1
                if step % steps == 0:
                    loader.epoch, loader.consumed = epoch + 1, 0  # what is left is less than a batch
                saves = bool(run.save_steps) and step % run.save_steps == 0
                read = STOP.received or saves or step % run.log_steps == 0 or step % steps == 0
                found.settle(left=0 if read else int(taking.on_device))
                log.step(step, found.losses, found.norm, lr)
                if found.stopping:
                    found.settle(left=0)  # the signal may have come while the step before was read
                    save(step, found.bad)
                    log.state = "stopped"
                    distributed.say(f"{out}: stopped by {signal.Signals(STOP.received or signal.SIGTERM).name} after "
                                    f"step {step}, saved; the same command with --resume goes on")  # fmt: skip
                    return False
                if saves and step % steps:
                    save(step, found.bad)
            if evaluation.due(step):
                log.values(step, evaluation(step))
                log.restart(step)
            save(step, found.bad)
            distributed.say(f"epoch {epoch + 1}/{optim.epochs}: loss {found.means()}")
    distributed.barrier()
    return True


def check_folder(task: Task, out: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, if there is one. Raises ValueError where the folder is of another run."""
    if not checkpoints(out):
        return None
    if not resume:
        raise ValueError(f"{out}: holds a run already; add --resume to go on with it, or choose another --out")
    check_resumable(task.config, out, task.name)
    # The first process has put aside what is damaged, when the others come here.
    return max(checkpoints(out)) if distributed.rank() else latest_checkpoint(out, aside=True)


def check_writable(out: Path) -> None:
    """Makes the folder of a run. Raises ValueError where that cannot be, or it cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out}: cannot be made ({error.strerror}); choose another --out") from error
    if not os.access(out, os.W_OK):
        raise ValueError(f"{out}: cannot be written to; choose another --out")


def part_of_a_step(config: TrainConfig) -> int:
    """Clips that a process takes at a time."""
    ranks, optim = distributed.world_size(), config.optim
    part, rest = divmod(optim.batch_size, ranks * optim.accumulation)
    if rest:
        raise ValueError(f"batch_size={optim.batch_size}: expected a multiple of {ranks} processes "
                         f"x accumulation={optim.accumulation}")  # fmt: skip
    return part


def steps_of_an_epoch(source: Source, batch_size: int) -> int:
    steps = len(source.rows) // batch_size
    if not steps:
        raise ValueError(f"batch_size={batch_size}: the set has only {len(source.rows)} clips, take a smaller batch")
    return steps


def with_stop(facts: torch.Tensor) -> torch.Tensor:
    """The mean over processes; with whether one of them is to stop, so that all do after the same step."""
    return distributed.mean(torch.cat((facts, facts.new_tensor([bool(STOP.received)]))))


def exchanges(model: nn.Module, trained: nn.Module, parts: int) -> Callable:
    """Of the number of a part, a context: gradients are exchanged with the last part of a step."""

    def synchronise(number: int):
        last = number == parts - 1
        if hasattr(model, "set_requires_gradient_sync"):  # FSDP
            model.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last or trained is model else trained.no_sync()

    return synchronise


@dataclass
class Found:
    """What steps have found. Of a recorded step the host reads it one step late."""

    taking: Step
    out: Path
    source: Source
    steps: int  # of an epoch
    max_bad: int
    bad: int  # steps in a row that were not finite
    pending: deque = field(default_factory=deque)
    taken: list[list[float]] = field(default_factory=list)  # losses of an epoch's steps
    losses: dict[str, float] = field(default_factory=dict)  # of the last step that was read
    norm: float = 0.0
    stopping: bool = False  # a signal ends the run

    def later(self, step: int, clips: list[int], read: Callable[[], list[float]]) -> None:
        self.pending.append((step, clips, read))

    def settle(self, left: int) -> None:
        """Read until only the last `left` steps are unread; note those that were not taken."""
        while len(self.pending) > left:
            step, clips, read = self.pending.popleft()
            *losses, self.norm, stopping = (*read(), STOP.received) if self.taking.on_device else read()
            self.losses, self.stopping = dict(zip(self.taking.names, losses, strict=True)), bool(stopping)
            if all(map(math.isfinite, (*losses, self.norm))):
                self.bad = 0
                self.taken.append(losses)
                continue
            self.bad += 1
            values = {f"loss_{name}": loss for name, loss in self.losses.items()} | {"gradient_norm": self.norm}
            names = note_skipped(self.out, step, values, self.source, clips)
            if self.bad == self.max_bad:
                raise RunError(
                    f"step {step}, in epoch {step // self.steps}: {values}, the {self.bad}. step in a row that is not "
                    f"finite. Its clips: {', '.join(names[:NAMED])}{' ...' if len(names) > NAMED else ''} (all are in "
                    f"{self.out / 'skipped.jsonl'}). The last good checkpoint: {last_of(self.out)}"
                )

    def means(self) -> str:
        means = torch.tensor(self.taken).mean(0).tolist() if self.taken else [math.nan] * len(self.taking.names)
        return ", ".join(f"{name} {mean:.4f}" for name, mean in zip(self.taking.names, means, strict=True))


@dataclass
class Evaluation:
    """Evaluates the model on the way, every `eval_epochs` and at the end, if there is a loader."""

    task: Task
    model: nn.Module
    loader: ClipLoader | None
    curve: Curve
    steps: int  # of an epoch
    compiled: bool | None
    sharded: bool

    def due(self, step: int) -> bool:
        (epoch, rest), config = divmod(step, self.steps), self.task.config
        often = epoch % config.run.eval_epochs == 0 or epoch == config.optim.epochs
        return self.loader is not None and not rest and often

    def __call__(self, step: int) -> dict[str, float]:
        """What it finds, for the log."""
        copy, loader, out = whole(self.model, self.task, self.sharded), self.loader, self.curve.out
        training, compiled = copy.training, copy.encoder.compiled
        copy.eval().encoder.compiled = self.compiled
        result = self.task.evaluate(copy, loader, DTYPES[self.task.config.run.dtype])
        if not distributed.rank():
            self.curve.add(step, step / self.steps, result.summary)
            picture = out / "pictures" / f"step-{step:08d}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            self.task.draw(copy, loader, spread(len(loader.source.rows)), picture)
            self.task.show_run(out, picture, loader, result.samples)
        copy.train(training).encoder.compiled = compiled
        return {f"eval/{name}": value for name, value in result.summary.items()}


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
