"""The table: what early fusion costs, as released and rewritten, against no fusion. ViT-B, as in Table 6 of the paper.

Before anything is timed, two layers in float64 must agree to 1e-10 between the rewrites and the materialised equations
(outputs and gradients), and then the outputs of the timed models themselves, in the timed dtype.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from bench import encoder, measure
from bench.encoder import BASELINE, PASSES, ROWS, TWINS, Pass, Row

BATCH = {"cpu": 4, "cuda": 64}
FLOAT64_TOLERANCE = 1e-10  # largest absolute difference
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # largest relative difference of the timed outputs
SECTIONS = {f"encoder_{number}_{pass_.name}": pass_ for number, pass_ in enumerate(PASSES, 1)}
# Seconds that each row is timed for, materialised ones less: both inference tables are to take under eight minutes, on
# two slow cores too.
SECONDS = {"full": 13.0, "masked": 13.0, "training": 13.0}
MATERIALISED = 0.4  # of them


@pytest.fixture(scope="module")
def exact(progress) -> float:
    progress("checking the rewrites in float64")
    worst = encoder.exactness()
    assert worst < FLOAT64_TOLERANCE, f"the rewrites differ from the paper's equations by {worst:.1e} in float64"
    return worst


@pytest.fixture(scope="module")
def models(exact, device, progress):
    """Training or not -> config -> model. On CUDA inference is in bfloat16 and training under autocast."""
    progress("making the models")
    training = encoder.build([row.config for row in ROWS.values()])
    nn.ModuleList(training.values()).to(device)
    if device.type == "cpu":
        return {True: training, False: training}
    inference = copy.deepcopy(training)
    nn.ModuleList(inference.values()).bfloat16()
    return {True: training, False: inference}


@pytest.fixture(scope="module")
def memory(exact, device, planned, progress) -> dict[tuple[str, str], int]:
    """(pass, row) -> bytes, for all passes of this run; empty on CUDA, where memory is measured beside the time."""
    if device.type == "cuda":
        return {}
    progress("peak memory, in a process of its own")
    passes = [SECTIONS[name] for name in reversed(SECTIONS) if name in planned]  # what is quick first
    runs = [(p.name, row.name) for p in passes for row in ROWS.values() if not row.why_not(device)]
    return encoder.peak_memory_on_cpu(runs, BATCH["cpu"])


@pytest.fixture(scope="module", params=SECTIONS)
def section(request, exact, models, memory, device, progress, publish):
    """One table, measured whole: its title, and for each row its results and recorded times."""
    pass_, batch = SECTIONS[request.param], BATCH[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model_dtype = torch.float32 if pass_.training else dtype
    inputs = [
        x.to(device, model_dtype if x.is_floating_point() else x.dtype) for x in pass_.inputs(BASELINE.config, batch)
    ]
    absent = {name: why for name, row in ROWS.items() if (why := row.why_not(device))}
    shown = [row for name, row in ROWS.items() if name not in absent]
    calls, outputs, peaks = {}, {}, {}
    for row in shown:
        progress(f"{pass_.title}: the first pass of each row", row.name)
        peak = memory.get((pass_.name, row.name))
        if device.type == "cpu" and not peak:
            continue  # it did not survive
        bind = partial(pass_.bind, models[pass_.training][row.config], backend=row.backend, way=row.way)
        try:
            call = bind(inputs=inputs)
            first = bind(inputs=[x[:1] for x in inputs]) if row.materialised else call  # it is slow: one video
            outputs[row.name] = [x[:1] for x in first()]
            peaks[row.name] = peak or measure.peak_memory(call, device)
        except torch.OutOfMemoryError:
            continue
        calls[row.name] = call

    assert BASELINE.name in calls, f"{BASELINE.name} itself runs out of memory at batch {batch}"
    agreement = {}
    for ours, materialised in TWINS:
        if calls.keys() >= {ours, materialised}:
            error = encoder.difference(outputs[ours], outputs[materialised])
            assert error < TOLERANCE[dtype], f"{ours}: off by {error:.1e} from the materialised outputs in {dtype}"
            agreement[ours] = error
    outputs.clear()

    # Materialised rows take turns with the baseline on their own: they are slow, and what is compared is close by.
    times, summary, seconds = {}, {}, SECONDS[pass_.name]
    for materialised, effort in (
        (True, measure.Effort(MATERIALISED * seconds, min_rounds=2)),
        (False, measure.Effort(seconds, max_rounds=40)),
    ):
        names = [BASELINE.name, *(row.name for row in shown if row.materialised == materialised)]
        turns = {name: calls[name] for name in dict.fromkeys(names) if name in calls}
        timed = measure.in_turns(turns, device, effort, progress=lambda text: progress(f"{pass_.title}: timing", text))
        times, summary = times | timed, summary | measure.summarise(timed)
    rows = [result(pass_, row, summary.get(row.name), peaks, batch) for row in shown]
    publish(request.param, {
        "title": pass_.title,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch.") + (" autocast" if dtype != model_dtype else ""),
        "baseline": BASELINE.name,
        "units": UNITS,
        "checks": {"float64_largest_difference": exact, "timed_relative_difference": agreement},
        "rows": rows,
        "notes": notes(pass_, device, exact, agreement),
    })  # fmt: skip
    found = {name: {"name": name, "note": why} for name, why in absent.items()} | {row["name"]: row for row in rows}
    return pass_.title, {name: (row, times.get(name, [])) for name, row in found.items()}


UNITS = {
    "seconds": "s for a batch",
    "per_second": "videos/s, at the median time",
    "time_ratio": "to the baseline's time in the same round",
    "peak_memory": "bytes above the loaded model",
    "flop": "FLOP in the layers for a video, multiply-add = 2",
    "paper.memory_gb": "GB, as reported",
}


def result(pass_: Pass, row: Row, summary: dict | None, peaks: dict[str, int], batch: int) -> dict:
    """A row of the results file."""
    flop = {"flop": pass_.flop(row), "flop_ratio": pass_.flop(row) / pass_.flop(BASELINE)}
    if summary is None:
        measured = {"note": "out of memory"}
    else:
        measured = summary | {
            "per_second": batch / summary["seconds"]["median"],
            "peak_memory": peaks[row.name],
            "memory_ratio": peaks[row.name] / peaks[BASELINE.name],
        }
    paper = {}
    if row.paper and pass_.name == "full":
        ratios = {
            "time_ratio": BASELINE.paper["per_second"] / row.paper["per_second"],
            "memory_ratio": row.paper["memory_gb"] / BASELINE.paper["memory_gb"],
        }
        paper = {"paper": row.paper | ratios}
    return {"name": row.name} | measured | flop | paper


def notes(pass_: Pass, device: torch.device, exact: float, agreement: dict[str, float]) -> list[str]:
    """How to read the table."""
    memory = "CUDA tensors" if device.type == "cuda" else "resident memory, in a process of its own"
    timed = f", and as timed by at most {max(agreement.values()):.0e} relative (the first video)" if agreement else ""
    lines = [
        "materialised: the paper's equations with every pair in memory and the fusion tokens concatenated, as "
        "released. eager: the rewrites in plain PyTorch. ours: with the kernels that are faster here. late: factorized "
        "fusion in the last layer only. AudioSet: fusion blocks as wide as in the release's AudioSet model "
        "(fusion_attn_ratio 1, fusion_mlp_ratio 4).",
        "Rows are timed in turns, materialised ones apart from the others; the time ratio is the median over rounds of "
        "the ratio to no fusion in the same round. It is held against the floor, the ratio of the FLOP that the row's "
        "layers execute.",
        f"Peak memory: {memory}, above the loaded model{'; gradients included' if pass_.training else ''}.",
        f"Checked before timing: ours and materialised differ by at most {exact:.0e} in float64 (two layers, outputs "
        f"and gradients){timed}.",
    ]
    if device.type == "cuda":
        lines.append("compiled: layers fused and compiled, and in inference recorded as a CUDA graph, as by default.")
    if pass_.name == "full":
        lines.append("paper: Table 6 of Mo & Morgado, CVPR 2024, as measured by its authors on their own hardware.")
    return lines


@pytest.mark.parametrize("row", [name for name, row in ROWS.items() if not row.why_not(measure.DEVICE)])
def test_encoder(section, row, replay):
    title, rows = section
    replay(*rows[row], group=title)
