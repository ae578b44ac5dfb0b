"""Masked audio-visual pre-training: one flat loop, `pretrain`, and the few functions it is made of.

What a step computes is a function of the settings and of how many steps came before: order, crops and masks depend on
(seed, epoch, clip) and neither on processes nor on workers. A run that resumes repeats the undisturbed one bit for bit
on the same number of processes.
"""

import math
import os
import signal
import sys
import time
from contextlib import ContextDecorator, nullcontext
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import avfkernels
from avfusion import data
from avfusion.checkpoint import load_unimodal
from avfusion.clips import image_transform
from avfusion.config import PretrainConfig, check_resumable
from avfusion.data.loader import ClipLoader, Source, random_seed
from avfusion.features import preprocessing
from avfusion.mae import AVMAE
from avfusion.model import Block, DeepAVFusion
from avfusion.optim import adamw, set_rate
from avfusion.probe import Recorder, Selection
from avfusion.runs import NAMED, RunError, latest_checkpoint, load_checkpoint, note_skipped, save_checkpoint, write_run

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
def pretrain(config: PretrainConfig, out: str | os.PathLike, *, resume: bool = False) -> bool:
    """Pre-train an `AVMAE` as `config` says, in the folder `out`; True at its end, False where SIGTERM stopped it.

    Works in one process, and in each of several that torchrun or `accelerate launch` has started. `resume` goes on
    from the last checkpoint in `out`, if there is one.

    Raises:
        ValueError: settings, data or a checkpoint do not fit, or `out` holds a run already.
        RunError: too many steps in a row were not finite; a checkpoint could not be written.
        RuntimeError: too many clips failed.
    """
    out = Path(out)
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
        source = open_source(config, make=main)
    transform, mel, window = preprocessing(config.encoder())
    mel.to(device)
    common = {"num_workers": config.workers, "rank": accelerator.process_index, "world_size": ranks, **window}
    loader = ClipLoader(
        source, part, train=True, seed=config.seed, gain_db=config.gain_db, report=out / "failed.jsonl",
        transform=image_transform(config.image_size, train=True, crop_min=config.crop_min), **common,
    )  # fmt: skip
    steps = len(source.rows) // config.batch_size  # of an epoch
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
        model = build(config, weights=not last).to(device)
    flop = count_flop(config) * config.batch_size
    torch.manual_seed(random_seed(config.seed, accelerator.process_index))
    sharded = ranks > 1 and (config.fsdp or accelerator.distributed_type == DistributedType.FSDP)
    if config.gradient_checkpointing:
        recompute_blocks(model)
    if sharded:
        shard(model)
    started = [f"encoder.{name}." for name in ("image", "audio") if getattr(config, f"{name}_weights")]
    optimizer = adamw(model, weight_decay=config.weight_decay, betas=config.betas, pretrained=started)
    if config.compile != "no":
        model.compile(mode=None if config.compile == "default" else config.compile)
    trained = model if sharded else accelerator.prepare_model(model)  # DDP where there are several processes

    step, bad = 0, 0
    if last:
        step, bad = load_checkpoint(last, model, optimizer, loader, accelerator)
    if main:
        write_run(out, config, source, ranks, step)
    accelerator.wait_for_everyone()
    recorder = None
    if config.probe_clips:
        chosen = Selection(open_source(config, probes=True), config.probe_clips)
        if not chosen.has_labels:
            accelerator.print(f"{config.probe_data or config.data}: no labels, so pictures but no probes")
        probing = ClipLoader(chosen, part, train=False, transform=transform, **common)
        recorder = Recorder.resume(probing, mel, dtype, out, step)
    save = partial(save_checkpoint, out, model, optimizer, loader, accelerator, config.keep)
    accelerator.init_trackers(
        "tensorboard" if config.tracker == "tensorboard" else "avfusion",
        {name: value if isinstance(value, int | float | str) else str(value) for name, value in asdict(config).items()},
        {"tensorboard": {"purge_step": step}, "wandb": {"name": out.name, "dir": str(out)}},
    )
    peak = (config.peak_tflops or _peak(device, dtype)) * 1e12 * ranks
    bar = tqdm(total=total, initial=step, unit="step", disable=not (main and sys.stderr.isatty()))
    clock, counted = time.perf_counter(), step

    if step == 0 and recorder:
        recorder.write(whole(model, config, sharded), step, 0.0, main=main)
    for epoch in range(step // steps, config.epochs):
        batches, sums, good = iter(loader), torch.zeros(2), 0
        for _ in range(steps - step % steps):
            lr = config.blr * config.batch_size / 256
            lr = set_rate(optimizer, lr, step / steps, config.epochs, config.warmup_epochs)
            losses, clips = torch.zeros(2, device=device), []
            for micro in range(config.accumulation):
                batch = next(batches)
                clips += batch.index.tolist()
                noise = mask_noise(config, epoch, batch.index)
                noise = [x.to(device, non_blocking=True) for x in noise]
                image, audio = batch.image.to(device, non_blocking=True), mel(batch.waveform.to(device))
                synchronised = micro == config.accumulation - 1
                if sharded:
                    model.set_requires_gradient_sync(synchronised)
                with nullcontext() if synchronised or sharded else accelerator.no_sync(trained):
                    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                        loss_image, loss_audio, *_ = trained(image, audio, *noise, predict=False)
                    ((loss_image + loss_audio) / config.accumulation).backward()
                losses += torch.stack([loss_image.detach(), loss_audio.detach()]) / config.accumulation

            # The one place where the host waits for the device: whether to take the step must be known.
            norm = total_norm(model)
            facts = torch.stack([*losses, norm, norm.new_tensor(SIGTERM.received)])
            *losses, norm, stopping = accelerator.reduce(facts, "mean").tolist()
            if all(map(math.isfinite, (*losses, norm))):
                optimizer.step()
                bad, good, sums = 0, good + 1, sums + torch.tensor(losses)
            else:
                bad += 1
                values = {"loss_image": losses[0], "loss_audio": losses[1], "gradient_norm": norm}
                names = note_skipped(out, step, values, source, clips, main=main)
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % steps == 0:
                loader.epoch, loader.consumed = epoch + 1, 0  # what is left is less than a batch
            if bad == config.max_bad_steps:
                raise RunError(
                    f"step {step - 1}, in epoch {epoch}: {values}, the {bad}. step in a row that is not finite. Its "
                    f"clips: {', '.join(names[:NAMED])}{' ...' if len(names) > NAMED else ''} (all are in "
                    f"{out / 'skipped.jsonl'}). The last good checkpoint: {latest_checkpoint(out)}"
                )

            if step % config.log_steps == 0 or step == total:
                seconds, clock = time.perf_counter() - clock, time.perf_counter()
                speed = {"clips/s": (step - counted) * config.batch_size / seconds,
                         "TFLOP/s": (step - counted) * flop / seconds / 1e12}  # fmt: skip
                speed |= {"MFU": speed["TFLOP/s"] * 1e12 / peak} if peak else {}
                counted = step
                values = {"loss/image": losses[0], "loss/audio": losses[1], "gradient norm": norm, "lr": lr}
                accelerator.log(values | speed, step=step)
                bar.set_postfix({"image": f"{losses[0]:.3f}", "audio": f"{losses[1]:.3f}"}
                                | {name: f"{value:.3g}" for name, value in speed.items()}, refresh=False)  # fmt: skip
            bar.update()
            if stopping:
                save(step, bad)
                accelerator.print(f"{out}: stopped by SIGTERM after step {step}, saved; --resume goes on")
                _finish(accelerator, bar)
                return False
            if config.save_steps and step % config.save_steps == 0 and step % steps:
                save(step, bad)

        if recorder and ((epoch + 1) % config.probe_epochs == 0 or epoch + 1 == config.epochs):
            probes = recorder.write(whole(model, config, sharded), step, epoch + 1.0, main=main)
            accelerator.log({f"probe/{name}": value for name, value in probes.items()}, step=step)
            clock, counted = time.perf_counter(), step
        save(step, bad)
        image, audio = (sums / good).tolist()
        accelerator.print(f"epoch {epoch + 1}/{config.epochs}: loss image {image:.4f}, audio {audio:.4f}")
    _finish(accelerator, bar)
    return True


def _finish(accelerator: Accelerator, bar: tqdm) -> None:
    bar.close()
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()


def open_source(config: PretrainConfig, *, make: bool = False, probes: bool = False) -> Source:
    """The clips to train on, or to probe with; `make` makes synthetic ones where the settings ask for them."""
    if config.synth_clips and make:
        from avfusion.synth.command import synthesize
        from avfusion.synth.scene import Settings

        size = -(-max(config.image_size) * 3 // 4) * 2  # room for crops, and even
        settings = Settings(clips=config.synth_clips, classes=config.synth_classes, size=size, fps=4)
        print(f"{config.data}: {config.synth_clips} synthetic clips")
        synthesize(config.data, settings, workers=os.cpu_count() or 1, progress=sys.stderr.isatty())
    where = (config.probe_data or config.data) if probes else config.data
    split = config.probe_split if probes else config.split
    if config.layout == "shards":
        return data.Shards(where)
    return data.read(config.layout, where, None if split == "all" else split)


def build(config: PretrainConfig, *, weights: bool = False) -> AVMAE:
    """The model of a run, freshly initialised; with `weights`, its ViTs start from what the settings name."""
    encoder = DeepAVFusion(config.encoder())
    for name in ("image", "audio"):
        if weights and getattr(config, f"{name}_weights"):
            load_unimodal(getattr(encoder, name), getattr(config, f"{name}_weights"))
    names = ("decoder_dim", "decoder_depth", "decoder_num_heads", "image_mask_ratio", "audio_mask_ratio", "norm_loss")
    return AVMAE(encoder, **{name: getattr(config, name) for name in names})


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


def whole(model: AVMAE, config: PretrainConfig, sharded: bool) -> AVMAE:
    """The model with all its weights in this process: itself, or, if sharded, a copy."""
    if not sharded:
        return model
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    copy = build(config).to(next(iter(weights.values())).device)
    copy.load_state_dict(weights)
    return copy


def mask_noise(config: PretrainConfig, epoch: int, index: Tensor) -> list[Tensor]:
    """What decides the masks of clips `index` [B]: uniform [B, image patches] and [B, audio patches].

    It is a function of (seed, epoch, clip): a counter-based generator is placed there.
    """
    encoder = config.encoder()
    sizes = [rows * columns for rows, columns in (encoder.image_grid, encoder.audio_grid)]
    rows = [
        np.random.Generator(np.random.Philox(key=[config.seed, epoch], counter=[0, clip, 0, 0])).random(sum(sizes))
        for clip in index.tolist()
    ]
    return list(torch.from_numpy(np.stack(rows)).split(sizes, dim=1))


def total_norm(model: nn.Module) -> Tensor:
    """The 2-norm of all gradients together, over all processes if they are sharded."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def count_flop(config: PretrainConfig) -> int:
    """FLOP of a training step for one clip, forward and backward, as matrix products; recomputation not counted."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = build(config)
        image, audio = torch.empty(1, 3, *config.image_size), torch.empty(1, 1, *config.audio_size)
        with FlopCounterMode(display=False) as counter:
            loss_image, loss_audio, *_ = model(image, audio, predict=False)
            (loss_image + loss_audio).backward()
    return counter.get_total_flops()


def _peak(device: torch.device, dtype: torch.dtype) -> float:
    if device.type != "cuda" or dtype != torch.bfloat16:
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)
