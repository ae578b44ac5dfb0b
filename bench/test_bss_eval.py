"""SDR, SIR and SAR of separated sounds: `avfusion.metrics.separation.bss_eval` against mir_eval's, pair by pair.

100 pairs of sources of 3 s at 16 kHz, filters of 512 taps. Figures must agree to 1e-3 dB before anything is timed.
"""

from __future__ import annotations

import warnings

import mir_eval
import numpy as np
import pytest
import torch
from torch import Tensor

from avfusion.metrics.separation import bss_eval
from bench import measure

PAIRS, SAMPLES = 100, 48_000
TOLERANCE = 1e-3  # dB
ROWS = ("ours", "mir_eval")  # the slow one takes part in few rounds


def signals() -> tuple[Tensor, Tensor]:
    """References with the falling spectrum of sounds, and estimates with interference, echoes and noise."""
    generator = torch.Generator().manual_seed(0)
    white, noise = torch.randn(2, PAIRS, 2, SAMPLES, generator=generator, dtype=torch.float64)
    references = torch.cumsum(white, -1) * 0.05 + white
    return references, references + 0.3 * references.roll(1, 1) + 0.1 * references.roll(9, -1) + 0.1 * noise


def by_mir_eval(references: np.ndarray, estimates: np.ndarray) -> list[np.ndarray]:
    """SDR, SIR and SAR, each [pairs, 2]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated there
        scores = [mir_eval.separation.bss_eval_sources(r, e, compute_permutation=False)[:3]
                  for r, e in zip(references, estimates, strict=True)]  # fmt: skip
    return [np.stack(column) for column in zip(*scores, strict=True)]


@pytest.fixture(scope="module", params=["bss_eval"])
def section(request, device, progress, publish):
    """The table, measured whole: its title, and for each row its results and recorded times."""
    title = "SDR, SIR and SAR (BSS Eval v3, 512 taps) of pairs of 3 s"
    progress(title)
    references, estimates = signals()
    arrays, ours = (references.numpy(), estimates.numpy()), (references.to(device), estimates.to(device))
    calls = {"ours": lambda: bss_eval(*ours), "mir_eval": lambda: by_mir_eval(*arrays)}
    expected = torch.from_numpy(np.stack(calls["mir_eval"]()))
    worst = (torch.stack(calls["ours"]()).cpu() - expected).abs().max().item()
    assert worst < TOLERANCE, f"off from mir_eval by {worst:.1e} dB"
    times = measure.in_turns(calls, device, progress=lambda text: progress(title, text))
    rows = {name: {"name": name} | result for name, result in measure.summarise(times).items()}
    publish(request.param, {
        "title": title,
        "batch": PAIRS,
        "dtype": "float64",
        "baseline": "ours",
        "units": {"seconds": "s for all pairs"},
        "checks": {"largest_difference_in_db": worst},
        "rows": list(rows.values()),
        "notes": [f"mir_eval {mir_eval.__version__}, on the CPU, one pair after the other. Checked before timing: all "
                  f"figures agree to {worst:.0e} dB."],
    })  # fmt: skip
    return title, {name: (row, times[name]) for name, row in rows.items()}


@pytest.mark.parametrize("row", ROWS)
def test_bss_eval(section, row, replay):
    title, rows = section
    replay(*rows[row], group=title)
