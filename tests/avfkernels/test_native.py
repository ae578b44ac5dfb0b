"""The C++ library: every instruction set, any number of threads, loading."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from oracle import pair_inputs

import avfkernels
from avfkernels import native, pair_attention
from avfkernels.ops import pair

pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))

CHECK_ONE_ISA = """
import itertools, torch, avfkernels
from avfkernels import native
from oracle import assert_accurate, pair_inputs
print(native.isa())
shapes = (1, 1, 1, 1, 1, 1, 1), (2, 3, 16, 19, 49, 16, 16), (2, 3, 16, 8, 8, 16, 64), (1, 2, 21, 65, 130, 20, 23)
for shape, interaction, dropout_p in itertools.product(shapes, ("sum", "product"), (0.0, 0.3)):
    results = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        tensors = [t.to(dtype).requires_grad_() for t in pair_inputs(*shape, dtype=torch.float32, logit=2.0)]
        with avfkernels.backend(backend):
            out, lse = avfkernels.pair_attention(
                *tensors, scale=0.25, interaction=interaction, dropout_p=dropout_p, seed=1, return_lse=True
            )
        results.append((out, lse, *torch.autograd.grad(out.sin().sum() + lse.sin().sum(), tensors)))
    for name, *triple in zip(("out", "lse", "q", "k1", "v1", "k2", "v2"), *results):
        assert_accurate(*triple, (shape, interaction, dropout_p, name), times=3, roundings=4)
    # What hidden tokens hold reaches nothing.
    masks = [torch.arange(n).expand(shape[0], n) % 3 != 1 for n in shape[3:5]]
    for dtype, bad in itertools.product((torch.float32, torch.bfloat16), (float("nan"), float("-inf"))):
        results = []
        for value in (0.0, bad):
            tensors = pair_inputs(*shape, dtype=dtype)
            for x, mask in zip(tensors[1:], (masks[0], masks[0], masks[1], masks[1])):
                x.masked_fill_(~mask[:, None, :, None], value)
            tensors = [x.requires_grad_() for x in tensors]
            with avfkernels.backend("cpu"):
                out, lse = avfkernels.pair_attention(*tensors, scale=0.25, interaction=interaction, dropout_p=dropout_p,
                                                     seed=1, return_lse=True, mask1=masks[0], mask2=masks[1])
            results.append((out, lse, *torch.autograd.grad(out.sin().sum() + lse.sin().sum(), tensors)))
        assert all(map(torch.equal, *results)), (shape, interaction, dropout_p, dtype, bad)
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


@pytest.mark.parametrize("interaction", ["sum", "product"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_results_are_bitwise_the_same_for_any_number_of_threads(interaction, dropout_p):
    tensors = pair_inputs(3, 5, 40, 70, 90, dtype=torch.float32, grad=True)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            with avfkernels.backend("cpu"):
                out = pair_attention(*tensors, scale=0.25, interaction=interaction, dropout_p=dropout_p, seed=1)
                results.append((out, *torch.autograd.grad(out.sin().sum(), tensors)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("interaction", ["sum", "product"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_kernels_write_every_element(monkeypatch, interaction, dropout_p):
    """Outputs and gradients start as NaN; none may be left."""

    def poisoned(function):
        def call(*args):
            tensors = function(*args)
            for tensor in tensors:
                tensor.fill_(float("nan"))
            return tensors

        return call

    monkeypatch.setattr(pair, "fake", poisoned(pair.fake))
    monkeypatch.setattr(pair, "allocate_backward", poisoned(pair.allocate_backward))
    tensors = pair_inputs(2, 3, 21, 5, 70, 9, 23, torch.float32)
    options = (None, None, torch.tensor(1), 0.25, interaction, dropout_p, "cpu")
    out, lse, saved = pair.forward(*tensors, *options, True)
    grads = pair.backward(out, lse, saved, *tensors, *options)
    for tensor in (out, lse, saved, *grads):
        assert bool(tensor.isfinite().all())


PEAK_MEMORY = """
import resource, sys, torch, avfkernels
from oracle import pair_inputs
torch.set_num_threads(1)
def run(n, interaction, dropout_p):
    tensors = pair_inputs(1, 1, 4, n, n, 8, 8, torch.float32, grad=True)
    with avfkernels.backend("cpu"):
        out = avfkernels.pair_attention(*tensors, scale=0.25, interaction=interaction, dropout_p=dropout_p, seed=1)
    torch.autograd.grad(out.sum(), tensors)
cases = [(interaction, dropout_p) for interaction in ("sum", "product") for dropout_p in (0.0, 0.3)]
for case in cases:
    run(8, *case)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for case in cases:
    run(4096, *case)
    print(*case, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


# Sixteen million pairs, four times.
def test_nothing_is_allocated_that_grows_with_the_number_of_pairs():
    """4096 x 4096 pairs: one float for each would be 64 MiB, the gradients of all tokens are 1 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY],
        env=os.environ | {"PYTHONPATH": os.path.dirname(__file__)},
        capture_output=True,
        text=True,
        check=True,
    )
    grown = [line.split() for line in done.stdout.splitlines()]
    assert len(grown) == 4
    assert all(int(held) < 16 * 2**20 for *_, held in grown), done.stdout


def test_the_process_keeps_its_denormals():
    """A library linked with fast-math would flush them to zero for everybody."""
    assert (torch.tensor(1e-40) * 1.0).item() != 0.0


def test_a_library_of_another_abi_is_refused(monkeypatch):
    version = native.ABI_VERSION
    monkeypatch.setattr(native, "ABI_VERSION", 999)
    library, reason = native._open(native.PATH, "a compiler")
    assert library is None
    assert f"ABI version {version}, this package 999; run `pip install -e .` again" in reason


def test_a_structure_of_another_size_is_refused(monkeypatch):
    """What ctypes lays out is what the C++ compiler did: both say how many bytes it is."""
    assert native.library().avf_pair_bytes() == ctypes.sizeof(native.Pair)
    monkeypatch.setattr(native, "Pair", native.Tensor)
    assert native._open(native.PATH, "a compiler")[0] is None


def test_a_missing_or_broken_library_is_explained(tmp_path):
    path = tmp_path / "libavfkernels.so"
    assert "was not built: it needs a C++ compiler" in native._open(path, "a C++ compiler")[1]
    path.write_bytes(b"not a library")
    assert "does not load" in native._open(path, "a C++ compiler")[1]


def test_an_error_code_becomes_an_exception():
    class Library:
        avf_pair_forward = staticmethod(lambda arguments: 1)
        avf_error = native.library().avf_error

    with pytest.raises(RuntimeError, match=r"avf_pair_forward failed: out of memory \(1\)"):
        native.call(Library, "avf_pair_forward", native.Pair())
