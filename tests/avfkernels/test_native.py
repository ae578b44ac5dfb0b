"""The C++ library: every instruction set, any number of threads, loading."""

import os
import subprocess
import sys

import pytest
import torch
from oracle import pair_inputs

import avfkernels
from avfkernels import _native, pair_attention

pytestmark = pytest.mark.skipif(_native.why_unavailable() is not None, reason=str(_native.why_unavailable()))

CHECK_ONE_ISA = """
import sys, torch, avfkernels
from avfkernels import _native
from oracle import pair_inputs
print(_native.library().avf_isa().decode())
worst = 0.0
shapes = (1, 1, 1, 1, 1, 1, 1), (2, 3, 16, 96, 196, 16, 16), (2, 3, 16, 8, 8, 16, 64), (1, 2, 21, 65, 130, 20, 23)
for shape in shapes:
    tensors = pair_inputs(*shape, dtype=torch.float32, logit=2.0)
    with avfkernels.backend("cpu"):
        out, lse = avfkernels.pair_attention(*tensors, scale=0.25, return_lse=True)
    with avfkernels.backend("reference"):
        exact, exact_lse = avfkernels.pair_attention(*(t.double() for t in tensors), scale=0.25, return_lse=True)
    worst = max(worst, (out - exact).abs().max().item(), (lse - exact_lse).abs().max().item())
assert worst < 5e-6, worst
"""


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_instruction_set_computes_the_same(isa):
    """Asking for more than the processor has gives the best that it has."""
    done = subprocess.run(
        [sys.executable, "-c", CHECK_ONE_ISA],
        env=os.environ | {"AVF_CPU_ISA": isa, "PYTHONPATH": os.path.dirname(__file__)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    order = ["portable", "avx2", "avx512"]
    assert order.index(done.stdout.strip()) <= order.index(isa)
    if isa == "portable":
        assert done.stdout.strip() == "portable"


def test_results_are_bitwise_the_same_for_any_number_of_threads():
    tensors = pair_inputs(3, 5, 40, 70, 90, dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            with avfkernels.backend("cpu"):
                results.append(pair_attention(*tensors, scale=0.25))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_the_kernel_writes_every_element(monkeypatch):
    """Outputs start as NaN; none may be left."""
    from avfkernels.pair_attention import cpu

    empty = cpu._empty_outputs
    monkeypatch.setattr(cpu, "_empty_outputs", lambda q, v: tuple(t.fill_(float("nan")) for t in empty(q, v)))
    out, lse = cpu.kernel(*pair_inputs(2, 3, 21, 5, 70, 9, 23, torch.float32), 0.25, None, None)
    assert bool(out.isfinite().all())
    assert bool(lse.isfinite().all())


def test_the_process_keeps_its_denormals():
    """A library linked with fast-math would flush them to zero for everybody."""
    assert (torch.tensor(1e-40) * 1.0).item() != 0.0


def test_a_library_of_another_abi_is_refused(monkeypatch):
    monkeypatch.setattr(_native, "ABI_VERSION", 999)
    library, reason = _native._load.__wrapped__()
    assert library is None
    assert "ABI version 1, this package 999; run `pip install -e .` again" in reason


def test_a_missing_or_broken_library_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "PATH", tmp_path / "libavfkernels.so")
    assert "was not built: it needs a C++ compiler" in _native._load.__wrapped__()[1]
    _native.PATH.write_bytes(b"not a library")
    assert "does not load" in _native._load.__wrapped__()[1]


def test_an_error_code_becomes_an_exception():
    with pytest.raises(RuntimeError, match="some_function failed: out of memory"):
        _native.check(1, "some_function")
