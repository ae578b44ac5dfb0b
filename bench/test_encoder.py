"""The table: what early fusion costs, as released and rewritten, against no fusion. ViT-B, as in Table 6 of the paper.

Before anything is timed, two layers in float64 must agree to 1e-10 between the rewrites and the materialised equations
(outputs and gradients), and then the outputs of the timed models themselves, in the timed dtype.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bench import encoder, measure
from bench.encoder import BASELINE, PASSES, ROWS, TWINS, Pass

FLOAT64_TOLERANCE = 1e-10  # largest absolute difference
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # largest relative difference of the timed outputs


@pytest.fixture(scope="session")
def exact(progress) -> float:
    progress("checking the rewrites in float64")
    worst = encoder.exactness()
    assert worst < FLOAT64_TOLERANCE, f"the rewrites differ from the paper's equations by {worst:.1e} in float64"
    return worst


@pytest.fixture(scope="session")
def models(exact, device):
    """Training or not -> config -> model. On CUDA inference is in bfloat16 and training under autocast."""
    training = encoder.build([row.config for row in ROWS.values()])
    nn.ModuleList(training.values()).to(device)
    if device.type == "cpu":
        return {True: training, False: training}
    inference = copy.deepcopy(training)
    nn.ModuleList(inference.values()).bfloat16()
    return {True: training, False: inference}


@pytest.fixture(scope="session")
def memory_on_cpu(exact, device, batch_size, progress) -> dict[str, dict[str, int]]:
    """Row -> pass -> bytes; empty on CUDA, where memory is measured beside the time."""
    peaks = {}
    for row in ROWS.values() if device.type == "cpu" else ():
        if row.why_not(device, training=False):
            continue
        progress(f"peak memory, batch {batch_size}", row.name)
        peaks[row.name] = encoder.peak_memory_on_cpu(row, batch_size)
    return peaks


@pytest.fixture(scope="session", params=PASSES, ids=lambda pass_: pass_.name)
def table(request, exact, models, memory_on_cpu, device, batch_size, effort, progress, publish):
    """One table, measured whole: its title, and for each row its results and recorded times."""
    pass_ = request.param
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model_dtype = torch.float32 if pass_.training else dtype
    inputs = [
        x.to(device, model_dtype if x.is_floating_point() else x.dtype)
        for x in pass_.inputs(BASELINE.config, batch_size)
    ]
    calls, outputs, peaks = {}, {}, {}
    absent = {name: row.why_not(device, training=pass_.training) for name, row in ROWS.items()}
    if request.config.getoption("--no-compile"):
        absent |= {name: "--no-compile" for name, row in ROWS.items() if row.way == "compiled"}
    shown = {name: row for name, row in ROWS.items() if not absent[name]}
    for row in shown.values():
        progress(f"{pass_.title}: the first pass of each row", row.name)
        try:
            call = pass_.bind(models[pass_.training][row.config], inputs, row.backend, row.way)
            if device.type == "cuda":
                outputs[row.name] = call()
                peaks[row.name] = measure.peak_memory(call, device)
            elif pass_.name in memory_on_cpu[row.name]:
                outputs[row.name] = call()
                peaks[row.name] = memory_on_cpu[row.name][pass_.name]
        except torch.OutOfMemoryError:
            outputs.pop(row.name, None)
        if row.name in peaks:
            calls[row.name] = call

    agreement = {}
    for ours, materialised in TWINS:
        if calls.keys() >= {ours, materialised}:
            error = encoder.difference(outputs[ours], outputs[materialised])
            assert error < TOLERANCE[dtype], f"{ours}: off by {error:.1e} from the materialised outputs in {dtype}"
            agreement[ours] = error
    outputs.clear()

    # Materialised rows are slow: they take turns with the baseline on their own, so that what is compared is close by.
    times, summary = {}, {}
    for materialised in (True, False):
        group = {row.name for row in shown.values() if row.materialised == materialised} | {BASELINE.name}
        turns = {name: call for name, call in calls.items() if name in group}
        timed = measure.in_turns(turns, device, effort, progress=lambda text: progress(f"{pass_.title}: timing", text))
        times, summary = times | timed, summary | measure.summarise(timed)
    rows = [result(pass_, row, summary.get(row.name), peaks, batch_size) for row in shown.values()]
    section = {
        "title": pass_.title,
        "batch": batch_size,
        "dtype": str(dtype).removeprefix("torch.") + (" autocast" if dtype != model_dtype else ""),
        "baseline": BASELINE.name,
        "units": UNITS,
        "checks": {"float64_largest_difference": exact, "timed_relative_difference": agreement},
        "rows": rows,
        "notes": notes(pass_, device, exact, agreement),
    }
    publish(f"encoder_{1 + PASSES.index(pass_)}_{pass_.name}", section)
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


def result(pass_: Pass, row: encoder.Row, summary: dict | None, peaks: dict[str, int], batch_size: int) -> dict:
    """A row of the results file."""
    flop = {"flop": pass_.flop(row), "flop_ratio": pass_.flop(row) / pass_.flop(BASELINE)}
    if summary is None:
        measured = {"note": "out of memory"}
    else:
        measured = summary | {
            "per_second": batch_size / summary["seconds"]["median"],
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
    memory = "CUDA tensors" if device.type == "cuda" else "resident memory, in a process for each row"
    timed = f", and as timed by at most {max(agreement.values()):.0e} relative" if agreement else ""
    lines = [
        "materialised: the paper's equations with every pair in memory and the fusion tokens concatenated, as "
        "released. eager: the rewrites in plain PyTorch. ours: with the kernels that are faster here. late: factorized "
        "fusion in the last layer only.",
        "Rows are timed in turns, the materialised ones apart; the time ratio is the median over rounds of the ratio "
        "to no fusion in the same round. It is held against the floor, the ratio of the FLOP that the row's layers "
        "execute.",
        f"Peak memory: {memory}, above the loaded model{'; gradients included' if pass_.training else ''}.",
        f"Checked before timing: ours and materialised differ by at most {exact:.0e} in float64 (two layers, outputs "
        f"and gradients){timed}.",
    ]
    if device.type == "cuda":
        lines.append("compiled: ours under torch.compile. graphs: ours as a CUDA graph (`model.graphed`).")
    if pass_.name == "full":
        lines.append("paper: Table 6 of Mo & Morgado, CVPR 2024, as measured by its authors on their own hardware.")
    return lines


@pytest.mark.parametrize("row", ROWS)
def test_encoder(table, row, replay):
    title, rows = table
    replay(*rows[row], group=title)
